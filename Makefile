# `make help` lists the targets. demo and test install what they need into .venv, once.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: help install demo test test-slow test-reliability test-browser lint type format docs build clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 12

install: $(STAMP)  ## .venv with the package and the tools to develop it

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $(STAMP)

demo: $(STAMP)  ## pretrain on real photographs, then k-NN and linear probe (minutes)
	$(BIN)/ssl-xcit pretrain name=demo

test: $(STAMP)  ## all tests but the slow ones, a process of one thread for each core
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile \
	  -m 'not slow and not reliability and not browser'

test-slow: $(STAMP)  ## the slow ones: the wheel installed elsewhere, the demo's numbers, a compiled run
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m slow

test-reliability: $(STAMP)  ## runs killed, filled and hung in every way (docs/reliability.md)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile tests/reliability \
	  --junitxml=benchmarks/results/reliability.xml

test-browser: $(STAMP)  ## the pages in headless Chromium (Debian: chromium, chromium-driver)
	$(BIN)/python -m pytest -m browser

lint: $(STAMP)  ## ruff, rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(STAMP)  ## mypy
	$(BIN)/mypy ssl_xcit eval

format: $(STAMP)  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)  ## the site, build/site/overview.html; a warning or a dead link is an error
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

build: $(STAMP)  ## sdist and wheel in dist/, checked
	rm -rf build dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m twine check --strict dist/*

clean:  ## remove what was built; runs and .venv stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
