# make demo and make test are all it takes; both rest on make setup, which does nothing when nothing changed.
PYTHON ?= python3
# The CPU build of torch is pinned here, so that a plain dependency never pulls gigabytes of another one.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Where the kernels do not compile the package installs without them, and quietly: what the compiler said is here.
LOG := build/setup.log

.PHONY: setup demo test check docs mutate fuzz sanitize cross clean
setup: $(STAMP)

KERNELS := CMakeLists.txt $(wildcard src/trimtab/kernels/*.* src/trimtab/kernels/isa/*)

$(STAMP): pyproject.toml Makefile $(KERNELS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	mkdir -p build && rm -f $(LOG)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --progress-bar off --log $(LOG) -e '.[test,dev]'
	@$(BIN)/python -c "import _trimtab_kernels" 2> /dev/null || ! command -v $(CXX) > /dev/null || \
	  echo "kernels not built, all runs in torch: $$(grep -m 1 -o '[^ ]*\(:[0-9]*: \|CMake \).*[Ee]rror.*' $(LOG)) (more in $(LOG))" >&2
	touch $(STAMP)

demo: setup
	$(BIN)/trimtab demo --out trimtab-demo --force

test: setup
	$(BIN)/python -m pytest -n auto --maxprocesses 4

check: setup
	$(BIN)/python tools/generate.py check
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: setup
	$(BIN)/python tools/generate.py write

# Plants bugs in a copy and checks that the tests see each of them; slow, run by hand.
mutate: setup
	$(BIN)/python tools/mutate.py

# Breaks packed directories and opens them: each is refused in one line or computes what it says; a minute, run by hand.
fuzz: setup
	$(BIN)/python tools/fuzz.py --count 10000

# The kernels' tests once more, under the address and undefined-behaviour sanitizers; slow, run by hand.
# SKBUILD_EDITABLE_SKIP: the editable install would otherwise answer for the extension before PYTHONPATH does.
sanitize: export SKBUILD_EDITABLE_SKIP = $(wildcard $(abspath build)/cp*)
sanitize: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check cmake ninja nanobind
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build/sanitize -G Ninja -DSANITIZE=ON -DSKBUILD_PROJECT_VERSION=$$($(BIN)/python -c "import trimtab; print(trimtab.__version__)") \
	  -DPython_EXECUTABLE=$(abspath $(BIN))/python -Dnanobind_DIR=$$($(BIN)/python -m nanobind --cmake_dir)
	$(BIN)/ninja -C build/sanitize
	LD_PRELOAD=$$($(CXX) -print-file-name=libasan.so):$$($(CXX) -print-file-name=libstdc++.so) ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=build/sanitize \
	  $(BIN)/python -c "import _trimtab_kernels as k; assert 'sanitize' in k.__file__, k.__file__"
	LD_PRELOAD=$$($(CXX) -print-file-name=libasan.so):$$($(CXX) -print-file-name=libstdc++.so) \
	  ASAN_OPTIONS=detect_leaks=0:verify_asan_link_order=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	  PYTHONPATH=build/sanitize $(BIN)/python -m pytest tests/runtime -k "not forked"

# The kernels for 64-bit ARM, built by a cross compiler and run under an emulator (Debian: g++-aarch64-linux-gnu, qemu-user).
CROSS ?= aarch64-linux-gnu-g++
NEON := -march=armv8.2-a+dotprod+fp16
K := src/trimtab/kernels
cross:
	mkdir -p build/cross
	for f in linear pool cpu isa/portable isa/neon; do $(CROSS) -std=c++20 -O2 -ffp-contract=off -Wall -Wextra \
	  $$(test $$f = isa/neon && echo $(NEON)) -c $(K)/$$f.cpp -o build/cross/$$(basename $$f).o || exit 1; done
	$(CROSS) -static -std=c++20 -O2 -Wall -Wextra -I$(K) tests/native/agree.cpp build/cross/*.o -o build/cross/agree -lpthread
	qemu-aarch64 -cpu max build/cross/agree

clean:
	rm -rf $(VENV) trimtab-demo build
