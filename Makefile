# Each target works from nothing but Python 3.11 or newer with venv: it makes .venv and installs what constraints.txt pins.
#
#   make demo     a question about a picture, answered by the model inside the package
#   make test     the default test suite, in two processes (WORKERS=0: in this one)
#   make test-browser   the playground in Chromium (installed by .ci/run where it may)
#   make check    formatting, lint, types, and who may import whom
#   make test-distributed    the tests that start several processes, on loopback
#   make test-slow    the tests that take minutes: long random traffic, whole contexts, hours of video (4 GB of memory and disk);
#                     then the tests over drawn examples with new ones, which `make test` never draws
#
# PIP_ARGS is handed to pip, e.g. PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu" for the small CPU torch.

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
WORKERS ?= 2
DEMO_PICTURE ?= examples/sign.png
DEMO_QUESTION ?= What does the sign say?
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# By a path, and not by a hook of imports, so that type checkers see the package from scripts elsewhere too.
EDITABLE := --config-settings editable_mode=compat

.PHONY: demo test test-browser test-distributed test-slow check format clean

demo: $(STAMP)
	@echo "picture   $(DEMO_PICTURE)"
	@echo "question  $(DEMO_QUESTION)"
	@printf "answer    "
	@$(BIN)/mirada ask $(DEMO_PICTURE) "$(DEMO_QUESTION)"

test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=15 $(PYTEST_ARGS)

test-distributed: $(STAMP)
	$(BIN)/python -m pytest -m distributed --durations=5 $(PYTEST_ARGS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow --durations=15 $(PYTEST_ARGS)
	$(BIN)/python -m pytest -m "hypothesis and not (gpu or slow or browser or distributed)" --hypothesis-profile=random $(PYTEST_ARGS)

test-browser: $(STAMP)
	$(BIN)/python -m pytest -m browser tests/serve/browser $(PYTEST_ARGS)

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(STAMP): pyproject.toml constraints.txt $(wildcard mirada/layers/kernels/*.[ch])
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Mirada needs Python 3.11 or newer; try: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) $(EDITABLE) -c constraints.txt -e ".[dev,train]"
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis *.egg-info
