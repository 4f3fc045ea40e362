# Two commands need nothing but Python 3.11 or newer: `make serve` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

# Tests that start processes of their own or look at the clock have the machine to themselves; all others run two at a time.
ALONE := tests/cluster tests/distributed tests/verify

.PHONY: serve test test-long simulate test-head chaos soak lint env buf clean

serve: env  ## a cluster on this machine, serving the bundled demo model over gRPC
	$(BIN)/moestro serve $(ARGS)

test: env lint  ## everything that must hold; no GPU, no network
ifeq ($(strip $(ARGS)),)
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses 2 --dist worksteal $(ALONE:%=--ignore=%)
	$(BIN)/python -m pytest --durations=15 $(ALONE)
else
	$(BIN)/python -m pytest $(ARGS)
endif

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-long: env  ## what takes minutes: a cluster that is shrunk, replaced and grown under load, stragglers, more epochs
	$(BIN)/python -m pytest -m long --ignore=tests/cluster/test_head_loss.py $(ARGS)

simulate: env  ## ten thousand seeds of a simulated cluster; one that fails is replayed by --seed N --trace
	$(BIN)/python -m moestro.cluster.simulation --seeds 10000 $(ARGS)

test-head: env  ## Ray's head is lost and replaced; needs redis-server (Debian: apt-get install redis-server)
	$(BIN)/python -m pytest -m long tests/cluster/test_head_loss.py $(ARGS)

chaos: env  ## faults from a seed under load, every answer compared; ARGS="--seed 1 --minutes 5"
	$(BIN)/python -m benchmarks.chaos $(ARGS)

soak: env  ## an hour of load with faults: nothing may grow; ARGS="--minutes 30"
	$(BIN)/python -m benchmarks.chaos.soak $(ARGS)

buf:  ## lint the protos and look for changes that break clients of the last release (needs node)
	bash protos/check.sh

env: $(VENV)/.ready

# The C++ modules are compiled here so that the first start need not wait; without a compiler plain torch serves.
# torch first and pinned: with the CPU build present nothing else pulls CUDA packages.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m moestro.kernels.cpu.build
	$(BIN)/python -m moestro.router.native.build
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
