# Each target does its own set-up: .venv is made when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# On a Mac, mlx brings its backend. On Linux it is an extra: CUDA 13 needs driver 580, CUDA 12 less.
BACKEND := $(shell \
	if [ "$$(uname -s)" = Darwin ]; then exit; fi; \
	driver=$$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1 | cut -d . -f 1); \
	if [ -z "$$driver" ]; then echo cpu,; elif [ "$$driver" -ge 580 ]; then echo cuda13,; else echo cuda12,; fi)

# Kernels, their headers and their emulators; asked for when a target needs them.
KERNELS = $(shell find mlx_sparse_nn tests benchmarks -name '*.metal' -o -name '*.cu' -o -name '*.h' -o -name '*.cpp' -o -name '*.c')

.PHONY: help demo docs dist test test-metal test-macos test-device bench lint format clean

help:
	@echo "make demo         train a small sparse language model (two minutes on two CPU cores)"
	@echo "make docs         build the site of README and docs, with an API page for every public name"
	@echo "make dist         build sdist and wheel, and try both in an environment of their own"
	@echo "make test         run the tests"
	@echo "make test-metal   run the Metal kernels on their emulator, with thousands of drawn cases"
	@echo "make test-macos   cross-compile the CPU's C++ for a Mac"
	@echo "make test-device  run the tests and a benchmark on this machine's GPU"
	@echo "make bench        measure products on this machine beside their peers (15 minutes)"
	@echo "make lint         check style and types"
	@echo "make format       put the code into shape"
	@echo "make clean        remove .venv, .bench, the site and what training wrote"

# An OpenBLAS that is installed takes the place of the BLAS in MLX's Linux wheel, which is scalar code.
demo: $(VENV)/installed-examples
	LD_PRELOAD=$$($(BIN)/python benchmarks/openblas.py) $(BIN)/python examples/train_char_lm.py

# A warning is an error. The check reads the pages as a browser would get them.
docs: $(VENV)/installed-docs
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going -c docs/site . site
	$(BIN)/python docs/site/check.py site
	@echo "the site begins at site/index.html"

dist: $(VENV)/installed-dist
	rm -rf dist
	$(BIN)/python -m build --quiet
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python tests/try_dist.py

# A process for each core; what NumPy computes in one keeps to that core. The functions of a file
# stay in one process, and so share fixtures, ports and peaks of memory.
test: $(VENV)/installed-dev
	OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadscope

test-metal: $(VENV)/installed-dev
	$(BIN)/python -m pytest --hypothesis-profile full tests/backends/test_metal*.py tests/emulators

test-macos: $(VENV)/installed-dev
	$(BIN)/python tests/link_for_macos.py

test-device: $(VENV)/installed-dev
	$(BIN)/python benchmarks/device.py

bench: $(VENV)/installed-dev
	$(BIN)/python -m benchmarks

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(KERNELS)
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(KERNELS)

clean:
	rm -rf $(VENV) .bench dist runs site docs/api

$(VENV)/installed-%: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$(BACKEND)$*]"
	touch $@
