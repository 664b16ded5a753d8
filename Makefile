# `make help` lists the targets. Variables that may be set on the command line:
#   PYTHON       the interpreter that makes the virtual environment (default python3)
#   TORCH_INDEX  the package index that torch comes from: give the CPU index that PyTorch's install page shows, and
#                the download has no CUDA libraries. Empty: pip's own choice.
PYTHON ?= python3
TORCH_INDEX ?=

VENV := .venv
BIN := $(VENV)/bin
# Modules are compiled when first imported: compiling all that is installed takes a minute, and most is never used.
# So what is compiled must be kept, or every process would do it again.
unexport PYTHONDONTWRITEBYTECODE
PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-compile
DEMO_DATA := data/sotu
DEMO_RUN := runs/demo
DEMO_EXPORT := exports/demo

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help pretrain test test-slow test-all check format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s  %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

pretrain: $(DEMO_EXPORT)/.done  ## pre-train, evaluate and export a small sparse BERT on real text; a second call skips what is done
	@cat $(DEMO_RUN)/evaluation.txt
	@echo "data        $(DEMO_DATA)"
	@echo "run         $(DEMO_RUN) (metrics.jsonl, masks.jsonl, checkpoints/)"
	@echo "evaluation  $(DEMO_RUN)/evaluation.txt"
	@echo "export      $(DEMO_EXPORT) (transformers.BertForPreTraining.from_pretrained)"
	@echo "again       rm -r $(DEMO_RUN) $(DEMO_EXPORT) && make pretrain"

test: $(VENV)/.dev  ## run the tests, two files at a time
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(VENV)/.dev  ## run the slower guards, which continuous integration runs after the tests
	$(BIN)/python -m pytest -m "slow and not exhaustive" --durations=20

test-all: $(VENV)/.dev  ## run the tests and the exhaustive matrix (long)
	$(BIN)/python -m pytest -m ""

check: $(VENV)/.dev  ## check format, lint, types and shell scripts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/shellcheck --external-sources slurm/*.sbatch slurm/*.sh

format: $(VENV)/.dev  ## format the code and mend what the linter can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove the virtual environment, builds and caches; data, runs and exports stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find dsbert tests tools -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# Each stamp below is written last, so an interrupted step is done again. A stamp lies inside what it stands for, so
# removing a directory by hand removes its stamp. What a run needs is order-only (after the bar): a newer environment
# is no reason to train anew.

$(VENV)/.train: requirements.txt setup.py
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make virtual environments: apt-get install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "installing what training needs into $(VENV): about a minute where the network is fast"
	$(if $(TORCH_INDEX),$(PIP_INSTALL) --index-url "$(TORCH_INDEX)" "$$(grep '^torch==' requirements.txt)")
	$(PIP_INSTALL) -r requirements.txt
	$(PIP_INSTALL) --no-build-isolation --no-deps --editable .
	@touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.train
	@echo "installing what the tests and linters need"
	$(PIP_INSTALL) -r requirements-dev.txt
	@touch $@

$(DEMO_DATA)/.done: | $(VENV)/.train
	$(BIN)/dsbert prepare --source sotu --to $(DEMO_DATA) --vocab-size 2048
	@touch $@

$(DEMO_RUN)/.done: | $(DEMO_DATA)/.done
	$(BIN)/dsbert pretrain demo --nproc 2 --run-dir $(DEMO_RUN)
	@touch $@

# Shown by `pretrain` itself, on a first and on a later call.
$(DEMO_RUN)/evaluation.txt: $(DEMO_RUN)/.done
	$(BIN)/dsbert evaluate $(DEMO_RUN) > $@

$(DEMO_EXPORT)/.done: $(DEMO_RUN)/evaluation.txt
	$(BIN)/dsbert export $(DEMO_RUN) --to $(DEMO_EXPORT)
	@touch $@
