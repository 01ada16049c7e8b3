# `make help` lists the targets. demo and test need nothing but python3 >= 3.11 and pip's package index: they make their
# own virtual environment. VENV=folder uses another one, PYTHON=python3.12 another interpreter, TESTS=tests/x.py a part.
VENV ?= .venv
PYTHON ?= python3
TESTS ?= tests
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input install -q --progress-bar off -c constraints.txt
RUN := env HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=1
BENCH ?= benchmarks/tiny_quality.py benchmarks/paper_shape.py benchmarks/ops.py

.PHONY: help demo test lint gpu bench install clean
.DEFAULT_GOAL := help

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

demo: $(VENV)/.installed  ## personalize the embedded base for a few subjects, into ./demo
	$(RUN) $(BIN)/dbtrain demo --out demo

test: $(VENV)/.installed  ## every test that needs no GPU
	$(RUN) $(BIN)/python -m pytest -p no:cacheprovider -q -m "not gpu" $(TESTS)

lint: $(VENV)/.installed-dev  ## ruff and mypy
	$(BIN)/ruff check --no-cache .
	$(BIN)/mypy --cache-dir=$(VENV)/.mypy_cache

gpu: $(VENV)/.installed  ## the tests that need a CUDA device
	$(RUN) $(BIN)/python -m pytest -p no:cacheprovider -q -m gpu $(TESTS)

bench: $(VENV)/.installed  ## the benchmarks that need no peer, or BENCH="a.py b.py"
	@for script in $(BENCH); do echo "== $$script"; $(RUN) $(BIN)/python $$script || exit 1; done

install: $(VENV)/.installed  ## only the virtual environment, with dbtrain editable in it

clean:  ## remove the virtual environment and build output
	rm -rf $(VENV) build dist *.egg-info

# torch goes first: a second resolution with everything else then keeps the build (CPU or CUDA) that is there.
$(VENV)/.installed: setup.py constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dbtrain needs Python 3.11 or newer; set PYTHON=")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing dbtrain and its dependencies into $(VENV) (once; some minutes on a slow connection)"
	$(PIP) setuptools torch
	$(PIP) --no-build-isolation -e '.[test]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --no-build-isolation -e '.[dev]'
	@touch $@
