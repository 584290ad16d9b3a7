# `make demo` and `make test` need nothing but Python 3.11 or newer: they make .venv and install into it, once.

PYTHON ?= python3
VENV ?= .venv
# for example PYTEST_ARGS="-n auto -k clean"; one process unless asked, numba's cache on disk is not made for several
PYTEST_ARGS ?=
BENCH_ARGS ?=

BIN := $(VENV)/bin
# only errors are shown
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
# stamps: what is installed is as new as pyproject.toml
RUN := $(VENV)/.installed
DEV := $(VENV)/.installed-dev

.PHONY: help demo test check bench docs clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-6s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(RUN) ## quantize a small trained model and show what that changed
	@$(BIN)/python examples/digits/demo.py

test: $(DEV) ## run the tests; those on real models run where ONNXQ_ZOO names the zoo's folder
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(DEV) ## format, lint, types, import contract, tests
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# for example BENCH_ARGS="--only latency"
bench: $(DEV) ## run the scripts of benchmarks/ and write docs/benchmarks.md; most need ONNXQ_ZOO
	@$(BIN)/python benchmarks/run.py $(BENCH_ARGS)

docs: $(RUN) ## write docs/cli.md, passes.md and targets.md from the code
	@$(BIN)/python docs/generate.py

clean: ## remove what builds and runs leave behind; .venv stays
	rm -rf build dist *.egg-info .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find onnxq passes kernels tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} +

$(RUN): pyproject.toml | $(BIN)/python
	@echo "installing onnxq into $(VENV) (once)"
	@$(PIP) --editable .
	@touch $@

$(DEV): pyproject.toml | $(BIN)/python
	@echo "installing onnxq and its development tools into $(VENV) (once)"
	@$(PIP) --editable ".[dev]"
	@touch $(RUN) $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "onnxq needs Python 3.11 or newer, which \`$(PYTHON)\` is not: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -f $@; exit 1; } # or a half-made one would pass for whole
