# make setup   everything in .venv: a CPU build of torch where there is no NVIDIA GPU, then the package and its kernels
# make demo    every step on the built-in model
# make test    pytest in as many processes as there are cores, at most 4; `make test WORKERS=1`: in one
# make test-eval  the tests that need lmms-eval, in an environment of their own that sees this one's packages
# make signing  OpenSSF model-signing in .venv-sign; the tests of docs/pipeline sign with it where it is there
# make sanitize  the kernel tests on libraries built with the address, undefined-behaviour and thread sanitizers
# make fuzz    every parser with atheris for FUZZ_SECONDS each; FUZZ names some of them only, and gives other options of
#              tests/fuzz; defects are in build/fuzz
# make lint    ruff, mypy, schemas in sync
# make schemas schemas/ from modes_cli/artifacts
# make clean   build outputs and caches; .venv, .venv-eval and run folders stay
#
# Needs Python 3.11 or newer, g++ and make. What can be set: PYTHON, VENV, TORCH (what to install), TORCH_INDEX (where
# CPU builds of torch are; empty: only pip's own indexes), PIP_EXTRA (more options for pip), WORKERS (processes of `make test`).

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
PIP_EXTRA ?=
FUZZ ?=
FUZZ_SECONDS ?= 600
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1); [ $$n -lt 4 ] && echo $$n || echo 4)

BIN := $(VENV)/bin
STAMP := $(VENV)/.setup
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_EXTRA)
# A file's tests stay together, since they share what was made for them; tests/conftest.py says which files go first.
SPREAD = --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder
EVAL_VENV ?= .venv-eval
EVAL_STAMP := $(EVAL_VENV)/.setup
EVAL_PIP := $(BIN)/python -m pip --python $(EVAL_VENV)/bin/python install --quiet --disable-pip-version-check $(PIP_EXTRA)
# What `import lmms_eval.evaluator` takes. Its other requirements are for its own models and single tasks, and torchvision,
# one of them, does not fit every torch.
EVAL_NEEDS := aiohttp evaluate loguru pytz requests sacrebleu tenacity
SIGN_VENV := .venv-sign
SIGN_STAMP := $(SIGN_VENV)/.setup
SIGN_NEEDS := model-signing==1.1.1 pyopenssl==26.4.0
SOURCES := pyproject.toml $(shell find kernels -type f -not -path 'kernels/bench/*' 2>/dev/null)

.PHONY: setup demo test test-eval signing sanitize atheris fuzz lint schemas clean

setup: $(STAMP)

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("modes needs Python 3.11 or newer, this is " + sys.version) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)

# torch first and on its own: pip would otherwise take the CUDA build, 3 GB that nothing here could use.
$(STAMP): $(SOURCES) | $(BIN)/python
	@if ! $(BIN)/python -c 'import torch' 2>/dev/null; then \
	  if command -v nvidia-smi >/dev/null 2>&1; then echo "installing $(TORCH)"; $(PIP) "$(TORCH)"; \
	  else echo "no NVIDIA GPU: installing a CPU build of $(TORCH)"; \
	    $(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) "$(TORCH)"; fi; fi
	@echo "installing modes and building its kernels"
	@$(PIP) --editable '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/modes demo

test: $(STAMP)
	$(BIN)/python -m pytest -q $(if $(filter-out 0 1,$(WORKERS)),$(SPREAD))

# pip sees .venv's packages through the .pth file and leaves them as they are.
$(EVAL_STAMP): $(STAMP)
	$(BIN)/python -m venv --clear --without-pip $(EVAL_VENV)
	@$(BIN)/python -c 'import sys; print("import site; site.addsitedir(%r)" % sys.argv[1])' \
	  "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
	  >"$$($(EVAL_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/modes-environment.pth"
	@echo "installing lmms-eval and what its evaluator imports"
	@$(EVAL_PIP) $(EVAL_NEEDS)
	@$(EVAL_PIP) --no-deps "$$(sed -n 's/^eval = \["\([^"]*\)"\]/\1/p' pyproject.toml)"
	@touch $@

test-eval: $(EVAL_STAMP)
	$(EVAL_VENV)/bin/python -m pytest -q tests/evaluation/test_lmms.py

# Apart from ours: a signer needs nothing of this package, and what signs should install little.
$(SIGN_STAMP): | $(BIN)/python
	$(BIN)/python -m venv --clear --without-pip $(SIGN_VENV)
	@$(BIN)/python -m pip --python $(SIGN_VENV)/bin/python install --quiet --disable-pip-version-check $(PIP_EXTRA) $(SIGN_NEEDS)
	@touch $@

signing: $(SIGN_STAMP)

sanitize: $(STAMP)
	$(BIN)/python -m tools.sanitize

atheris: $(STAMP)
	@$(BIN)/python -c 'import atheris' 2>/dev/null || { echo "installing atheris"; \
	  $(PIP) "$$(sed -n 's/^fuzz = \["\([^;"]*\).*/\1/p' pyproject.toml)"; }

fuzz: atheris
	$(BIN)/python -m tests.fuzz $(FUZZ) --seconds $(FUZZ_SECONDS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m tools.schemas --check

schemas: $(STAMP)
	$(BIN)/python -m tools.schemas

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis $(STAMP)
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
