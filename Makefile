# `make quickstart` and `make test` need Python >= 3.11 and nothing else.
PYTHON ?= python3
BIN := .venv/bin
CACHED := .venv/.installed

.PHONY: quickstart test test-slow lint docs clean

$(CACHED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

quickstart: $(CACHED)  ## compare three objectives on the embedded model
	$(BIN)/rlkl compare configs/compare/quickstart.yaml --overwrite

test: $(CACHED)  ## the whole suite, two workers, no network
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-slow: $(CACHED)  ## the claims that take minutes
	$(BIN)/python -m pytest -m slow

lint: $(CACHED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(CACHED)  ## the pages that are written from the code
	$(BIN)/python -m rlkl.reference > docs/config.md
	$(BIN)/python -m rlkl.metrics > docs/metrics.md

clean:
	rm -rf .venv build dist *.egg-info runs
