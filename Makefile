# From nothing but a Python (3.11 or later, with venv) and a network: `make run` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# What is wrong with $(PYTHON); nothing where it will do. Any Python can run it.
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

.PHONY: run test test-all test-hf lint train bench clean

run: $(VENV)/.run
	$(BIN)/python -m engine generate $(PROMPTS) --max-new-tokens 96 --chunked-prefill-size 128 --check

test: $(VENV)/.test
	$(BIN)/python -m pytest

test-all: $(VENV)/.test
	$(BIN)/python -m pytest -m ""

# The Llama against another implementation; torch is large, so `make test` does not bring it.
test-hf: $(VENV)/.test
	$(PIP) -e ".[hf]"
	$(BIN)/python -m pytest tests/models

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Makes the small Llama that ships anew from its text; minutes on two cores.
train: $(VENV)/.test
	$(BIN)/python -m engine train

bench: $(VENV)/.run
	for name in allocator scatter attention; do $(BIN)/python -m engine.bench $$name || exit 1; done

# An environment that is whole, or made anew: a `python` without its pip, or of an old version, would pass for one.
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

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
