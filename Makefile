# Everything runs from a clean clone with Python 3.11+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUNS := $(VENV)/.runs
READY := $(VENV)/.ready
PEERS := $(VENV)/.peers

.PHONY: demo test check format bench chaos clean

# The package alone: enough for the demo, and quick to install.
$(RUNS): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "onceflow needs Python 3.11 or newer: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

# And what tests, checks and benchmarks need.
$(READY): $(RUNS)
	$(BIN)/python -m pip install --quiet --editable '.[all]' --group dev
	@touch $@

# And the peers, which only the benchmarks want.
$(PEERS): $(READY)
	$(BIN)/python -m pip install --quiet --group bench
	@touch $@

demo: $(RUNS)  ## index the standard library twice: all executed, then all cached
	$(BIN)/python examples/demo.py

test: $(READY)
	$(BIN)/pytest -n auto --dist worksteal

check: $(READY)  ## format, lint, types, imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(PEERS)  ## every workload against its floor and the peers, as ratios
	$(BIN)/python benchmarks/run.py

chaos: $(READY)
	$(BIN)/pytest -m chaos

clean:
	rm -rf $(VENV) .demo .pytest_cache .mypy_cache .ruff_cache dist
