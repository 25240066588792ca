# `make run` and `make test` need only a Python (3.11 or later, with venv) and a network.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# What is wrong with $(PYTHON); empty where it is suitable. Any Python can run this check.
WRONG_PYTHON = $(shell { $(PYTHON) -c 'import sys; v = sys.version_info; \
	print("found %d.%d at %s" % (v[0], v[1], sys.executable) if v < (3, 11) else "")' && \
	{ $(PYTHON) -c 'import sys; sys.version_info < (3, 11) or __import__("ensurepip")' || \
	echo "found one without venv (on Debian: apt install python3-venv)"; } || \
	echo "found none that runs as $(PYTHON)"; } 2>/dev/null)

HAS_VENV = $(shell $(BIN)/python -c 'import sys, pip; print("yes" if sys.version_info >= (3, 11) else "")' 2>/dev/null)

# Prompts of different lengths; the last is longer than one prefill chunk.
PROMPTS := --prompt "A" \
	--prompt "Alice was beginning to" \
	--prompt "The Queen turned crimson with fury, and, after glaring at her for a moment like a wild beast," \
	--prompt "There was a table set out under a tree in front of the house, and the March Hare and the Hatter were \
having tea at it: a Dormouse was sitting between them, fast asleep, and the other two were using it as a cushion, \
resting their elbows on it, and talking over its head."

.PHONY: run test test-all proof test-hf test-gpu test-gpu-here lint docs docs-options docs-pages docs-pictures train bench clean

run: $(VENV)/.run
	$(BIN)/python -m engine generate $(PROMPTS) --max-new-tokens 96 --chunked-prefill-size 128 --check

# Files of tests are divided among so many processes; XLA uses the other cores.
JOBS ?= 2

test: $(VENV)/.test
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

test-all: $(VENV)/.test
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m ""

# Visits every state of the small scopes and writes docs/proof.md; SLOW=--slow visits the larger ones too.
proof: $(VENV)/.test
	$(BIN)/python tests/proof/report.py $(SLOW)

# Tests of the GPU kernels, which need no GPU: interpreted, and compiled ahead of time. The kernels need a jax that Python
# 3.11 does not have, so if $(PYTHON) is that old, another Python is searched for and gets a separate environment.
PYENV_PYTHONS = $(wildcard $(or $(PYENV_ROOT),$(HOME)/.pyenv)/versions/3.1[2-9].*/bin/python3)
NEW_PYTHON = $(firstword $(foreach python,$(PYTHON) python3.12 python3.13 $(PYENV_PYTHONS),$(shell $(python) -c \
	'import sys; sys.version_info >= (3, 12) and __import__("ensurepip") and print("$(python)")' 2>/dev/null)))

test-gpu:
	@$(if $(NEW_PYTHON),$(MAKE) VENV=.venv-gpu PYTHON=$(NEW_PYTHON) test-gpu-here, \
		echo "no Python 3.12 or later here: the tests of the GPU kernels are skipped")

test-gpu-here: $(VENV)/.made
	$(PIP) -e ".[test]"
	-$(BIN)/python -m engine.bench.gpu.toolchain
	$(BIN)/python -m pytest tests/attention_gpu

# Compares the models with another implementation; torch is large, so `make test` does not install it.
test-hf: $(VENV)/.test
	$(PIP) -e ".[hf]"
	$(BIN)/python -m pytest tests/models

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Builds the documentation as a site in build/site; a link or a docstring that is wrong fails it.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet -f docs/site/mkdocs.yml
	@echo "open build/site/index.html, or: $(BIN)/python -m http.server -d build/site"

# Draws the pictures of the documentation again; a test compares them.
docs-pictures: $(VENV)/.run
	$(BIN)/python docs/make_pictures.py

# Generates the reference of options from the code; a test compares the two.
docs-options: $(VENV)/.run
	$(BIN)/python docs/make_options.py

# Makes the pictures of docs/pages.md; needs Chromium (Debian: apt-get install chromium).
docs-pages: $(VENV)/.run
	$(BIN)/python docs/make_pages.py

# Trains the small Llama that ships with the package again from its text; takes minutes on two cores.
train: $(VENV)/.test
	$(BIN)/python -m engine train

bench: $(VENV)/.run
	for name in allocator scatter attention; do $(BIN)/python -m engine.bench $$name || exit 1; done

# Checks the environment and makes it again if it is incomplete: has a `python`, but no pip or an old version.
$(VENV)/.made:
	$(if $(HAS_VENV),,$(if $(WRONG_PYTHON),$(error needs Python 3.11 or later, $(WRONG_PYTHON); make PYTHON=python3.12)))
	$(if $(HAS_VENV),,$(PYTHON) -m venv $(if $(wildcard $(VENV)/pyvenv.cfg),--clear) $(VENV))
	touch $@

$(VENV)/.run: pyproject.toml | $(VENV)/.made
	$(PIP) -e .
	touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/.made
	$(PIP) -e ".[test]"
	-$(BIN)/python -m engine.bench.tpu.libtpu
	touch $@

$(VENV)/.lint: pyproject.toml | $(VENV)/.made
	$(PIP) -e ".[test,lint]"
	touch $@

$(VENV)/.docs: pyproject.toml | $(VENV)/.made
	$(PIP) -e ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
