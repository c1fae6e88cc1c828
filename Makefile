# Every target sets up what it needs, once per change of pyproject.toml or .ci/constraints.txt.
#   VENV=path         where the virtual environment goes
#   PYTHON=path       Python 3.11 or newer to make it from
#   TORCH_INDEX=url   an extra package index for torch, on a machine without a GPU

VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
DRIVER := $(shell command -v nvidia-smi 2>/dev/null || ls /dev/nvidiactl 2>/dev/null)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# A process for each core; torch's own threads would spin for the same cores.
SPREAD := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist worksteal
STAMP := $(VENV)/.fused-vit
OLDER := build/transformers-4.57
VLLM ?= vllm
VLLM_VENV := build/vllm

.DEFAULT_GOAL := help
.PHONY: help demo test vllm mutants fuzz soak sanitize check bench wheel clean

help:
	@echo "make demo    encode a photograph, compare with Hugging Face, write out/demo/pca.png"
	@echo "make test    every test this machine can run"
	@echo "make vllm    the vLLM plug-in in an environment of its own; VLLM='vllm==0.20.0' for another release"
	@echo "make mutants every seeded bug against the test that must catch it, and no other test"
	@echo "make fuzz    random calls, flipped bytes and repeated calls at full length; make test tries a part"
	@echo "make soak    repeats, threads and random calls at full length, on this machine's GPU"
	@echo "make sanitize every kernel under compute-sanitizer's memcheck and racecheck, on this machine's GPU"
	@echo "make check   ruff, format, mypy --strict, import directions"
	@echo "make bench   measure on this machine's GPU, write bench/results/"
	@echo "make wheel   dist/*.whl"
	@echo "make clean   remove what the others made, the environment included"

demo: $(STAMP)
	$(BIN)/python -m bench.demo

test: $(STAMP) $(OLDER)/.done
	$(SPREAD) tests
	PYTHONPATH=$(OLDER):. $(SPREAD) tests/adapters

# vLLM pins a torch of its own, so it never enters $(VENV). Where it cannot be installed there is nothing to test.
vllm:
	$(PYTHON) -m venv $(VLLM_VENV)
	@if $(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check '$(VLLM)' -e '.[hf]' pytest; then \
		$(VLLM_VENV)/bin/python -m pytest -q -rs -o faulthandler_timeout=120 tests/adapters/test_vllm.py tests/adapters/test_vllm_installed.py \
			tests/adapters/test_vllm_gpu.py; \
	else echo "skipped: $(VLLM) cannot be installed here (see pip's reason above)"; fi

mutants: $(STAMP)
	$(SPREAD) tests/mutants

fuzz: $(STAMP)
	$(BIN)/python -m tests.long fuzz

soak: $(STAMP)
	$(BIN)/python -m tests.long soak

sanitize: $(STAMP)
	$(BIN)/python -m tests.sanitize

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_imports.py

bench: $(STAMP)
	$(BIN)/fused-vit bench kernels
	$(BIN)/fused-vit bench encoder
	$(BIN)/python -m bench.report
	$(BIN)/python -m bench.families
	$(BIN)/python -m bench.support --measure

wheel: $(STAMP)
	rm -rf build/lib build/bdist.*
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

clean:
	rm -rf build dist out .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	test ! -f $(STAMP) || rm -rf $(VENV)

ifeq ($(DRIVER),)
# No NVIDIA driver: the pinned versions, and torch first so that the CPU build an index offers is the one taken.
INSTALL = $(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch==2.13.0 triton==3.6.0 && \
	$(PIP) -c .ci/constraints.txt -e '.[dev]'
else
# A GPU machine often has a torch that fits its driver: build on it instead of downloading another.
SYSTEM = $(shell $(PYTHON) -c 'import torch' 2>/dev/null && echo --system-site-packages)
INSTALL = $(PIP) -e '.[dev]'
endif

$(STAMP): pyproject.toml .ci/constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer found; install one, or: make PYTHON=/path/to/python3 ..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(SYSTEM) $(VENV)
	$(INSTALL)
	@touch $@

# The oldest transformers the adapters support, laid over the environment for one test file.
$(OLDER)/.done: $(STAMP)
	rm -rf $(OLDER)
	$(PIP) --no-deps --target $(OLDER) transformers==4.57.6 'huggingface_hub<1' 'tokenizers>=0.22,<0.23' \
		requests urllib3 charset-normalizer
	@touch $@
