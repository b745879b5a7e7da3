# Everything runs from .venv, made on the first use with the versions of constraints.txt.
PYTHON ?= python3
WORKERS ?= auto
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# Written last, so that an interrupted installation is repaired by the next make.
INSTALLED := $(VENV)/.installed
# Without constraints.txt: what has come out since.
LATEST := .venv-latest

.DEFAULT_GOAL := help
.PHONY: help demo test test-latest gate lease lint format clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' Makefile

demo: $(INSTALLED) ## train LeNet-5 on handwritten digits and check the kernels against the reference
	@$(BIN)/python -m models.demo

test: $(INSTALLED) ## run the tests, in WORKERS processes (default: one a core, at most 8)
	@$(BIN)/python -m pytest -n $(WORKERS) --maxprocesses=8 --dist worksteal $(PYTEST_ARGS)

test-latest: ## run the tests on the newest PyTorch, Triton, NumPy and timm, in .venv-latest (3 GB; not in CI)
	@$(LATEST)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(LATEST)
	@$(LATEST)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager \
		torch torchvision triton numpy timm -e '.[bench,demo,dev,train]'
	@$(LATEST)/bin/python -m pip list --disable-pip-version-check | grep -E '^(torch|triton|numpy|timm) '
	@$(LATEST)/bin/python -m pytest -n $(WORKERS) --maxprocesses=8 --dist worksteal $(PYTEST_ARGS)

gate: $(INSTALLED) ## compile every launch for sm_80 to sm_120 and read the machine code, no GPU needed (make test: a part)
	@$(BIN)/python -m tests.compile.gate

lease: $(INSTALLED) ## compile what a rented H200 will run and try both calls without one (bench/LEASE.md)
	@$(BIN)/python -m bench.lease

lint: $(INSTALLED) ## check style, spelling and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/codespell
	@$(BIN)/mypy

format: $(INSTALLED) ## rewrite the code in the project's style
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean: ## remove .venv, .venv-latest and what tools left behind
	rm -rf $(VENV) $(LATEST) build dist *.egg-info .cache .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "gpukern needs Python 3.10 or later, $(PYTHON) is not: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing into $(VENV); PyTorch is large, the first time takes a while ..."
	@if [ -t 1 ]; then quiet=; else quiet=--quiet; fi; \
		$(BIN)/python -m pip install $$quiet --disable-pip-version-check -c constraints.txt -e '.[bench,demo,dev,train]'
	@# The optimizers want CuPy beside a PyTorch for CUDA, and one for its version.
	@cuda=$$($(BIN)/python -c 'import torch; print((torch.version.cuda or "").split(".")[0])'); \
		if [ -n "$$cuda" ]; then \
			$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[cuda$$cuda]"; fi
	@touch $@
