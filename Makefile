# On a fresh machine with python3 3.11+ (with venv) and make, `make demo` and `make test` are all the
# set-up there is: each makes .venv and installs the locked dependencies, once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
UV := uv==0.13.9
MODEL ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input

export ORT_DISABLE_TELEMETRY := 1
export PATH := $(PATH):/usr/sbin:/sbin

.DEFAULT_GOAL := help
.PHONY: help demo test setup lint bench bench-full arm64 soak docs lock clean test-tools

help:  ## say what there is
	@grep -hE '^[a-z0-9-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(READY)  ## the whole thing on this machine: a broker, a small model, questions, checked answers
	@$(BIN)/edged demo

test: $(READY) test-tools  ## lint, types, imports, tests
	@begin=$$(date +%s); $(MAKE) --no-print-directory lint && echo "lint: $$(($$(date +%s) - begin)) s"
	@$(BIN)/python -m pytest -n 2 --dist loadgroup

setup: $(READY) test-tools  ## make the environment for demo and test, run nothing

lint: $(READY)  ## lint, types, imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY)  ## measure with the small model
	@$(BIN)/python -m tests.bench

bench-full: $(READY)  ## measure with a real model, text or fused vision: make bench-full MODEL=/path/to/model
	@test -n "$(MODEL)" || { echo "bench-full: say which model: make bench-full MODEL=/path/to/model" >&2; exit 2; }
	@$(BIN)/python -m tests.bench --model "$(MODEL)" --full

arm64: $(READY)  ## build the container image for 64-bit Arm and run it emulated; as root, on Debian x86-64
	@deploy/arm64-check.sh

soak: $(READY) test-tools  ## the mix of faults for ten minutes: nothing lost, nothing grows
	@EDGED_TEST_MIX_S=600 $(BIN)/python -m pytest tests/faults/test_mix.py -s

docs: $(READY)  ## write SETTINGS.md from the code
	@{ printf '# Settings\n\nWritten by `make docs` from the code; `edged schema config` prints the same.\n\n'; \
		$(BIN)/edged schema config --format markdown; } > SETTINGS.md

lock: $(READY)  ## choose the newest versions that pyproject.toml allows, write all locks
	@$(PIP) install --quiet $(UV)
	@$(COMPILE) --upgrade --extra cpu --extra demo --extra dev --output-file requirements.lock pyproject.toml
	@for kind in cpu cuda; do \
		$(COMPILE) --upgrade --constraints requirements.lock --extra $$kind --extra pull --extra demo \
			--output-file deploy/locks/$$kind.lock pyproject.toml; done
	@sed -n 's/^requires = \["\([^"]*\)"\].*/\1/p' pyproject.toml | \
		$(COMPILE) --upgrade --constraints requirements.lock --output-file deploy/locks/build.lock -

COMPILE = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --custom-compile-command "make lock"

clean:  ## remove the environment and all caches
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find edged tests -name __pycache__ -type d -prune -exec rm -rf {} +

# $(call get,PACKAGES,WHY): install Debian packages as root or by sudo, else say so in one line
define get
	{ if [ "$$(id -u)" = 0 ]; then as=; else as="sudo -n"; fi; \
	  if command -v apt-get >/dev/null && $$as true 2>/dev/null; then \
	    echo installing $(1) "($(2))"; \
	    { $$as apt-get -qq update && $$as env DEBIAN_FRONTEND=noninteractive \
	      apt-get -qq install --yes --no-install-recommends $(1) >/dev/null; }; \
	  else false; fi; } || { echo "$(2): please install" $(1) >&2; exit 1; }
endef

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "edged needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) -V 2>/dev/null || echo not there)." \
		"Name another: make PYTHON=python3.12 …" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		$(call get,$(notdir $(PYTHON))-venv,Python's venv module is missing)
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "installing the locked dependencies into $(VENV) (once)"
	@$(PIP) install --quiet --require-hashes --requirement requirements.lock
	@$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

test-tools:
	@missing=; \
	command -v mosquitto >/dev/null || missing="$$missing mosquitto"; \
	command -v mosquitto_sub >/dev/null || missing="$$missing mosquitto-clients"; \
	command -v strace >/dev/null || missing="$$missing strace"; \
	command -v openssl >/dev/null || missing="$$missing openssl"; \
	command -v shellcheck >/dev/null || missing="$$missing shellcheck"; \
	command -v systemd-analyze >/dev/null || missing="$$missing systemd"; \
	test -z "$$missing" || $(call get,$$missing,the tests need tools that are missing)
