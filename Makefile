# Every target sets up what it needs: a virtual environment in .venv, installed from constraints.txt.
#
#   PYTHON=python3.12   the interpreter that makes .venv
#   ARGS="..."          extra arguments for kdfast demo, pytest or the fuzzer
#
# Without a GPU, pip may be pointed at PyTorch's CPU wheels through PIP_EXTRA_INDEX_URL, a much smaller download.

PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
READY_BENCH := $(VENV)/.ready-bench
READY_DIST := $(VENV)/.ready-dist
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo quick test test-all test-long fuzz aot lint types check bench recipes peers api dist package clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

demo: $(READY)  ## a real distillation on this machine: text, tokenizer, teacher, six students, one table
	$(BIN)/kdfast demo $(ARGS)

# Tests that start processes lie in tests/system; others that take long are marked slow. What tries at random for minutes
# is marked long: worth a night, and no part of test-all.
quick: $(READY)  ## every divergence, teacher and engine once: seconds
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/quick tests/loss/test_divergences.py $(ARGS)

# Triton's interpreter is one thread of Python: two workers of one thread each use two cores
PYTEST_ON_TWO_CORES := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test: $(READY)  ## the tests, but for those that start processes or take long: six minutes on two cores
	$(PYTEST_ON_TWO_CORES) --ignore tests/system -m "not slow and not long" $(ARGS)

test-all: $(READY)  ## every test but the random ones of test-long, what CI runs: twenty minutes on two cores
	$(PYTEST_ON_TWO_CORES) $(ARGS)

test-long: $(READY)  ## not in test-all: thousands of random problems, minutes of fuzzing and of random kills, every row of aot
	$(BIN)/python -m pytest -m long $(ARGS)

# PYTHONPATH: tests/ has what the tests share
fuzz: $(READY)  ## random right, wrong and damaged arguments, configs, checkpoints and caches: a minute of each kind, or ARGS
	PYTHONPATH=.:tests:tests/helpers $(BIN)/python -m fuzz $(ARGS)

aot: $(READY)  ## every kernel compiled for seven GPUs without one: registers, spills, shared memory, tensor cores
	PYTHONPATH=. $(BIN)/python tests/kernels/aot.py $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/mypy

check: lint types test  ## lint, types and tests

# some benchmarks print their tables (-s), and the peers' warnings are theirs
bench: $(READY_BENCH)  ## throughput and memory against the peers, over an hour on two cores; then tables and a picture
	$(BIN)/python -m pytest bench -s -W default $(ARGS)
	$(BIN)/python bench/report.py

recipes: $(READY)  ## the experiment that decides the default recipe: hours on two cores; goes on where it stopped
	$(BIN)/python bench/recipes/experiment.py $(ARGS)
	$(BIN)/python bench/recipes/results.py

peers: $(READY_BENCH)  ## our losses against TRL's, Liger's, torchtune's and fla's
	$(BIN)/python -m pytest tests/peers $(ARGS)

api: $(READY)  ## pages of every public name, from the docstrings, into build/api/
	PYTHONPATH=. $(BIN)/python docs/build_api.py

# the wheel is made from the source distribution, so neither old build products nor an old list of files gets into it
dist: $(READY_DIST)  ## wheel and source distribution, into dist/
	rm -rf dist kdfast.egg-info
	$(BIN)/python -m build

package: dist  ## what is in them, and the wheel installed and used as users do, with and without triton: minutes
	$(BIN)/python tests/system/package/install.py

clean:  ## remove .venv, build products and caches, not the results of runs
	rm -rf $(VENV) build/api build/lib build/bdist.* dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): setup.py constraints.txt kdfast/_version.py
	@echo "Setting up $(VENV): a few minutes, once."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "kdfast needs Python 3.10 or newer; name one: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) -e '.[train,dev]'
	@touch $@

# torchtune is a file to look at here: what it imports as a package is of other versions than ours
$(READY_BENCH): $(READY)
	$(PIP_INSTALL) -e '.[train,dev,bench]'
	$(PIP_INSTALL) --no-deps torchtune
	@touch $@

$(READY_DIST): $(READY)
	$(PIP_INSTALL) build twine
	@touch $@
