# SPDX-License-Identifier: MIT
# Everything a fresh machine lacks is installed into .venv by the first target.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
BENCH_STAMP := $(VENV)/installed-bench

RUNS ?= 20
AFTER ?= HEAD
CHECKERS ?= kasan kcsan rt

.PHONY: help setup demo bench bench-pool bench-compare bench-user test test-kernel test-kernel-sanitized kernel-plants bench-kernel extents matrix soak soak-kernel lint lint-kernel clean fuzz fuzz-coverage stress faults

help:
	@echo "make demo        the longtest between two processes over shared memory, live"
	@echo "make test        everything that is checked: lint, lint-kernel, the tests here and in guests"
	@echo "make test-kernel all tests of the kernel module, in guests with Linux 6.1 and 6.12"
	@echo "make test-kernel-sanitized"
	@echo "                 the same in kernels with KASAN, lockdep, kmemleak and failing allocations,"
	@echo "                 with KCSAN, and with PREEMPT_RT; builds them; CHECKERS=kasan for one"
	@echo "make kernel-plants"
	@echo "                 bugs planted in the module, which those tests and kernels have to find"
	@echo "make bench       bench-user, then bench-kernel"
	@echo "make bench-user  kucomms and its peers between two processes; ARGS=--quick takes a minute"
	@echo "make bench-kernel"
	@echo "                 kernel and user by kucomms, netlink, BPF rings and others, in a guest"
	@echo "make bench-pool  pools beside threads, and asyncio's: writes docs/bench-pool.md"
	@echo "make bench-compare BASE=HEAD~5"
	@echo "                 what a message costs there and in AFTER=HEAD: writes docs/bench-compare.md"
	@echo "make extents     how long the module looks for free pages in pools of up to 4 GiB, in a guest"
	@echo "make matrix      the conformance matrix RUNS=$(RUNS) times in a row, quiet and busy"
	@echo "make soak        all transports at once for ten minutes, with kills; ARGS='--minutes 60'"
	@echo "make soak-kernel the same in a guest with Linux 6.12, kernel:// included"
	@echo "make fuzz        hostile peers against the ring, 10^7 times; ARGS='--runs 100000000'"
	@echo "make fuzz-coverage"
	@echo "                 what of ring.h and channel.h the stored inputs and the C tests reach"
	@echo "make stress      the ring between threads for ten minutes, under the thread sanitizer"
	@echo "make faults      kill, stop and make fail one side at each point of each step; ARGS=--help"
	@echo "make lint        ruff and mypy"
	@echo "make lint-kernel checkpatch, gcc W=1 and sparse over the kernel code, for five kernels"
	@echo "make setup       only the virtual environment, with kucomms built in place"
	@echo "make clean       remove what was built, but for the sanitized kernel"

setup: $(STAMP)

SOURCES := pyproject.toml setup.py $(wildcard kucomms/_core/*.c kucomms/_core/*.h kucomms/_core/*.py) \
	$(wildcard kucomms/include/*/*.h kernel_module/include/*/*.h kernel_module/include/*/*/*.h)

$(STAMP): $(SOURCES)
	@sh tools/install-system-packages.sh
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

$(BENCH_STAMP): $(STAMP) pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	touch $@

bench: bench-user bench-kernel

bench-user: $(BENCH_STAMP)
	@sh tools/install-bench-packages.sh
	$(MAKE) -C bench/core
	$(BIN)/python -m bench $(ARGS)

bench-pool: setup
	$(BIN)/python -m bench.pool $(ARGS) docs/bench-pool.md

bench-compare: setup
	@sh tools/install-bench-packages.sh
	@sh tools/install-kernel-packages.sh
	$(BIN)/python -m bench.compare $(ARGS) $(BASE) $(AFTER) docs/bench-compare.md

demo: setup
	$(BIN)/python examples/demo.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy

lint-kernel: setup
	@sh tools/install-kernel-packages.sh
	sh tools/kernel-lint.sh

test: lint lint-kernel
	@sh tools/install-check-packages.sh
	@sh tools/test.sh

test-kernel: setup
	@sh tools/install-kernel-packages.sh
	KUCOMMS_ALL=1 $(BIN)/python tools/guest.py --timeout 5400

test-kernel-sanitized: setup
	@sh tools/install-kernel-packages.sh
	set -e; for checker in $(CHECKERS); do sh tools/kernel-sanitized.sh $$checker --build-only; done
	@echo "the guests write to build/guest-*.output: one with each of $(CHECKERS)"
	@echo $(CHECKERS) | xargs -n 1 -P "$$(nproc)" sh -c \
		'sh tools/kernel-sanitized.sh $$0 </dev/null >build/guest-$$0.output 2>&1'; status=$$?; \
	for checker in $(CHECKERS); do cat build/guest-$$checker.output; done; exit $$status

kernel-plants: setup
	@sh tools/install-kernel-packages.sh
	set -e; for checker in $(CHECKERS); do sh tools/kernel-sanitized.sh $$checker --build-only; done
	$(BIN)/python -m tests.kernel.plants --jobs "$$(nproc)" $(ARGS)

bench-kernel: setup
	@sh tools/install-kernel-packages.sh
	@sh tools/install-bench-packages.sh
	$(BIN)/python bench/kernel/run.py

# The last is the figures of a processor that is not emulated; it needs the kernel's sources.
extents: setup
	@sh tools/install-kernel-packages.sh
	$(BIN)/python tools/guest.py --kernel 6.12 --memory 6G -- python -m tests.kernel.test_extents
	$(MAKE) --no-print-directory -C tests/kernel/native

matrix: setup
	for run in $$(seq $(RUNS)); do \
		echo "run $$run of $(RUNS)"; \
		KUCOMMS_ALL=1 $(BIN)/python -m pytest -q tests/transports/test_conformance*.py || exit 1; \
	done

soak: setup
	$(BIN)/python -m tests.soak $(ARGS)

# Few lines: an emulated guest with more is so slow that set-ups take longer than they may. Its C
# program, for ARGS='--native 1', is built here, where that is quick.
soak-kernel: setup
	@sh tools/install-kernel-packages.sh
	$(BIN)/python -m tests.soak --build
	$(BIN)/python tools/guest.py --kernel 6.12 --timeout 90000 -- \
		python -m tests.soak --transports inproc,shm,kernel --lines 2 --native 0 $(ARGS)

fuzz: setup
	@sh tools/install-check-packages.sh
	$(BIN)/python -m tests.fuzz run $(ARGS)

fuzz-coverage: setup
	@sh tools/install-check-packages.sh
	$(BIN)/python -m tests.fuzz coverage $(ARGS)

stress: setup
	$(BIN)/python -m tests.fuzz stress $(ARGS)

faults: setup
	$(BIN)/python -m tests.faults $(ARGS)

clean:
	rm -rf $(VENV) $(filter-out build/sanitized,$(wildcard build/*)) dist *.egg-info kucomms/_core/*.so kucomms/_core/_setup.c
