# `make help` lists the targets. They make the environment .venv if it is missing or if its inputs have changed.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-slurm test-full test-matrices benchmarks gpu-bundle lint format type fresh-check clean venv

# Twice the cores of a small machine: a test that waits for time limits or other processes leaves its core to the next.
WORKERS ?= 4
ARGS ?=
# For a CUDA 12 driver: `make venv CONSTRAINTS=constraints-cu12.txt`. The environment remembers it, so that the next
# command does not undo it. To install fewer extras: `export EXTRAS=dev`.
-include .venv/choices.mk
CONSTRAINTS ?= constraints.txt
EXTRAS ?= dev,data,deepspeed,accelerate,parquet

# The first Python on the PATH that can run the pinned wheels; `make PYTHON=/path/to/python …` overrides it.
PYTHON ?= $(firstword $(foreach p,python3 python3.12 python3.11 python3.13,$(shell $(p) -c \
	'import sys, venv, ensurepip; (3, 11) <= sys.version_info < (3, 14) and print("$(p)")' 2>/dev/null)))

# The stamp's name holds a checksum of the environment's inputs and of its path: a virtual environment cannot be moved.
MADE_FROM := $(shell { cat pyproject.toml setup.py $(CONSTRAINTS); echo "$(CURDIR) $(EXTRAS)"; } | cksum | tr ' ' '-')
STAMP := .venv/.made-from-$(MADE_FROM)
RUN := .venv/bin/python -m
# Let Python keep what it compiles, as it does by default: without that, every process of the tests compiles them again.
unexport PYTHONDONTWRITEBYTECODE

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  Variables: PYTHON=python3.12, EXTRAS=dev and CONSTRAINTS=constraints-cu12.txt (environment), WORKERS=4 (tests),"
	@echo "  ARGS='…' (more arguments for the demo or pytest), FRESH=1 (demo: start over), KEEP=1 (fresh-check: keep the clone)"

demo: $(STAMP) ## Train a chain of three small CLIP models on the emoji sample and write its report
	@.venv/bin/compt demo $(if $(FRESH),--fresh) $(ARGS)

test: $(STAMP) ## Run the tests (without a GPU, the GPU tests are skipped)
	@OMP_NUM_THREADS=1 $(RUN) pytest -n $(WORKERS) --dist worksteal -m "not slow and not full and not slurm" $(ARGS)

test-slow: $(STAMP) ## Run the long tests: engines, faults, launchers, memory limits
	@OMP_NUM_THREADS=1 $(RUN) pytest -n $(WORKERS) --dist worksteal -m "slow and not full and not slurm" $(ARGS)

test-full: ## Run every test, including the complete matrices (about an hour); a missing package is an error
	@COMPT_TEST_ALL=1 $(MAKE) --no-print-directory EXTRAS=test-all test test-slow test-slurm test-matrices

test-matrices: $(STAMP)
	@OMP_NUM_THREADS=1 $(RUN) pytest -n $(WORKERS) --dist worksteal -m "full and not slurm" $(ARGS)

# Each file has a cluster of its own: most of the time, jobs wait for the schedule of Slurm.
test-slurm: $(STAMP) ## Test slurm/ on a Slurm cluster of two nodes on this machine (needs root, slurm-wlm, munge)
	@OMP_NUM_THREADS=1 $(RUN) pytest -n 2 --dist loadfile tests/slurm $(if $(COMPT_TEST_ALL),--must-run) $(ARGS)

benchmarks: $(STAMP) ## Recompute the paper's efficiency tables into benchmarks/results
	@$(RUN) benchmarks.all

gpu-bundle: $(STAMP) ## Pack wheels for a GPU machine without a network into build/gpu-bundle (docs/gpu.md)
	@$(RUN) benchmarks.gpu.bundle $(if $(GPU_PYTHON),--python $(GPU_PYTHON)) $(if $(PRESENT),--present $(PRESENT)) $(if $(DALI),--dali $(or $(filter 12 13,$(DALI)),13))

lint: $(STAMP) ## Check the style (ruff)
	@$(RUN) ruff check .
	@$(RUN) ruff format --check .

format: $(STAMP) ## Fix the style (ruff)
	@$(RUN) ruff check --fix .
	@$(RUN) ruff format .

type: $(STAMP) ## Check the types (mypy --strict)
	@$(RUN) mypy

fresh-check: ## Run venv, demo and test in a fresh clone of the last commit
	@KEEP=$(KEEP) bash .ci/fresh-check

clean: ## Remove .venv, builds and caches; keep runs/ and data/
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

venv: $(STAMP) ## Make or update the environment, and nothing else
	@$(remember)
	@echo ".venv is up to date"

define remember
printf 'CONSTRAINTS ?= %s\n' '$(CONSTRAINTS)' >.venv/choices.mk
endef

define need
{ echo "make $(or $(firstword $(MAKECMDGOALS)),help) needs $(1)" >&2; exit 1; }
endef

$(STAMP):
	@test -n "$(PYTHON)" || $(call need,python 3.11 to 3.13 with venv: run 'apt install python3 python3-venv' or name one with PYTHON=…)
	@"$(PYTHON)" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null \
		|| $(call need,python 3.11 to 3.13 with venv; $(PYTHON) is not that: run 'apt install python3-venv' or name another with PYTHON=…)
	@test -x .venv/bin/python || test "$$(df -Pk . | awk 'NR==2{print int($$4/1048576)}')" -ge 8 \
		|| $(call need,8 GB of free disk for PyTorch; only $$(df -Ph . | awk 'NR==2{print $$4}') is free here)
	@echo "setting up .venv: about 3 minutes and 5 GB, most of it PyTorch's CUDA libraries (used only with a GPU) …"
	@# Update a .venv whose Python runs and has the same version; replace any other.
	@version='import sys; print(sys.version_info[:2])'; \
		test "$$(.venv/bin/python -c "import pip; $$version" 2>/dev/null)" = "$$("$(PYTHON)" -c "$$version")" || "$(PYTHON)" -m venv --clear .venv
	@rm -f .venv/.made-from-*
	@$(remember)
	@start=$$SECONDS; if [ -t 1 ]; then quiet=; else quiet='-q --progress-bar off'; fi; \
		$(RUN) pip --log .venv/install.log --disable-pip-version-check install $$quiet \
		-c $(CONSTRAINTS) -e '.[$(EXTRAS)]' || { echo "the installation failed; see .venv/install.log" >&2; exit 1; }; \
		echo "set up .venv in $$((SECONDS - start)) s"
	@touch $@
