# The commands of this project; CI calls the same ones. `make help` lists them.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Under CI nothing may be skipped, and a compiler's warning is an error.
ifdef CI
REQUIRE = --require=rxe --require=fakeverbs
WERROR = ON
else
WERROR = OFF
endif
BUILT_FROM = pyproject.toml CMakeLists.txt tools/generate_ffi.py $(shell find csrc -name '*.[ch]')
INSTALL = pip install --quiet --disable-pip-version-check
# A file's tests run in one process, and as many files at once as there are CPUs. What takes longest begins first.
SPREAD = --numprocesses $(shell nproc) --dist loadfile --no-loadscope-reorder
TIERS = tests/rxe tests/rpc tests/attack tests/quality tests/unit tests/fakeverbs tests/fuzz tests/transport
SANITIZED_TIERS = tests/unit tests/fuzz tests/transport tests/fakeverbs

# What is changed most, and takes under a minute.
QUICK = $(addprefix tests/unit/,native/test_arena.py native/test_channel.py native/test_estimates.py native/test_half_way.py \
	native/test_kernels.py native/test_library.py native/test_merge.py native/test_record_cache.py core/test_memory_region.py \
	collection/test_owners_file.py protocol reader seam test_datasets.py test_exports.py \
	test_layering.py) tests/transport tests/quality/test_measure.py

.PHONY: help build demo test test-quick lint warnings format asan bench docs packages clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

build: $(VENV)/.built ## build into .venv

demo: build ## build, then search real word vectors in the memory of four other processes
	$(BIN)/cotra demo

test: packages ## install what the tests need, then run all of them
	@$(MAKE) --no-print-directory $(VENV)/.tested
	$(BIN)/python -m pytest $(SPREAD) $(REQUIRE) $(TIERS) $(PYTEST_OPTIONS)

test-quick: $(VENV)/.tested ## the developer's loop: the engine's tests, without owners in other processes, builds and the command line
	$(BIN)/python -m pytest -q $(QUICK) $(PYTEST_OPTIONS)

lint: packages ## ruff, mypy --strict and clang-format; and no warning of the C compiler
	@$(MAKE) --no-print-directory $(VENV)/.linted warnings
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find csrc tests -name '*.[ch]')

warnings: $(VENV)/.built ## the C shim, as it is and with the sanitizers: every warning is an error
	@for sanitize in OFF ON; do \
	$(BIN)/cmake -S . -B build/warnings-$$sanitize -G Ninja -DCMAKE_MAKE_PROGRAM="$(abspath $(BIN))/ninja" -DCMAKE_BUILD_TYPE=Release \
	-DPython_EXECUTABLE="$(abspath $(BIN))/python" -DCOTRA_WERROR=ON -DCOTRA_SANITIZE=$$sanitize >/dev/null && \
	$(BIN)/cmake --build build/warnings-$$sanitize --target cotra_core -- --quiet || exit 1; done

format: $(VENV)/.linted ## write what lint wants
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $$(find csrc tests -name '*.[ch]')

asan: packages ## the tiers without a network, with AddressSanitizer and UndefinedBehaviorSanitizer in the C shim
	@$(MAKE) --no-print-directory VENV=.venv-asan BUILD_DIR=build/asan SETTINGS=-Ccmake.define.COTRA_SANITIZE=ON .venv-asan/.tested
	ASAN_OPTIONS=detect_leaks=0:halt_on_error=1:alloc_dealloc_mismatch=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONMALLOC=malloc COTRA_SANITIZED=1 \
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	.venv-asan/bin/python -m pytest $(SPREAD) $(SANITIZED_TIERS) $(PYTEST_OPTIONS)

bench: build ## recall against speed, beside hnswlib: make bench DATA=directory (see bench/README.md)
	PATH="$(BIN):$$PATH" sh bench/run $(DATA)

docs: $(VENV)/.documented ## the documentation as a site, in build/site; broken links are errors
	$(BIN)/mkdocs build --strict --site-dir build/site

packages: ## the system's packages that lint and the tests need (Debian, Ubuntu)
	@sh tools/install_packages.sh test

clean: ## remove all that was built
	rm -rf build dist .venv .venv-asan .mypy_cache .pytest_cache .ruff_cache .hypothesis

BUILD_DIR = build/$(notdir $(VENV))
# Whether <infiniband/verbs.h> is there is a part of the build: when it comes, as old as its package, the shim is built again.
VERBS = $(VENV)/.$(if $(wildcard /usr/include/infiniband/verbs.h),with,without)-verbs

$(VENV)/bin/pip:
	@sh tools/install_packages.sh build
	$(PYTHON) -m venv $(VENV)
	$(BIN)/$(INSTALL) --upgrade pip
	$(BIN)/$(INSTALL) 'scikit-build-core>=0.11' 'cffi>=1.17' 'cmake>=3.20' ninja
	$(BIN)/$(INSTALL) 'hnswlib>=0.8' # from source, in an environment of its own: the build below has no isolation

$(VERBS): $(VENV)/bin/pip
	@rm -f $(VENV)/.*-verbs
	@touch $@

$(VENV)/.built: $(VENV)/bin/pip $(BUILT_FROM) $(VERBS)
	$(BIN)/$(INSTALL) --no-build-isolation --editable . -Cbuild-dir=$(BUILD_DIR) -Ccmake.define.COTRA_WERROR=$(WERROR) $(SETTINGS)
	@touch $@

$(VENV)/.tested: $(VENV)/.built
	$(BIN)/$(INSTALL) --group test
	@touch $@

$(VENV)/.linted: $(VENV)/.tested
	$(BIN)/$(INSTALL) --group lint
	@touch $@

$(VENV)/.documented: $(VENV)/.built
	$(BIN)/$(INSTALL) --group docs
	@touch $@
