# Two commands do everything: `make demo` and `make test`.
# PYTHON picks the interpreter that creates .venv; everything else runs inside it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-all check format docs clean

demo: $(VENV)/.demo-installed
	$(BIN)/trackstar demo --out demo-out

test: check
	$(BIN)/python -m pytest -m "not slow"

test-all: check
	$(BIN)/python -m pytest

check: $(VENV)/.test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

format: $(VENV)/.test-installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.test-installed
	$(BIN)/python docs/generate.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch comes first and pinned: an unpinned torch would pull gigabytes of CUDA packages.
$(VENV)/.torch-installed: constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) torch
	touch $@

$(VENV)/.demo-installed: pyproject.toml $(VENV)/.torch-installed
	$(PIP_INSTALL) --editable ".[demo,explore]"
	touch $@

$(VENV)/.test-installed: pyproject.toml $(VENV)/.torch-installed
	$(PIP_INSTALL) --editable ".[demo,evaluate,explore,test]"
	touch $@ $(VENV)/.demo-installed

clean:
	rm -rf $(VENV) demo-out build src/*.egg-info
