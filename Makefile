# Every target first sets up what it needs: a virtual environment in .venv, with the versions of constraints.txt.
#
#   PYTHON=python3.12   the interpreter to make .venv with
#   ARGS="..."          more arguments for kdfast demo, pytest, the fuzzer or a script
#
# Without a GPU, set PIP_EXTRA_INDEX_URL to PyTorch's CPU wheels, which are a much smaller download.

PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
READY_BENCH := $(VENV)/.ready-bench
READY_DIST := $(VENV)/.ready-dist
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo quick test test-all test-long fuzz aot lint types check bench recipes peers api gallery dist package clean

help:  ## print this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

demo: $(READY)  ## distill a small model on this machine: twelve minutes at most
	$(BIN)/kdfast demo $(ARGS)

# Tests that start processes are in tests/system; others that take long are marked slow. Tests that try random problems
# for minutes are marked long, and test-all leaves them out.
quick: $(READY)  ## test every divergence, teacher and engine once: seconds
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/quick tests/loss/test_divergences.py $(ARGS)

# Triton's interpreter runs in one Python thread: two workers of one thread each use two cores
PYTEST_ON_TWO_CORES := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test: $(READY)  ## run the tests that start no processes and are not slow: ten minutes on two cores
	$(PYTEST_ON_TWO_CORES) --ignore tests/system -m "not slow and not long" $(ARGS)

test-all: $(READY)  ## run those too, as CI does: twenty minutes on two cores
	$(PYTEST_ON_TWO_CORES) $(ARGS)

test-long: $(READY)  ## try thousands of random problems, faults and kills, and all of aot: over half an hour
	$(BIN)/python -m pytest -m long $(ARGS)

# PYTHONPATH: the fuzzer uses the tests' helpers
fuzz: $(READY)  ## try random and damaged arguments, configs, checkpoints and caches: four minutes, or ARGS
	PYTHONPATH=.:tests:tests/helpers $(BIN)/python -m fuzz $(ARGS)

aot: $(READY)  ## compile every kernel for seven GPUs, without one, and check the machine code: half an hour
	PYTHONPATH=. $(BIN)/python tests/kernels/aot.py $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/mypy

check: lint types test  ## lint, type-check and test

# -s: some benchmarks print tables. -W default: the peers' warnings are not ours to mend
bench: $(READY_BENCH)  ## measure time and memory beside the peers, then write tables and a picture: over an hour
	$(BIN)/python -m pytest bench -s -W default $(ARGS)
	$(BIN)/python bench/report.py

recipes: $(READY)  ## run the experiment that decides the default recipe: hours; resumes where it stopped
	$(BIN)/python bench/recipes/experiment.py $(ARGS)
	$(BIN)/python bench/recipes/results.py

peers: $(READY_BENCH)  ## compare our losses with TRL's, Liger's, torchtune's and fla's
	$(BIN)/python -m pytest tests/peers $(ARGS)

api: $(READY)  ## build pages of every public name, from the docstrings, into build/api/
	PYTHONPATH=. $(BIN)/python docs/build_api.py

gallery: $(READY)  ## draw the pictures of the documents, from what commands print: a few minutes on two cores
	PYTHONPATH=. $(BIN)/python docs/make_gallery.py

# The wheel is made from the source distribution, so that no old build product gets into it.
dist: $(READY_DIST)  ## build the wheel and the source distribution into dist/
	rm -rf dist kdfast.egg-info
	$(BIN)/python -m build

package: dist  ## check both, then install and use the wheel as users do, with and without triton: minutes
	$(BIN)/python tests/system/package/install.py

clean:  ## remove .venv, build products and caches, but no results of runs
	rm -rf $(VENV) build/api build/lib build/bdist.* dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): setup.py constraints.txt kdfast/_version.py
	@echo "Setting up $(VENV): a few minutes, once."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "kdfast needs Python 3.10 or newer; name one: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) -e '.[train,dev]'
	@touch $@

# --no-deps: torchtune's own dependencies are other versions than ours, and the tests read single files of it
$(READY_BENCH): $(READY)
	$(PIP_INSTALL) -e '.[train,dev,bench]'
	$(PIP_INSTALL) --no-deps torchtune
	@touch $@

$(READY_DIST): $(READY)
	$(PIP_INSTALL) build twine
	@touch $@
