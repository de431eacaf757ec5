# make train, make test: from a clean checkout, in .venv. make dev: into the source tree, for the interpreter $(DEV_PYTHON).
PYTHON ?= python3
DEV_PYTHON ?= $(if $(wildcard .venv/bin/python),.venv/bin/python,$(PYTHON))

.PHONY: dev
dev:
	@mkdir -p build
	flock build/dev.lock $(MAKE) --no-print-directory dev-locked

.PHONY: dev-locked
dev-locked:
	cmake -S . -B build/dev -G Ninja -DPython_EXECUTABLE="$$($(DEV_PYTHON) -c 'import sys; print(sys.executable)')" \
	  -DCMAKE_INSTALL_PREFIX=$(CURDIR)/python/qlora $(CMAKE_ARGS)
	cmake --build build/dev -j2
	cmake --install build/dev >/dev/null
