# make quickstart [TEXT=path]   prepare text, train a small model and generate from it
# make test                     run every check that CI runs
# make docs                     build the documentation into site/
# All of them install what they need, on a machine with Python >= 3.11. A C compiler makes training faster.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
LOCK := pyproject.toml constraints.txt requirements.txt

.PHONY: quickstart test fast lint lock bench docs clean

quickstart: .venv/core
	$(BIN)/llm-trainer quickstart $(if $(TEXT),--text "$(TEXT)")

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "slow or not slow" --durations=20

# The fast tests, for use during development.
fast: .venv/test
	$(BIN)/python -m pytest -n 2 --dist worksteal

# Build the documentation into site/. A broken link is an error.
docs: .venv/test
	$(BIN)/python docs/generate_reference.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Rewrite constraints.txt from the installed packages. torch is pinned without a build suffix, so that machines with GPUs get CUDA builds.
lock: .venv/test
	$(BIN)/python -m pip freeze --exclude-editable --exclude pip | sed 's/+cpu$$//' > constraints.txt

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(f"llm-trainer needs Python 3.11 or newer, this is {sys.version.split()[0]}; try: make PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv

.venv/core: $(LOCK) | .venv/bin/python
	@echo "Installing llm-trainer into .venv (once; a few minutes, most of it PyTorch) ..."
	$(PIP) -e .
	@touch $@

.venv/test: $(LOCK) | .venv/bin/python
	@echo "Installing llm-trainer and everything its tests use into .venv (once) ..."
	$(PIP) -e '.[test]'
	@touch $@ .venv/core

clean:
	rm -rf .venv .venv-peers site .pytest_cache .mypy_cache .ruff_cache
