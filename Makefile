# One entry for everything; each target sets up what it needs in .venv. Python 3.10+, pip and make are enough.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
METHOD ?= prompt-tuning

# What others build on: what each part may use of the others is in its types.
STRICT := $(addprefix src/tunesmith/,handle runtime attach adapter.py config registry.py model.py cli data jobs estimate train)

CASES ?= startup lora_step packing speed qlora learning

.PHONY: demo test test-all test-matrix test-sample check bench docs format clean

demo: .venv/runtime.stamp
	$(BIN)/tunesmith demo --method $(METHOD)

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not timing and not matrix"
	$(BIN)/python -m pytest -m timing

# Every method on every model, which takes twice as long.
test-all: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not timing"
	$(BIN)/python -m pytest -m timing

# The oldest and the newest set of packages that are tested, each in a virtual environment of its own.
INTERNALS := tests/parity $(addprefix tests/,reach runtime handle methods bases attach merge checkpoint train test_owners.py test_tested.py)
SAMPLE ?= oldest

test-matrix: .venv-oldest/stamp .venv-newest/stamp
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n 2 -m "not timing" $(INTERNALS)
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest -n 2 -m "not timing" $(INTERNALS)

# One case of each test of them, on the set that `make test` does not run; `make test-sample SAMPLE=newest` for the other.
test-sample: .venv-$(SAMPLE)/stamp
	OMP_NUM_THREADS=1 .venv-$(SAMPLE)/bin/python -m pytest -n 2 -m "not timing" --one-of-each $(INTERNALS)

# Alone on the machine, about an hour and a half; `make bench CASES=startup` runs one case.
bench: .venv/dev.stamp
	$(PIP) --editable '.[bench]'
	for case in $(CASES); do $(BIN)/python -m benchmarks.harness $$case || exit 1; done

docs: .venv/dev.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

check: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --strict --follow-imports=silent $(STRICT)
	$(BIN)/python tools/check_layers.py

format: .venv/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch first and by its exact version: a range may fetch gigabytes of CUDA packages.
.venv/runtime.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch==2.13.0
	$(PIP) --editable '.[plot]'
	touch $@

.venv/dev.stamp: .venv/runtime.stamp
	$(PIP) --editable '.[dev]'
	touch $@

.venv-%/stamp: pyproject.toml constraints-%.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-$*.txt torch==2.13.0
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-$*.txt --editable '.[test]'
	touch $@

clean:
	rm -rf .venv .venv-oldest .venv-newest build dist src/*.egg-info .pytest_cache .ruff_cache .mypy_cache demo-out site
