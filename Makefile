# `make` alone lists what there is. The first target that needs it makes a virtual environment.
PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
# Processes that the tests run in.
JOBS   ?= $(shell $(PYTHON) -c 'import os; print(min(os.cpu_count() or 1, 8))')

BIN   := $(VENV)/bin
# Newer than what it depends on = installed; makes every later call immediate.
STAMP := $(VENV)/.installed
DOCS  := $(VENV)/.docs

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-fast lint docs clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 18
	@echo '  Variables: PYTHON=$(PYTHON) VENV=$(VENV) JOBS=$(JOBS) ARGS="..." (for demo, test and test-fast)'

setup: $(STAMP) ## make the virtual environment and install everything into it
	@echo '$(VENV) is ready; use it with: . $(BIN)/activate'

demo: $(STAMP) ## run the demo
	TORCH_CPP_LOG_LEVEL=ERROR $(BIN)/python -W ignore tools/demo.py $(ARGS)

test: $(STAMP) ## run the tests
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

test-fast: $(STAMP) ## run the tests that are not marked slow
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m 'not slow' $(ARGS)

lint: $(STAMP) ## check style and formatting with ruff
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

docs: $(DOCS) ## build the documentation in build/site and check its links
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build
	@echo 'Open build/site/index.html'

clean: ## remove caches and build products, but no environment, data or results
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . -path './$(VENV)' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): setup.py tools/install.py | $(BIN)/python
	$(BIN)/python tools/install.py --extras demo,test
	@touch $@

$(DOCS): setup.py | $(STAMP)
	$(BIN)/python tools/install.py --extras demo,test,docs
	@touch $@

# Checked before anything is made, so that a wrong Python leaves no half environment behind.
$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo >&2 \
	  'There is no $(PYTHON) here; name another, for instance: make setup PYTHON=python3.11'; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' || { echo >&2 \
	  'Python 3.10, 3.11 or 3.12 is needed; name one, for instance: make setup PYTHON=python3.11'; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo >&2 \
	  '$(PYTHON) cannot make virtual environments; on Debian and Ubuntu: sudo apt install python3-venv'; exit 1; }
	$(PYTHON) -m venv $(VENV)
