# Two commands on a fresh machine: `make sweep` and `make test`. Both set up .venv first, once.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: help sweep test lock schema

help:
	@echo "make sweep   run specs/digits.yaml, from nothing to the picture"
	@echo "make test    linters, type checks and every test"
	@echo "make lock    resolve requirements.lock anew (needs uv)"
	@echo "make schema  write specs/schema.json anew"

sweep: $(INSTALLED)
	$(BIN)/dp-sweeps run specs/digits.yaml

test: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -rs --durations=15

lock:
	uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 \
	  --no-emit-index-url --no-header --no-annotate --generate-hashes -o requirements.lock

schema: $(INSTALLED)
	$(BIN)/dp-sweeps schema > specs/schema.json

$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "dp-sweeps needs Python 3.11 or newer; name one: make PYTHON=python3.12 sweep"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --no-deps --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --no-deps --no-build-isolation --editable .
	@touch $(INSTALLED)
