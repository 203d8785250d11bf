# Each target makes its virtual environment first, once. To choose: PYTHON=python3.12
# VENV=.venv-3.12. TORCH= leaves torch out; the tests and benchmarks that need it skip.
PYTHON ?= $(shell for p in python3.11 python3; do \
	$$p -c "" 2>/dev/null && { echo $$p; break; }; done)
VENV ?= .venv
TORCH ?= torch==2.13.0
JOBS ?= 2
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test pytest lint types docs bench clean

help:
	@echo "make demo   fused dynamics on Hopper and fused language models, with a report: runs/demo"
	@echo "make test   lint, types, import floors, every test and the documentation"
	@echo "make lint   ruff, pyright and import-linter alone"
	@echo "make docs   the documentation: build/docs/html/index.html"
	@echo "make bench  every benchmark: runs/bench/*.json"

demo: $(VENV)/.run
	$(BIN)/python -m experiments.demo --run_dir=runs/demo

test: lint pytest

# A core per process: XLA's own threads would only compete with the other process. In the
# files' order: by numbers of tests, files of one long test would come last and alone.
# PYTEST="--cov --cov-report=term" reports coverage and takes a tenth longer.
pytest: $(VENV)/.test
	NPROC=16 XLA_FLAGS="--xla_cpu_multi_thread_eigen=false $(XLA_FLAGS)" \
		$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder \
		--durations=15 $(PYTEST)

lint: $(VENV)/.test
	$(BIN)/python .ci/tidy.py
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	@$(MAKE) --no-print-directory types

# pyright is a node program that its Python package downloads at the first call.
types: $(VENV)/.test
	@if $(BIN)/pyright --version >/dev/null 2>&1; \
	then $(BIN)/pyright --pythonpath $(BIN)/python; \
	else echo "################ TYPES NOT CHECKED: pyright could not be fetched" \
		"################"; fi

docs: $(VENV)/.docs
	$(BIN)/python docs/build.py build/docs

# The studies take data and hours of their own: see their --help.
STUDIES := $(patsubst %,benchmarks/%.py,control llm_study model_quality mcetm_control mcetm_hopper \
	offline_policies particle pusht soak_kill soak_readers)
bench: $(VENV)/.torch $(VENV)/.run
	@for script in $(filter-out $(STUDIES),$(wildcard benchmarks/[a-z]*.py)); do name=$$(basename $$script .py); \
		echo "benchmarks.$$name"; \
		$(BIN)/python -m benchmarks.$$name --output=runs/bench/$$name.json || exit 1; done

clean:
	rm -rf build .pytest_cache .ruff_cache .import_linter_cache .hypothesis

$(VENV)/.made:
	@test -n "$(PYTHON)" || { echo "no python3.11 or python3 found; set PYTHON"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@

# First and alone: dragged in by another package it comes with gigabytes of CUDA.
$(VENV)/.torch: constraints.txt | $(VENV)/.made
	@if test -n "$(TORCH)"; then \
		echo "installing $(TORCH)"; \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH) \
		|| echo "torch was not installed; what needs it will be skipped"; fi
	touch $@

$(VENV)/.run: setup.cfg pyproject.toml constraints.txt | $(VENV)/.made
	$(INSTALL) -e ".[llm]"
	touch $@

$(VENV)/.test: setup.cfg pyproject.toml constraints.txt | $(VENV)/.torch
	$(INSTALL) -e ".[test]"
	touch $@ $(VENV)/.run

$(VENV)/.docs: setup.cfg pyproject.toml constraints.txt | $(VENV)/.made
	$(INSTALL) -e ".[docs,llm]"
	touch $@ $(VENV)/.run
