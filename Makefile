# Set-up and checks. `make` alone lists the targets.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# Tests mostly wait for Ray and for servers; with more processes than cores, those that reckon with time fail.
TEST_PROCESSES ?= 2

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-browser test-slow test-ceph peers lint types docs format clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# CPU torch goes in first: with it present, nothing pulls the CUDA build.
$(STAMP): pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info[:2] != (3, 11))" || { echo "make: needs Python 3.11; set PYTHON=" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $@

install: $(STAMP)  ## make .venv and install strata with its tools

quickstart: $(STAMP)  ## install, build and publish the WordNet index, show the result
	@$(BIN)/strata run conf/quickstart.yaml > /dev/null

test: $(STAMP)  ## all tests but the slow ones
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder -m "not slow and not ceph"

test-browser: $(STAMP)  ## the report page in headless Chromium; part of `test` where there is one
	$(BIN)/python -m pytest -m browser

test-slow: $(STAMP)  ## benchmarks and long tests; they print their tables
	$(BIN)/python -m pytest -m "slow and not ceph" -s

peers:  ## other disk indexes in an environment of their own; test-slow measures them beside ours where it is there
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check -r tests/benchmarks/peers.txt

test-ceph: $(STAMP)  ## the store's contract, runs and kills on a Ceph that the tests start
	@for p in ceph ceph-authtool ceph-mon ceph-osd monmaptool radosgw radosgw-admin; do command -v $$p > /dev/null || \
		{ echo "make: $$p is missing: apt-get install --no-install-recommends ceph-mon ceph-osd radosgw ceph-common" >&2; exit 1; }; done
	$(BIN)/python -m pytest -m ceph -s

lint: $(STAMP)  ## formatting and lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(STAMP)  ## static types
	$(BIN)/mypy

docs: $(STAMP)  ## generate conf/README.md and conf/schema.json
	$(BIN)/python -c "from pathlib import Path; from pipeline import config; Path('conf/README.md').write_text(config.reference()); Path('conf/schema.json').write_text(config.json_schema())"

format: $(STAMP)  ## format and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove the environment and the quickstart's data
	rm -rf $(VENV) data/quickstart
