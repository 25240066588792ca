# From nothing but a Python (3.11 or later) and a network: `make run` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

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

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: pyproject.toml | $(VENV)/bin/python
	$(PIP) -e .
	touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/bin/python
	$(PIP) -e ".[test]"
	-$(BIN)/python -m engine.bench.tpu.libtpu
	touch $@

$(VENV)/.lint: pyproject.toml | $(VENV)/bin/python
	$(PIP) -e ".[test,lint]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
