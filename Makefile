# Each target sets up what it needs. PYTHON chooses the interpreter of the environments.
PYTHON ?= python3.11
VENV := .venv
VENV_ALL := .venv-all
VENV_NEW := .venv-newest
RUNS ?= runs
export JAX_PLATFORMS ?= cpu

.DEFAULT_GOAL := help
.PHONY: help quickstart quickstart-long test test-all test-newest check clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

$(VENV)/ready: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --requirement requirements.txt
	$(VENV)/bin/pip install --quiet --no-deps --editable .
	touch $@

$(VENV_ALL)/ready: requirements.txt requirements-compare.txt pyproject.toml
	$(PYTHON) -m venv $(VENV_ALL)
	$(VENV_ALL)/bin/pip install --quiet --requirement requirements.txt --requirement requirements-compare.txt
	$(VENV_ALL)/bin/pip install --quiet --no-deps --editable .
	touch $@

quickstart: $(VENV)/ready  ## generate a corpus, train, restore, evaluate, write a report page (6 minutes on 2 cores)
	launch/quickstart.sh $(VENV)/bin/python quickstart $(RUNS)

quickstart-long: $(VENV)/ready  ## the same for up to 30 minutes: learns where things are
	launch/quickstart.sh $(VENV)/bin/python quickstart:long $(RUNS)

test: $(VENV)/ready  ## the default tests
	$(VENV)/bin/python -m pytest

test-all: $(VENV_ALL)/ready  ## the slow tests, and those against torch, transformers and the TPU compiler
	$(VENV_ALL)/bin/python -m pytest -m "slow or extras"

test-newest:  ## the default tests on JAX 0.11.2 and on the newest JAX, where Python 3.12 is present
	launch/test_newest.sh $(VENV_NEW)

check: $(VENV)/ready  ## linter, formatter and type checker
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:  ## remove the environments and what the quickstart made
	rm -rf $(VENV) $(VENV_ALL) $(VENV_NEW)-* $(RUNS)/quickstart*
