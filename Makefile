# make demo and make test are all it takes; both rest on make setup, which does nothing when nothing changed.
PYTHON ?= python3
# The CPU build of torch is pinned here, so that a plain dependency never pulls gigabytes of another one.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test check docs mutate clean
setup: $(STAMP)

$(STAMP): pyproject.toml Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test,dev]'
	touch $(STAMP)

demo: setup
	$(BIN)/trimtab demo --out trimtab-demo --force

test: setup
	$(BIN)/python -m pytest

check: setup
	$(BIN)/python tools/generate.py check
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: setup
	$(BIN)/python tools/generate.py write

# Plants bugs in a copy and checks that the tests see each of them; slow, run by hand.
mutate: setup
	$(BIN)/python tools/mutate.py

clean:
	rm -rf $(VENV) trimtab-demo build
