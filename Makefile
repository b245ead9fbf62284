# Each target sets up what it needs. PYTHON chooses the interpreter of the environments.
PYTHON ?= python3.11
VENV := .venv
VENV_ALL := .venv-all
VENV_NEW := .venv-newest
RUNS ?= runs
export JAX_PLATFORMS ?= cpu
# Each file of tests in one of as many processes as there are cores, up to four: they take some GB each.
PYTEST := -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile

.DEFAULT_GOAL := help
.PHONY: help quickstart quickstart-long test test-all bench record-golden test-newest slurm check clean

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
	$(VENV)/bin/python $(PYTEST)

test-all: $(VENV_ALL)/ready slurm  ## the slow tests, and those against torch, transformers and the TPU compiler
	$(VENV_ALL)/bin/python $(PYTEST) -m "slow or extras"

bench: $(VENV_ALL)/ready  ## benchmarks that fit this machine, beside PyTorch and others (ONLY=train_step,data: some)
	$(VENV_ALL)/bin/python -m benchmarks.run --output=$(RUNS)/benchmarks $(if $(ONLY),--only=$(ONLY))

slurm:  ## Debian's Slurm for its test, where this is root with apt-get; `make test-all` does it
	tests/launch/install_slurm.sh

record-golden: $(VENV_ALL)/ready  ## record anew what compiled steps are compared with (tests/compilation/golden)
	NMM_RECORD=1 $(VENV_ALL)/bin/python -m pytest -m extras tests/compilation/test_golden.py

test-newest:  ## the default tests on JAX 0.11.2 and on the newest JAX, where Python 3.12 is present
	launch/test_newest.sh $(VENV_NEW)

check: $(VENV)/ready  ## linter, formatter and type checker
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:  ## remove the environments and what the quickstart made
	rm -rf $(VENV) $(VENV_ALL) $(VENV_NEW)-* $(RUNS)/quickstart*
