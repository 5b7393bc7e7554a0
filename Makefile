# SPDX-License-Identifier: Apache-2.0
# Two commands on a bare Debian 12 or 13 with git, python3 and make:  make demo  ·  make test
# Both install what is missing (scripts/setup), build, and run. `make help` lists the rest.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup build checked fuzzed lint test test-long mutants test-checked test-lvm test-quick torture-long fuzz demo demo-lvm demo-publish wheel deb clean
.PHONY: bench bench-quick bench-full bench-report bench-publish

VENV := .venv
PY := $(VENV)/bin/python
CHECKED := build/checked
FUZZED := build/fuzz
JOBS ?= $(shell nproc 2>/dev/null || echo 1)
PYTEST_ARGS ?=
# Python without a .py in its name.
SCRIPTS := scripts/demo scripts/demo-transcript scripts/make-completions scripts/make-wheel scripts/run-tests scripts/spdx scripts/uml
# Every temporary file of the tests: a place for sparse files of some GB.
export TMPDIR ?= /tmp

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16
	@echo 'Variables: VG=group SPARE=/dev/empty (demo)  PYTHON=/path/to/python3 (3.11 or newer)  JOBS=N  PYTEST_ARGS="-k name"'

setup: ## install what is missing: Debian packages, the venv, its Python packages
	@scripts/setup

build: setup ## compile in place (release)
	@FVD_BUILD=release FVD_DEVTOOLS=1 FVD_JOBS=$(JOBS) $(PY) -W ignore setup.py -q build_ext --inplace -j $(JOBS)

# The checked build (bounds checks, asserted invariants, seeded bugs) lives in a copy of the tree, so that both can be tested.
checked: setup ## compile the checked build in build/checked
	@scripts/copy-tree $(CHECKED)
	@cd $(CHECKED) && FVD_BUILD=checked FVD_DEVTOOLS=1 FVD_JOBS=$(JOBS) $(CURDIR)/$(PY) -W ignore setup.py -q build_ext --inplace -j $(JOBS)

# As checked, by clang with AddressSanitizer and libFuzzer's counters. Without clang there is none, and the tests do with the other builds.
fuzzed: setup ## compile the fuzz build in build/fuzz
	@scripts/copy-tree $(FUZZED)
	@command -v clang >/dev/null || { echo 'no clang: no fuzz build' >&2; exit 0; }; \
	cd $(FUZZED) && FVD_BUILD=fuzz FVD_DEVTOOLS=1 FVD_JOBS=$(JOBS) $(CURDIR)/$(PY) -W ignore setup.py -q build_ext --inplace -j $(JOBS)

lint: setup ## ruff (rules and format), mypy --strict, cython-lint
	$(PY) -m ruff check . $(SCRIPTS)
	$(PY) -m ruff format --check . $(SCRIPTS)
	scripts/typecheck
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" cython-lint fvd devtools

# Builds, linters and folders of tests run beside each other (scripts/run-tests): each is told whole when it ends, and ended after a limit.
RUN_TESTS = @$(PY) scripts/run-tests --jobs $(JOBS)
PYTEST_WORDS = $(if $(PYTEST_ARGS),-- $(PYTEST_ARGS))
test: setup ## everything: both builds, the linters, all tests, real LVM included (half an hour on 2 processors)
	$(RUN_TESTS) $(PYTEST_WORDS)

test-long: setup ## the same with all that is left out of it, in both builds, and longer plays (an hour and more); before an issue is resolved
	$(RUN_TESTS) --long $(PYTEST_WORDS)

mutants: checked ## one-line changes to the engine, drawn by a seed, and what finds each (part of test-long; 15 minutes)
	$(PY) tests/mutants/hunt.py

test-checked: checked ## the part of make test that runs in the checked build
	$(RUN_TESTS) --only 'checked *' $(PYTEST_WORDS)

test-lvm: build ## only what runs on real LVM, in User-Mode Linux guests
	$(RUN_TESTS) --only 'release lvm/*' $(PYTEST_WORDS)

test-quick: build ## the release build's fast tests (three minutes)
	$(RUN_TESTS) --quick $(PYTEST_WORDS)

# libFuzzer's corpus grows in build/fuzzing/corpus; what it finds is left in build/fuzzing/TARGET.
TIME ?= 600
TARGETS ?= image journal server maps superblock pending transmission handshake control name ring front_end
fuzz: fuzzed ## coverage-guided fuzzing on the fuzz build, TIME=seconds for each of TARGETS
	@$(PY) tests/fuzz/keep.py --unpack build/fuzzing/corpus
	@for target in $(TARGETS); do \
		echo "fuzz: $$target for $(TIME) s"; \
		mkdir -p build/fuzzing/corpus/$$target build/fuzzing/$$target && cd build/fuzzing/$$target || exit; \
		PYTHONPATH=$(CURDIR)/$(FUZZED) $(CURDIR)/$(PY) $(CURDIR)/tests/fuzz/guided.py $$target -max_total_time=$(TIME) -max_len=300 \
			-len_control=0 -timeout=30 -rss_limit_mb=3000 -print_final_stats=1 ../corpus/$$target > log 2>&1 || { tail -40 log; exit 1; }; \
		tail -7 log; cd $(CURDIR); \
	done

# A volume group is touched only if it is named on the command line, not for a VG that happens to be in the environment.
named = $(if $(filter command line,$(origin $(1))),$($(1)))

# FIRST: a range of seeds that nobody has played.
FIRST ?= 1000000000
torture-long: build ## 50 million requests on the simulated disk, then 5,000 combinations of features; what was found, by seed
	$(PY) -m fvd.cli torture --seed $(FIRST) --requests 50000000 --keep-going
	$(PY) -m fvd.cli torture --seed $(FIRST) --worlds 5000 --combinations --keep-going

demo: build ## the main job on real input, narrated; a few minutes, some GB in $TMPDIR. VG=vg0: on that volume group
	@$(PY) scripts/demo $(call named,VG) $(addprefix --spare ,$(call named,SPARE))

demo-lvm: build ## the same on real lvm2 in a User-Mode Linux guest, no root needed; two minutes, 1 GB in $TMPDIR
	@$(PY) scripts/demo --uml

demo-publish: build ## both demos; docs/demo.md is what they print
	@$(PY) scripts/demo-transcript

bench: build ## benchmarks against what would be used instead, 20 minutes; tables, and results/report.html
	$(PY) bench/run.py

bench-quick: build ## the same in 3 minutes: fewer and shorter rounds
	$(PY) bench/run.py --mode quick

bench-full: build ## the whole matrix, hours
	$(PY) bench/run.py --mode full

bench-report: build ## results/report.html again, from the results that are there
	$(PY) bench/run.py --report

bench-publish: build ## docs/benchmarks.md and its pictures, from the results that are there
	$(PY) bench/run.py --report --publish

wheel: setup ## a wheel in dist/, and what it lacks
	$(PY) scripts/make-wheel

deb: setup ## a Debian package in dist/, for the Debian that this is; without a network once setup is done
	@FVD_BUILD=release FVD_JOBS=$(JOBS) $(PY) -W ignore setup.py -q --name >/dev/null
	@JOBS=$(JOBS) scripts/make-deb

clean: ## forget everything that was built (not the venv)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find fvd devtools -name '*.so' -delete
