# `make help` lists the targets. They make their own virtual environment; all they need is python3 >= 3.11 and pip's
# package index. VENV=folder is another environment, PYTHON=python3.12 another interpreter, TESTS=tests/x.py some tests.
VENV ?= .venv
PYTHON ?= python3
TESTS ?= tests
BIN := $(VENV)/bin
# On a machine with a GPU and no CUDA toolkit, DeepSpeed's setup.py stops unless DS_IGNORE_CUDA_DETECTION is set. We use
# none of its CUDA operators.
PIP := env DS_IGNORE_CUDA_DETECTION=1 $(BIN)/python -m pip --disable-pip-version-check --no-input install -q --progress-bar off -c constraints.txt
RUN := env HF_HUB_OFFLINE=1
# One process more than cores, since tests of fleets and launchers wait for others half of their time; at most 8, because
# each takes two GiB. Each has one thread: more threads make small models slower.
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 8 ? n + 1 : 8)))
PYTEST = $(RUN) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p no:cacheprovider -q -n $(JOBS) --dist worksteal -m "not gpu"
BENCH ?= benchmarks/tiny_quality.py benchmarks/paper_shape.py

.PHONY: help demo test browser lint gpu compat bench results install clean
.DEFAULT_GOAL := help

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

demo: $(VENV)/.installed  ## train both stages for eight subjects on the small models, into ./demo
	$(RUN) $(BIN)/dbtrain demo --out demo

# tests/faults fork their own process. A fork has none of its parent's threads, so a process that has trained before
# may hang: these tests get processes of their own, and run also where others have failed.
test: $(VENV)/.installed  ## every test that needs no GPU
	$(PYTEST) $(if $(filter tests,$(TESTS)),--ignore tests/faults) $(TESTS); code=$$?; \
	$(if $(filter tests,$(TESTS)),$(PYTEST) tests/faults &&) exit $$code

browser:  ## a headless Chromium for tests/web, which are skipped without one
	@for name in chromium-headless-shell chromium chromium-browser google-chrome; do \
	  if command -v $$name; then exit 0; fi; done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get -q update >/dev/null && DEBIAN_FRONTEND=noninteractive \
	  apt-get -qy install --no-install-recommends chromium-headless-shell fonts-liberation2 >/dev/null; \
	then command -v chromium-headless-shell; else $(MAKE) install && $(BIN)/playwright install --only-shell chromium; fi

lint: $(VENV)/.installed-dev  ## ruff and mypy
	$(BIN)/ruff check --no-cache .
	$(BIN)/mypy --cache-dir=$(VENV)/.mypy_cache

gpu: $(VENV)/.installed  ## the tests and benchmarks that need a CUDA device, in eight minutes, into ./gpu-results
	$(BIN)/python benchmarks/gpu.py --out gpu-results

compat: $(VENV)/.installed  ## what we publish, loaded by eight versions of diffusers, in environments of their own in ./.compat
	$(RUN) OMP_NUM_THREADS=1 $(BIN)/python benchmarks/compat.py

bench: $(VENV)/.installed  ## the benchmarks that need no peer, or BENCH="a.py b.py"
	@for script in $(BENCH); do echo "== $$script"; $(RUN) $(BIN)/python $$script || exit 1; done

results: $(VENV)/.installed  ## docs/results.md and the README's figures, from benchmarks/results/
	$(RUN) $(BIN)/python benchmarks/results_page.py

install: $(VENV)/.installed  ## only the virtual environment, with dbtrain editable in it

clean:  ## remove the virtual environment and build output
	rm -rf $(VENV) .compat build dist *.egg-info

# torch is installed first. The second command then keeps the build of torch (CPU or CUDA) that is there.
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
