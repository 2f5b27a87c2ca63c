# Two commands do everything on a machine with python3, python3-venv and make: `make run` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The configuration to run with: `make run CONFIG=my.yaml`; config.yaml is taken where it exists.
CONFIG ?= $(wildcard config.yaml)
# More for the command line: `make run ARGS="--listen 127.0.0.1:8081 --admin 127.0.0.1:9091"`, `make test ARGS="-k tokens"`.
ARGS ?=
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes

# Where the libraries are that tests/integration/test_libraries.py runs.
LIBRARIES := .venv-libraries
NODE_LIBRARIES := tests/integration/libraries/node_modules

.PHONY: run test libraries lint types format wheel docs check coverage bench lock operations clean

run: $(VENV)/.runtime
	@exec $(BIN)/python -m proxy serve --demo $(if $(CONFIG),--config $(CONFIG)) $(ARGS)

test: $(VENV)/.dev libraries
	$(BIN)/python -m pytest -n auto $(ARGS)

# Libraries that apps bring along, apart from ours. What cannot be had here is left out: its tests skip, and fail in CI.
libraries:
	@$(MAKE) --silent --no-print-directory $(LIBRARIES)/.installed || echo "The tests of Python libraries will be skipped." >&2
	@$(MAKE) --silent --no-print-directory $(NODE_LIBRARIES)/.installed || echo "The tests of Node libraries will be skipped." >&2

$(LIBRARIES)/.installed: requirements-libraries.lock
	@echo "Installing the libraries that the tests run into $(LIBRARIES) …"
	@$(PYTHON) -m venv $(LIBRARIES)
	@$(LIBRARIES)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r $<
	@touch $@

$(NODE_LIBRARIES)/.installed: tests/integration/libraries/package-lock.json
	@echo "Installing the libraries that the tests run into $(NODE_LIBRARIES) …"
	@npm ci --prefix tests/integration/libraries --ignore-scripts --no-audit --no-fund --silent
	@touch $@

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.dev
	$(BIN)/mypy --strict proxy tests

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The wheel in an empty environment, in another folder: its version, and one request through it.
wheel: $(VENV)/.dev
	$(BIN)/python .ci/check_wheel.py

# The pages as a site in build/docs, which needs no network; a broken link or a page that no list names is an error.
docs: $(VENV)/.dev
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet --builder html --conf-dir docs . build/docs $(ARGS)

check: test lint types docs wheel

coverage: $(VENV)/.dev libraries
	rm -f .coverage .coverage.*
	$(BIN)/coverage run -m pytest $(ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

bench: $(VENV)/.dev
	$(BIN)/python -m tests.bench.compare $(ARGS)

# Rebuild the operation table from a folder of Amazon's models: `make operations MODELS=…`.
operations: $(VENV)/.runtime
	$(BIN)/python -m proxy operations rebuild $(MODELS) $(ARGS)

# Resolve the dependencies anew, for every Python and system, with hashes. Needs uv.
lock:
	uv pip compile --universal --python-version 3.11 --generate-hashes --no-header --no-annotate --quiet \
		pyproject.toml -o requirements.lock $(ARGS)
	uv pip compile --universal --python-version 3.11 --generate-hashes --no-header --no-annotate --quiet \
		pyproject.toml --group dev -o requirements-dev.lock $(ARGS)
	uv pip compile --universal --python-version 3.11 --generate-hashes --no-header --no-annotate --quiet \
		--group build -o requirements-build.lock $(ARGS)
	uv pip compile --universal --python-version 3.11 --generate-hashes --no-header --no-annotate --quiet \
		tests/integration/libraries/requirements.in -o requirements-libraries.lock $(ARGS)

clean:
	rm -rf $(VENV) $(LIBRARIES) $(NODE_LIBRARIES) build dist .coverage .coverage.* .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: requirements.lock | $(VENV)/bin/python
	@echo "Installing what the proxy needs into $(VENV) …"
	@$(PIP_INSTALL) -r requirements.lock
	@touch $@

$(VENV)/.dev: requirements-dev.lock | $(VENV)/bin/python
	@echo "Installing what the tests need into $(VENV) …"
	@$(PIP_INSTALL) -r requirements-dev.lock
	@touch $@ $(VENV)/.runtime
