# Two commands: `make demo` runs the product, `make test` proves it. Both set up what they need in .venv.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --constraint requirements.lock

.PHONY: demo test setup lint check demo-engine lock clean

demo: .venv/.run ## the whole line on this box for 20 s: no torch, no GPU, no Redis needed
	$(BIN)/dmdd demo

test: setup lint check

setup: .venv/.dev ## everything, .venv/bin/dmdd included

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: .venv/.sim
	$(BIN)/pytest -n auto --dist loadfile

demo-engine: setup ## train the demo's engine anew from the simulator
	$(BIN)/python -m train.demo_engine

lock: setup ## pin what is installed now
	$(BIN)/python -m pip freeze --exclude-editable > requirements.lock

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.run: pyproject.toml requirements.lock | .venv/bin/python
	$(PIP) --editable '.[demo,monitor]'
	touch $@

.venv/.dev: pyproject.toml requirements.lock | .venv/bin/python
	$(PIP) --editable '.[dev]'
	touch $@ .venv/.run

# The simulated CUDA driver and pycuda on it, see docs/gpu.md. Builds pycuda once, in about two minutes.
.venv/.sim: $(wildcard tests/sim/*.py tests/sim/src/*) pyproject.toml requirements.lock | .venv/.dev
	$(BIN)/python -m tests.sim.build
	touch $@
