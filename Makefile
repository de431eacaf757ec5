# make train   everything from nothing: environment, build, fine-tuning of the built-in model
# make test    the same set-up, then every test
# make lint    ruff, mypy, clang-format
# make dev     builds into python/qlora for work on the sources: PYTHONPATH=python python -m pytest tests
# make clean   removes the environment and the builds
#
# PYTHON is the interpreter, TORCH what pip installs as torch: make test TORCH=torch==2.10.0
# Set-up is remembered in $(VENV) by stamps: a second call does none; a changed source is built again.
PYTHON ?= python3
TORCH ?= torch
VENV ?= .venv
CMAKE_ARGS ?=
export CMAKE_ARGS

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
SOURCES := pyproject.toml CMakeLists.txt $(wildcard README.md) \
  $(shell find cpp cuda python -type f -not -path '*/__pycache__/*' -not -path 'python/qlora/lib/*' \
    -not -path 'python/qlora/include/*' -not -name '*.so')
ARGS ?=

.PHONY: train test lint dev dev-locked clean
train: $(VENV)/.train
	$(BIN)/qlora train $(ARGS)

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS)

lint: $(VENV)/.lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find cpp cuda tests -name '*.h' -o -name '*.cpp' -o -name '*.c' -o -name '*.cu' -o -name '*.cuh')

$(VENV)/.torch:
	@echo "Setting up $(VENV): $(TORCH) and build tools"
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)" cmake ninja pybind11 scikit-build-core
	@touch $@

$(VENV)/.package: $(VENV)/.torch $(SOURCES)
	@echo "Building qlora (the first time about two minutes)"
	@rm -rf $(VENV)/wheel
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir $(VENV)/wheel .
	$(PIP) --no-deps --force-reinstall $(VENV)/wheel/*.whl
	@touch $@

$(VENV)/.train: $(VENV)/.package
	$(PIP) "$$(echo $(VENV)/wheel/*.whl)[train]"
	$(BIN)/qlora info
	@touch $@

$(VENV)/.test: $(VENV)/.train
	$(PIP) "$$(echo $(VENV)/wheel/*.whl)[train,test]"
	@touch $@

$(VENV)/.lint: $(VENV)/.test
	$(PIP) clang-format
	@touch $@

# Several builds at a time would disturb each other in one build directory.
dev:
	@mkdir -p build
	flock build/dev.lock $(MAKE) --no-print-directory dev-locked

DEV_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
dev-locked:
	cmake -S . -B build/dev -G Ninja -DPython_EXECUTABLE="$$($(DEV_PYTHON) -c 'import sys; print(sys.executable)')" \
	  -DCMAKE_INSTALL_PREFIX=$(CURDIR)/python/qlora $(CMAKE_ARGS)
	cmake --build build/dev -j2
	cmake --install build/dev >/dev/null

clean:
	rm -rf $(VENV) build python/qlora/lib python/qlora/include python/qlora/_qlora_ext*.so
