# `make setup` and `make demo` need Python 3.11+ and make, and nothing else.
.POSIX:
.SUFFIXES:
.PHONY: help setup setup-dev demo test test-unit test-contracts check contracts bench clean distclean
.PHONY: bench-grid scheduling-table soak kills reorgs
.PHONY: fuzz-long coverage prove slither mutate
.PHONY: test-nodes nodes siwe

VENV = .venv
BIN = $(VENV)/bin
RUNTIME = $(VENV)/.made-runtime
DEV = $(VENV)/.made-dev
NODE = node_modules/.package-lock.json
PIP = $(BIN)/python -m pip --disable-pip-version-check install -qq
# Most tests wait for other programs and for blocks, so five workers keep two cores busy.
WORKERS = 5
FORGE = node_modules/@foundry-rs/forge-linux-amd64/bin/forge

help:
	@echo 'make demo       run one grid on this machine, from submission to audit'
	@echo 'make setup      prepare .venv for running'
	@echo 'make setup-dev  prepare .venv for development, and the npm packages if npm is installed'
	@echo 'make test       run all tests       make test-unit  only the quick ones'
	@echo 'make check      lint, format, types, layers'
	@echo 'make test-contracts   contract tests, by pytest and by forge'
	@echo 'make coverage prove slither mutate fuzz-long   verify the contracts; docs/verification.md'
	@echo 'make contracts  compile the contracts (needs the npm packages)'
	@echo 'make bench      measure gas on a real node (needs the npm packages)'
	@echo 'make bench-grid  measure a whole grid on a real node; make soak: an hour of kills and faults'
	@echo 'make scheduling-table  simulate the policy on workloads, TRACES="a.swf.gz b.swf"; docs/scheduling.md'
	@echo 'make kills      kill daemons at every crash point; make reorgs: reorganise the chain under running daemons'
	@echo 'make test-nodes  test a grid on every node that npm provides; docs/networks.md'
	@echo 'make siwe       compare sign-in messages with siwe-py, in a separate environment'
	@echo 'make clean      remove caches and build output; distclean: .venv and node_modules too'

setup: $(RUNTIME)

setup-dev: $(DEV) $(NODE)

demo: $(RUNTIME)
	$(BIN)/deepsquare demo $(ARGS)

# Tests start hundreds of processes: compiled modules are kept, even if the environment disables it.
test: $(DEV) $(NODE)
	env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-unit: $(DEV)
	$(BIN)/python -m pytest tests/unit $(ARGS)

test-contracts: $(DEV) $(NODE)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile tests/contracts $(ARGS)

# 50,000 runs of each fuzz test, then 2,000,000 calls of the stateful one: about two hours.
fuzz-long: $(DEV) $(NODE)
	FOUNDRY_PROFILE=long $(FORGE) test --no-match-contract InvariantsTest $(ARGS)
	$(BIN)/python scripts/long_invariants.py

coverage: $(DEV) $(NODE)
	$(BIN)/python scripts/solidity_coverage.py $(ARGS)

# Each tool has a separate environment, because its dependencies conflict with ours.
prove: $(NODE) .venv-halmos/.made
	.venv-halmos/bin/python scripts/prove.py $(ARGS)

slither: $(NODE) .venv-slither/.made
	.venv-slither/bin/python scripts/run_slither.py $(ARGS)

mutate: $(DEV) $(NODE) .venv-slither/.made
	$(BIN)/python scripts/mutate.py $(ARGS)

.venv-slither/.made:
	python3 -m venv .venv-slither
	.venv-slither/bin/python -m pip install -qq slither-analyzer==0.11.6
	@touch $@

.venv-halmos/.made:
	python3 -m venv .venv-halmos
	.venv-halmos/bin/python -m pip install -qq halmos==0.3.3
	@touch $@

check: $(DEV) $(NODE)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@if [ -x $(FORGE) ]; then echo '$(FORGE) fmt --check'; $(FORGE) fmt --check contracts tests/forge; fi

contracts: $(DEV) $(NODE)
	$(BIN)/python scripts/compile.py

bench: $(DEV) $(NODE)
	$(BIN)/python scripts/gas_report.py

bench-grid: $(DEV) $(NODE)
	$(BIN)/python scripts/bench_grid.py $(ARGS)

# The whole table of docs/scheduling.md for each workload, and a page with plots for each.
TRACES = examples/mixed.swf examples/campaign.swf.gz
GRID = examples/grid.yaml
REPORTS = reports
scheduling-table: $(DEV)
	mkdir -p $(REPORTS)
	for trace in $(TRACES); do \
	    $(BIN)/deepsquare simulate "$$trace" --providers $(GRID) --load 0.75 --load 0.9 \
	        --want TIME --want COST --want MIXED --block 0 --block 1 \
	        --page "$(REPORTS)/$$(basename "$$trace").html" $(ARGS) || exit 1; \
	done

# An hour by default, after a fault run of a thousand jobs; MINUTES=2 makes a short run.
MINUTES = 60
FAULT_ROUNDS = 84
soak: $(DEV) $(NODE)
	DEEPSQUARE_FAULT_ROUNDS=$(FAULT_ROUNDS) $(BIN)/python -m pytest -q -s --timeout 3600 \
	    tests/e2e/test_endpoint_faults.py
	$(BIN)/python scripts/soak.py --minutes $(MINUTES) $(ARGS)

# Both take minutes; `make test` includes short versions.
kills: $(DEV) $(NODE)
	$(BIN)/python scripts/kill_points.py $(ARGS)

reorgs: $(DEV) $(NODE)
	DEEPSQUARE_REORGS=all $(BIN)/python -m pytest -q -s --timeout 1800 tests/e2e/test_reorgs.py $(ARGS)

# A grid on each node that npm provides; ARGS='--only hardhat' selects one. NODES lists the packages.
NODES = hardhat2 hardhat3 ethereumjs ganache
test-nodes: $(DEV) $(NODE) nodes
	$(BIN)/python scripts/try_nodes.py $(ARGS)

# siwe-py needs other versions of the libraries than the program, so it has a separate environment.
siwe: $(DEV)
	[ -x .venv-siwe/bin/python ] || python3 -m venv .venv-siwe
	.venv-siwe/bin/python -m pip --disable-pip-version-check install -qq 'siwe>=4.4,<5'
	$(BIN)/python scripts/siwe_oracle.py --oracle .venv-siwe/bin/python $(ARGS)

# Their install scripts would only download compilers.
nodes:
	@for node in $(NODES); do \
	    stamp=tests/nodes/$$node/node_modules/.package-lock.json; \
	    if [ ! -e $$stamp ] || [ tests/nodes/$$node/package-lock.json -nt $$stamp ]; then \
	        npm ci --prefix tests/nodes/$$node --ignore-scripts && touch $$stamp || exit 1; \
	    fi; \
	done

clean:
	rm -rf build dist out cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -rf .import_linter_cache .coverage
	find contracts deepsquare_chain scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) .venv-slither .venv-halmos .venv-siwe node_modules tests/nodes/*/node_modules

# A newer pyproject.toml causes a new installation; an interrupted set-up leaves no stamp and is repeated.
$(RUNTIME): pyproject.toml
	@$(MAKE_VENV)
	@echo 'Installing into $(VENV): a minute or two the first time ...'
	@$(PIP) --editable '.[devnet,top]'
	@touch $@

$(DEV): pyproject.toml
	@$(MAKE_VENV)
	@echo 'Installing into $(VENV), with the parts for developers ...'
	@$(PIP) --editable '.[dev]'
	@touch $@ $(RUNTIME)

# Without npm, the tests that need its packages are skipped and report the reason.
$(NODE): package.json package-lock.json
	@if ! command -v npm >/dev/null 2>&1; then \
	    echo 'npm is not installed: going on without the compiler and the real node.' >&2; \
	elif npm ci --no-audit --no-fund; then \
	    touch $@; \
	elif [ "$$DEEPSQUARE_REQUIRE_REAL" = 1 ]; then \
	    exit 1; \
	else \
	    echo 'npm ci failed: going on without the compiler and the real node.' >&2; \
	fi

# Uses PYTHON if set, else the first Python that is new enough. A working .venv is kept.
MAKE_VENV = \
    if [ -x $(BIN)/python ] && $(BIN)/python -m pip --version >/dev/null 2>&1; then exit 0; fi; \
    new='import sys; sys.exit(sys.version_info < (3, 11))'; \
    for python in $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11 python) ''; do \
        if [ -n "$$python" ] && "$$python" -c "$$new" >/dev/null 2>&1; then break; fi; \
    done; \
    if [ -z "$$python" ]; then \
        echo 'Python 3.11 or newer is needed, and was not found.' >&2; \
        echo 'Install it (Debian, Ubuntu: apt-get install python3 python3-venv), or name one:' >&2; \
        echo '  make setup PYTHON=/path/to/python3.11' >&2; \
        exit 1; \
    fi; \
    if ! "$$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then \
        echo "The venv module of $$python is missing." >&2; \
        echo 'Install it (Debian, Ubuntu: apt-get install python3-venv) and run make again.' >&2; \
        exit 1; \
    fi; \
    "$$python" -m venv --clear $(VENV)
