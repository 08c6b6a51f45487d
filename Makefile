PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest
MEASURED := $(shell grep -l "at_most=" tests/test_*.py)

.PHONY: demo test test-all parity check env env-test clean

demo: $(VENV)/.demo
	$(BIN)/sif-jax demo configs/demo/demo.yaml

test: check
	$(PYTEST) -n 2 --dist loadgroup -m "not slow"

test-all: check
	$(PYTEST) -n 2 --dist loadgroup

parity: $(VENV)/.test
	$(PYTEST) -n 2 --dist loadgroup -q --measured $(MEASURED)

check: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}; call make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[demo]'
	touch $@

$(VENV)/.test: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[demo,test]'
	touch $@

clean:
	rm -rf $(VENV) .cache runs
