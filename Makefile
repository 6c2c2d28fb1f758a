# Every task of the project. A fresh Debian or Ubuntu needs Python 3.11 or newer with venv, and make.
PYTHON ?= python3
# What jax is installed for: cpu, cuda12, cuda13 or tpu. Without it, `make install` and `make quickstart` ask the NVIDIA driver.
ifneq ($(filter install quickstart,$(MAKECMDGOALS)),)
DRIVER := $(shell nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | sed -n 's/^\([0-9]*\)\..*/\1/p;q')
endif
ACCELERATOR ?= $(if $(DRIVER),$(if $(shell test $(DRIVER) -ge 580 && echo yes),cuda13,cuda12),cpu)
$(if $(filter-out cpu cuda12 cuda13 tpu,$(ACCELERATOR)),$(error ACCELERATOR=$(ACCELERATOR) is not known: use one of cpu, cuda12, cuda13, tpu))
BIN := .venv/bin
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.jax_cache
# Finds the real image packs for tests where somebody has them; tests that need them are skipped elsewhere.
export HEXA_DATA ?=

.DEFAULT_GOAL := help
.PHONY: help install dev quickstart test test-fast test-slow lint types bench soak audit notebooks docs clean

help:  ## list the tasks
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

.venv/.installed: pyproject.toml requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -e .
	@touch $@

.venv/.installed-cpu: .venv/.installed
	@touch $@

.venv/.installed-cuda12 .venv/.installed-cuda13 .venv/.installed-tpu: .venv/.installed-%: .venv/.installed
	@echo "installing jax for $* (ACCELERATOR=cpu leaves it out)"
	$(BIN)/pip install --quiet -e '.[$*]'
	@touch $@

.venv/.installed-dev: .venv/.installed
	$(BIN)/pip install --quiet -e '.[dev]'
	@touch $@

install: .venv/.installed-$(ACCELERATOR)  ## make .venv and install the package; ACCELERATOR=cuda13, cuda12, tpu or cpu

dev: .venv/.installed-dev  ## install what the checks need, too

quickstart: .venv/.installed-$(ACCELERATOR)  ## pre-train HEXA_DCluster on generated images, evaluate, write a report: minutes on a CPU
	$(BIN)/python -m hexa_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

test: .venv/.installed-dev  ## the whole suite
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-fast: .venv/.installed-dev  ## the files that take seconds
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow and not long'

test-slow: .venv/.installed-dev  ## the tests that take many minutes (TPU compiles, and a GPU's where .[aot-gpu] is installed)
	$(BIN)/pip install --quiet --no-deps --target .cache/libtpu libtpu==0.0.42  # apart: jax would look for a TPU in every run
	PYTHONPATH=.cache/libtpu $(BIN)/python -m pytest -m slow --timeout=3600

lint: .venv/.installed-dev  ## format and lint check
	$(BIN)/ruff format --check . && $(BIN)/ruff check .

types: .venv/.installed-dev  ## type check
	$(BIN)/mypy

bench: .venv/.installed  ## speed of one training step, for each view on and off
	$(BIN)/python benchmarks/step.py --config=configs/quickstart.py

soak: .venv/.installed  ## train for an hour and watch memory, descriptors, threads and compilations
	$(BIN)/python benchmarks/soak.py --out=runs/soak-$$(date +%Y%m%d-%H%M%S)

# Not by pip-audit's own look at .venv: packages that its service does not know would pass without a word.
audit: .venv/.installed-dev  ## ask PyPI for known vulnerabilities of all that is installed in .venv
	$(PYTHON) -m venv .cache/audit && .cache/audit/bin/pip install --quiet pip-audit
	$(BIN)/pip freeze --exclude-editable | sed '/ @ /d; s/+[^=]*$$//' > .cache/audit.txt
	.cache/audit/bin/pip-audit --strict --no-deps --disable-pip --requirement=.cache/audit.txt

notebooks: .venv/.installed-dev  ## write the notebooks from their sources
	$(BIN)/jupytext --to ipynb notebooks/*.py

docs: .venv/.installed-dev  ## build the documentation in build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

clean:  ## remove runs and caches, keep .venv
	rm -rf runs .jax_cache .pytest_cache .mypy_cache .ruff_cache
