# `make help` lists the targets. Each of them works on a fresh clone: what is missing is installed into .venv first.

SHELL := /bin/bash
VENV := .venv
TORCH := 2.13.0
PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
NIGHTLY := .venv-nightly/bin/python
# Files of tests are shared between two processes: half of the suite plans, on one core, while the other runs jobs.
PYTEST := $(PYTHON) -m pytest -q --numprocesses 2 --dist loadfile
WHEELS := build/gpu-wheels
# PyTorch's images have the others; `make gpu-check` takes what is there.
CARRIED := keras==3.15.1 keras-hub==0.32.0 optree namex
GPU_OPTIONS :=

NIGHTLY_TESTS := tests/test_parity.py tests/regions/test_collectives.py tests/training/test_contract.py \
	tests/keras_distribution/test_keras_distribution.py tests/keras_distribution/test_model_parallel.py \
	tests/keras_distribution/test_distributed_fit.py tests/storage/test_persistence.py \
	tests/training/test_vocabulary.py tests/training/test_whole_steps.py tests/training/test_replica_losses.py \
	tests/training/test_updates.py tests/replay/test_automatic.py tests/checkpoints/test_resuming.py

export KERAS_BACKEND := torch

.DEFAULT_GOAL := help
.PHONY: help setup test test-torch check demo selftest sweep bench bench-gpu gpu-wheels gpu-check picture jax-parity \
	vs-keras-nightly keras-nightly-tests keras-distribution-tests clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 32

setup: $(INSTALLED) ## Install everything into .venv; nothing to do where that is up to date

# torch comes first and alone, so that pip takes the build that is at hand. KerasHub asks for TensorFlow, which
# nothing here needs, so it comes without its dependencies; those it imports on torch follow.
$(INSTALLED): pyproject.toml
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check torch==$(TORCH)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --editable '.[dev,bench]'
	$(PYTHON) -m pip install --quiet --disable-pip-version-check keras==3.15.1
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps keras-hub==0.32.0
	$(PYTHON) -m pip install --quiet --disable-pip-version-check regex grain kagglehub tokenizers sentencepiece safetensors
	touch $@

test: $(INSTALLED) ## Run the tests
	$(PYTEST)

test-torch: ## Run the tests under another torch, in an environment of its own: make test-torch VERSION=2.15.0
	@test -n "$(VERSION)" || { echo "which torch? make test-torch VERSION=2.15.0"; exit 2; }
	$(MAKE) VENV=.venv-torch-$(VERSION) TORCH=$(VERSION) test

check: $(INSTALLED) ## Run the linter, the formatter's check, the type checker and the tests
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(PYTEST)

demo: $(INSTALLED) ## Train a small GPT on two processes and compare it with one
	$(PYTHON) -m tp_planner.demo

selftest: $(INSTALLED) ## Check keras.distribution on this machine: one process and two against a single device
	$(PYTHON) -m tp_planner.cli selftest

sweep: $(INSTALLED) ## Run the slow tests: every layer and every family, on 2 and on 4 processes
	$(PYTEST) -m slow
	$(PYTHON) benchmarks/sweep_layers.py

bench: $(INSTALLED) ## Run all benchmarks and write their results page, in about ten minutes
	$(PYTHON) benchmarks/bench.py

bench-gpu: $(INSTALLED) ## Compare with hand-written torch code on one NVIDIA GPU; says so where there is none
	$(PYTHON) benchmarks/gpu.py --only rank-of-1,rank-of-8,rank-of-2,rank-of-4

gpu-wheels: ## Download what a machine with a GPU, torch and Python 3.12 may lack, into build/gpu-wheels
	rm -rf $(WHEELS)
	python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
		--implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
		--platform manylinux2014_x86_64 --dest $(WHEELS) $(CARRIED)
	ls -l --block-size=KiB $(WHEELS)

gpu-check: ## Run everything that one NVIDIA GPU can tell, in under 9 minutes; nothing is installed but carried wheels
	@if ls $(WHEELS)/*.whl >/dev/null 2>&1; then python3 -m pip install --quiet --disable-pip-version-check --no-index \
		--no-deps --upgrade --target build/gpu-packages $(WHEELS)/*.whl; fi
	PYTHONPATH=$(CURDIR)/build/gpu-packages:$(CURDIR) python3 benchmarks/gpu.py $(GPU_OPTIONS)

picture: $(INSTALLED) ## Take README's picture of a plan's page; needs Chromium and its driver
	$(PYTHON) docs/picture.py

jax-parity: $(INSTALLED) ## Train one script on JAX and on torch and compare; skipped without JAX in .venv-jax
	$(PYTHON) benchmarks/jax_parity.py

vs-keras-nightly: $(INSTALLED) ## Time training steps against Keras nightly's ModelParallel; skipped without it in .venv-nightly
	$(PYTHON) benchmarks/vs_keras_nightly.py

keras-nightly-tests: ## Run tests under Keras nightly; skipped without it in .venv-nightly, see vs-keras-nightly
	@if test -x $(NIGHTLY); then $(NIGHTLY) -m pytest -q $(NIGHTLY_TESTS); \
	else echo "skipped: there is no Keras nightly in .venv-nightly; make vs-keras-nightly says how to install it"; fi

keras-distribution-tests: $(INSTALLED) ## Run Keras's own tests of keras.distribution against this library
	$(PYTHON) benchmarks/keras_distribution_tests.py

clean: ## Remove what tools have written, except .venv
	rm -rf dist build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
