# `make demo` and `make test` need Python 3.11+, gcc and make; each makes what it needs in .venv.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: demo test lint docs figures clean

demo: .venv/demo
	$(BIN)/crosslight compare

test: .venv/test
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/test
	$(BIN)/mkdocs build --strict

# The tables of docs/performance.md; about an hour and a half, and wants a quiet machine.
figures: .venv/test
	$(BIN)/crosslight bench --figures
	$(BIN)/crosslight bench --public
	$(BIN)/crosslight bench --table

clean:
	rm -rf .venv site

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) --editable '.[compare,report]'
	touch $@

.venv/test: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) --editable '.[compare,report,models,docs,test,dev]'
	touch $@ .venv/demo
