# `make demo` and `make test` need only Python 3.11 or later, make, and a package index pip can reach.
# Everything is installed into .venv, from a lock with hashes, once for each change of the lock.
# Override: PYTHON=python3.12 (which interpreter), VENV=... (where), JOBS=... (test processes).

PYTHON ?= python3
VENV ?= .venv
JOBS ?= auto
# Arguments added to pytest's, e.g. PYTEST_ARGS="-m 'not slow' tests/test_nuts.py"
PYTEST_ARGS ?=

DEMO_LOCK := requirements/demo.txt
TEST_LOCK ?= requirements/test.txt
DEV_LOCK := requirements/dev.txt

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input --quiet
LINT_PATHS := weft ppl inference models tests examples benchmarks docs/tools .ci conftest.py

.DEFAULT_GOAL := help
.PHONY: help demo test lint format docs notebooks wheel bench lanes lock clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.demo  ## two posteriors on real data, by three methods, beside the exact values
	$(BIN)/python examples/demo.py

test: $(VENV)/.test  ## all tests and the examples in docstrings
	$(BIN)/python -m pytest -n $(JOBS) --maxprocesses 4 --dist worksteal $(PYTEST_ARGS)

lint: $(VENV)/.dev build/tree  ## ruff and pyright
	$(BIN)/ruff check $(LINT_PATHS)
	$(BIN)/ruff format --check $(LINT_PATHS)
	$(BIN)/basedpyright

format: $(VENV)/.dev  ## let ruff reformat and mend what it can
	$(BIN)/ruff check --fix $(LINT_PATHS)
	$(BIN)/ruff format $(LINT_PATHS)

docs: $(VENV)/.dev build/tree  ## the documentation, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	$(BIN)/python .ci/check_reference.py

notebooks: $(VENV)/.test  ## run every example headless and at a small size
	@printf '%s\n' examples/*.py | WEFT_FAST=1 MPLBACKEND=Agg xargs -P 2 -I{} sh -c \
	  'out=$$($(BIN)/python {} 2>&1); code=$$?; echo "== {}"; echo "$$out"; exit $$code'

wheel: $(VENV)/.test  ## build a wheel into dist/ and check what it holds
	@rm -rf dist build/lib build/bdist.*
	@$(PIP) wheel --no-deps --no-build-isolation --wheel-dir dist .
	$(BIN)/python .ci/check_wheel.py dist/weft-*.whl

bench: $(VENV)/.test  ## accuracy against references; cost against hand-written JAX and NumPyro
	$(BIN)/python benchmarks/costs.py --times 9
	$(BIN)/python benchmarks/nuts.py
	$(BIN)/python benchmarks/marginals.py --times 5
	$(BIN)/python benchmarks/gaussians.py --times 3
	$(BIN)/python benchmarks/variational.py
	$(BIN)/python benchmarks/peers.py
	$(BIN)/python benchmarks/air.py
	$(BIN)/python benchmarks/filters.py --times 7 --growth
	$(BIN)/python benchmarks/posteriors.py

lanes:  ## the tests on every supported line of Python and JAX found on this machine
	bash .ci/lanes

lock:  ## write the lock files anew (needs uv)
	bash requirements/lock.sh

clean:  ## remove environments, caches and whatever was built
	rm -rf .venv .lanes build dist site out *.egg-info .pytest_cache .ruff_cache .jax_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- set-up: each environment is the one before it and more, and is stamped by an empty file ---

$(VENV)/.venv:
	@bash requirements/check_python.sh "$(PYTHON)"
	@echo "Creating $(VENV) with $$($(PYTHON) --version 2>&1)"
	@rm -rf $(VENV) && $(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.demo: $(DEMO_LOCK) pyproject.toml | $(VENV)/.venv
	$(call install,$(DEMO_LOCK))

$(VENV)/.test: $(TEST_LOCK) pyproject.toml | $(VENV)/.venv
	$(call install,$(TEST_LOCK))

$(VENV)/.dev: $(DEV_LOCK) pyproject.toml | $(VENV)/.venv
	$(call install,$(DEV_LOCK))

define install
@echo "Installing $(1) into $(VENV) (once, one to three minutes)"
@$(PIP) install --require-hashes -r $(1)
@$(PIP) install --no-deps --no-build-isolation -e .
@touch $@
endef

# The package as it looks once installed, for tools that read files and know no package-dir mapping.
build/tree: Makefile
	@rm -rf $@ && mkdir -p $@/weft
	@ln -s ../../../weft/__init__.py ../../../weft/py.typed $@/weft/
	@ln -s ../../../ppl ../../../inference ../../../models $@/weft/
	@touch $@
