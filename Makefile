# Two commands for someone new: `make demo` trains a small model, `make test` runs the tests. Each sets up .venv first.
# Paths are relative, so that a checkout may lie under a name with spaces in it.

PY := .venv/bin/python
STAMP := .venv/.installed
PIP := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test lint clean

help:
	@echo "make demo    train a small model on this machine (examples/sft.py)"
	@echo "make test    run the tests"
	@echo "make lint    check style and types (ruff, mypy)"
	@echo "make clean   remove .venv and everything built or cached"
	@echo
	@echo "Needs Python 3.11 or newer; choose one with: make PYTHON=/path/to/python3 demo"

# An environment that works is kept. Otherwise one is made with a python that starts, is new enough and has venv;
# `python3` comes first. A version manager may offer names that do not run, so each candidate is tried.
USABLE := -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))'

$(STAMP): pyproject.toml constraints.txt
	@if ! $(PY) $(USABLE) 2>/dev/null; then \
	    if [ -n "$$PYTHON" ]; then set -- "$$PYTHON"; else set -- python3 python3.13 python3.12 python3.11; fi; \
	    for python; do \
	        if "$$python" $(USABLE) 2>/dev/null; then found=$$python; break; fi; \
	    done; \
	    if [ -z "$$found" ]; then \
	        echo "make: found no Python >= 3.11 with its venv module (tried: $$*)" >&2; \
	        echo "      install one, or name one: make PYTHON=/path/to/python3" >&2; \
	        exit 1; \
	    fi; \
	    echo "Setting up .venv with $$("$$found" --version): a few minutes, once ..."; \
	    "$$found" -m venv --clear .venv; \
	fi
	@$(PIP) torch setuptools
	@$(PIP) --no-build-isolation -e '.[dev]'
	@touch $(STAMP)

demo: $(STAMP)
	@$(PY) examples/sft.py

# One thread: faster for small tensors, and a sum has one order.
test: $(STAMP)
	@OMP_NUM_THREADS=1 $(PY) -m pytest

# models/ is imported as fstep_models; the link lets mypy follow that name (mypy_path in pyproject.toml).
lint: $(STAMP)
	@mkdir -p .venv/typing && ln -sfn ../../models .venv/typing/fstep_models
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
