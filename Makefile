# Each target sets up what it needs in .venv, once. To use an interpreter that has everything already, and to
# install nothing: make demo PYTHON=/path/to/python. Another interpreter for .venv: make demo BASE_PYTHON=python3.12
BASE_PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
EXTRAS := demo,test

SOURCES := setup.py pyproject.toml constraints.txt $(shell find csrc -type f -name '[!.]*')
LINT := pre-commit==4.7.0

# only a PYTHON from the command line counts: one in the environment was hardly meant for us
ifeq ($(origin PYTHON),command line)
READY :=
else
PYTHON := $(VENV)/bin/python
READY := $(STAMP)
endif

.DEFAULT_GOAL := help
.PHONY: help demo test test-all compatibility bench info native lint format clean

help:
	@echo "make demo    the main job on real pictures and text: checks, a table, a picture in out/"
	@echo "make test    the tests, without those that take long"
	@echo "make test-all  all tests, and those of the integrations on older releases of transformers, in environments of their own"
	@echo "make compatibility  docs/compatibility.md, from three releases of transformers: some ten minutes"
	@echo "make bench   all benchmarks, about an hour, written to benchmarks/results/;  make bench ARGS=--quick: some minutes"
	@echo "make info    versions, and every backend with the reason why it is or is not there"
	@echo "make native  compile csrc/ again in place, only what changed"
	@echo "make lint    ruff, clang-format and the project's own patterns, on all tracked files; make format mends"
	@echo "make clean   remove what a build leaves;  rm -r .venv removes the environment"

demo: $(READY)
	@$(PYTHON) -m examples.demo $(ARGS)

# a file stays in one process, since what its tests share is made once; conftest.py puts those first that take long
XDIST = from importlib.metadata import version; assert tuple(map(int, version("pytest-xdist").split(".")[:2])) >= (3, 7)
PARALLEL = $$($(PYTHON) -c '$(XDIST)' 2>/dev/null && echo --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder)

test: $(READY)
	@$(PYTHON) -m pytest $(PARALLEL) $(ARGS)

# releases of transformers beside the one of constraints.txt. Their environments have what the tests need, and see vlm_fuse here
TRANSFORMERS := 5.24 5.17 4.57
OF_TRANSFORMERS = tests/test_transformers_patch.py $(wildcard tests/test_patched_*.py tests/test_packed_*.py tests/test_attend_of_config.py)

test-all: $(READY) $(TRANSFORMERS:%=.venv-transformers-%/.installed)
	@$(PYTHON) -m pytest $(PARALLEL) --full $(ARGS)
	@for release in $(TRANSFORMERS); do \
		echo "transformers $$release"; \
		PYTHONPATH=$(CURDIR) .venv-transformers-$$release/bin/python -m pytest $(PARALLEL) --full $(OF_TRANSFORMERS) $(ARGS) || exit 1; \
	done

.venv-transformers-%/.installed: constraints.txt
	$(BASE_PYTHON) -m venv $(@D)
	grep -v ^transformers== constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/python -m pip install --disable-pip-version-check --quiet --constraint $(@D)/constraints.txt torch 'transformers==$*.*' \
		accelerate peft pillow tqdm pytest 'pytest-xdist>=3.7' hypothesis numpy
	@touch $@

compatibility: $(READY) $(TRANSFORMERS:%=.venv-transformers-%/.installed)
	@for python in .venv $(TRANSFORMERS:%=.venv-transformers-%); do PYTHONPATH=$(CURDIR) $$python/bin/python -W ignore tests/compatibility.py || exit 1; done

info: $(READY)
	@$(PYTHON) -m vlm_fuse info

bench: $(READY)
	@$(PYTHON) -m benchmarks $(ARGS)

native: $(READY)
	$(PYTHON) setup.py build_ext --inplace
	@test -z "$(READY)" || touch $(STAMP)

lint: $(VENV)/.lint
	@$(VENV)/bin/pre-commit run --all-files

format: $(VENV)/.lint
	@$(VENV)/bin/pre-commit run --all-files --hook-stage manual

$(VENV)/.lint: Makefile | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --disable-pip-version-check --quiet $(LINT)
	@touch $@

$(VENV)/bin/python:
	$(BASE_PYTHON) -m venv $(VENV)

# one command, so that the constraint settles torch before anything else asks for it
$(STAMP): $(SOURCES) | $(VENV)/bin/python
	@echo "Installing into $(VENV). The first time this takes a minute or two, most of it for torch, and two more where nvcc compiles the CUDA kernels."
	$(VENV)/bin/python -m pip install --disable-pip-version-check --constraint constraints.txt torch \
		pybind11 ninja setuptools --editable '.[$(EXTRAS)]'
	@touch $@

clean:
	rm -rf build dist out vlm_fuse.egg-info vlm_fuse/_native*.so vlm_fuse/_build_info.json
