# Two commands do it all: `make run` and `make test`. Nothing but Python 3.11 or newer is needed.

PYTHON ?= python3
VENV ?= .venv
HOST ?= 127.0.0.1
PORT ?= 8000

BIN = $(VENV)/bin
CONSTRAINTS = .ci/constraints.txt
PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS)

.PHONY: help install run test check docs constraints clean
help:
	@echo "make run      install what is needed, migrate, and serve on http://$(HOST):$(PORT)"
	@echo "make test     install what is needed and run the tests"
	@echo "make check    lint, types, and that migrations and templates are in order"
	@echo "make install  install only (with PostgreSQL and Redis drivers)"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(BIN)/python pyproject.toml $(CONSTRAINTS)
	$(PIP_INSTALL) -e '.[postgres,redis]'
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP_INSTALL) -e '.[dev]'
	@touch $@

install: $(VENV)/installed

run: $(VENV)/installed
	@exec $(BIN)/python manage.py gateway --host $(HOST) --port $(PORT)

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n auto --dist worksteal $(PYTEST_ARGS)

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/djlint --lint --quiet templates
	$(BIN)/python manage.py makemigrations --check --dry-run
	$(BIN)/python manage.py check

# The tables of docs/protocol.md, anew from the code.
docs: $(VENV)/installed
	$(BIN)/python -m wake.gateway.reference

# The newest versions that the ranges in pyproject.toml allow, as the new constraints.
constraints:
	rm -rf build/constraints && $(PYTHON) -m venv build/constraints
	build/constraints/bin/python -m pip install --quiet -e '.[dev]'
	(head -2 $(CONSTRAINTS); build/constraints/bin/python -m pip freeze --exclude-editable) > build/constraints.txt
	mv build/constraints.txt $(CONSTRAINTS)

clean:
	rm -rf $(VENV) *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis test*.sqlite3*
