# Everything runs from one environment, .venv. The first command sets it up; nothing else needs to be installed.

VENV := .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.complete
TESTS := billing_orchestration_tests
# More arguments for the command, for example: make test ARGS='-k refund'
ARGS :=
# For `make browser`: a folder for its pictures (docs/images; none by default), and a browser that is not on the PATH.
SCREENSHOTS :=
CHROMIUM :=
# For `make conformance`: where the provider's OpenAPI file is.
OPENAPI :=
# For `make torture`: how long it goes on (0: its default), and the simulation's first seed (give another each night).
ROUNDS := 0
FIRST := 1

SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help demo dev test check bench torture conformance browser cluster lock sbom clean

# Without compiled files every run of a job costs 2.5 times the CPU, so they are written whatever the caller's shell
# says. Another Python's paths must not leak into .venv.
unexport PYTHONDONTWRITEBYTECODE PYTHONHOME PYTHONPATH PIP_NO_COMPILE PIP_TARGET PIP_PREFIX PIP_USER PIP_REQUIRE_VIRTUALENV

help: ## Show this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1|\2/p' Makefile | while IFS='|' read -r name what; do \
	  printf '%-16s %s\n' "$$name" "$$what"; done

demo: $(STAMP) ## Run the five jobs on example data and compare the books of both sides, in half a minute
	@$(PYTHON) -m billing_orchestration.sandbox.demo $(ARGS)

dev: $(STAMP) ## Open the Dagster UI on the same data: http://localhost:3000, schedules on
	@$(PYTHON) -m billing_orchestration.sandbox.dev $(ARGS)

test: $(STAMP) ## Run all tests, on a real PostgreSQL and the sandbox provider over HTTP
	@$(PYTHON) -m pytest $(TESTS) --ignore $(TESTS)/browser --ignore $(TESTS)/cluster -n 2 $(ARGS)

check: $(STAMP) ## Check lint, format, types, layers, shape, definitions, tracked files
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m mypy
	@$(VENV)/bin/lint-imports
	@$(VENV)/bin/hadolint Dockerfile
	@$(PYTHON) .ci/check_image
	@$(PYTHON) .ci/check_kubernetes
	@$(PYTHON) .ci/check_definitions
	@$(PYTHON) .ci/check_tracked_files
	@$(PYTHON) .ci/check_shape

bench: $(STAMP) ## Measure speed against the physical limit, in a quarter of an hour (docs/performance.md)
	@$(PYTHON) -m bench $(ARGS)

torture: $(STAMP) ## Attack the promise: simulation, kills, faults, races, mutants; ROUNDS=n for a night
	@$(PYTHON) -m $(TESTS).torture --rounds $(ROUNDS) --first $(FIRST) $(ARGS)

# Chromium is a package of the operating system: root on a machine with apt gets it, everybody else gets a hint.
browser: $(VENV)/.browser ## Drive the Dagster UI of a whole deployment in a real browser (Chromium), in a few minutes
	@test -n "$(CHROMIUM)" || command -v chromium chromium-browser google-chrome >/dev/null || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo 'Installing chromium ...'; \
	    apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y chromium >/dev/null; \
	  else \
	    echo 'No Chromium found: install the package chromium, or name one: make browser CHROMIUM=/path' >&2; exit 1; \
	  fi; }
	@CHROMIUM=$(CHROMIUM) SCREENSHOTS=$(SCREENSHOTS) $(PYTHON) -m pytest $(TESTS)/browser $(ARGS)

$(VENV)/.browser: $(STAMP)
	@$(PYTHON) -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[browser]'
	@touch $@

# Redis is one, too.
cluster: $(VENV)/.cluster ## Kill parts of real deployments: a Celery worker over a real Redis, a code server; run the runbook, in ten minutes
	@command -v redis-server >/dev/null || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo 'Installing redis-server ...'; \
	    apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y redis-server >/dev/null; \
	  else \
	    echo 'No redis-server found: install the package redis-server' >&2; exit 1; \
	  fi; }
	@$(PYTHON) -m pytest $(TESTS)/cluster $(ARGS)

$(VENV)/.cluster: $(STAMP)
	@$(PYTHON) -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[docker,celery,kubernetes]'
	@touch $@

# The file is the provider's own and not part of this project: name your copy of it.
conformance: $(VENV)/.conformance ## Judge client and sandbox by the provider's OpenAPI file; OPENAPI=PATH (docs/conformance.md)
	@test -n "$(OPENAPI)" || { \
	  echo 'Name your copy of the OpenAPI file: make conformance OPENAPI=PATH (docs/conformance.md)' >&2; exit 1; }
	@SANDBOX_OPENAPI='$(OPENAPI)' $(PYTHON) -m pytest -p $(TESTS).conformance.plugin -W 'ignore:Unsupported scheme type' $(TESTS)/conformance $(TESTS)/sandbox \
	  $(TESTS)/provider $(TESTS)/jobs/test_autopayment.py $(TESTS)/jobs/test_expire_payments.py $(ARGS)

$(VENV)/.conformance: $(STAMP)
	@$(PYTHON) -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[conformance]'
	@touch $@

# For the Python of the image. Changes of constraints.txt are not in the image until this was run: `make check` says so.
LOCK := $(VENV)/bin/uv pip compile --quiet --generate-hashes --no-annotate --custom-compile-command 'make lock' \
  --no-emit-index-url --no-emit-find-links --constraints constraints.txt --python-platform linux \
  --python-version $(shell sed -n 's/^ARG PYTHON_IMAGE=python:\([0-9.]*\).*/\1.9/p' Dockerfile)

lock: $(VENV)/.supply ## Write down the image's packages with the hashes of their files (needs the package index)
	@$(LOCK) pyproject.toml --extra docker --extra celery --extra kubernetes --output-file deploy/requirements.txt >/dev/null
	@echo setuptools | $(LOCK) - --output-file deploy/requirements.build.txt >/dev/null

sbom: $(VENV)/.supply ## List the image's packages for auditors, as CycloneDX: dist/sbom.cdx.json
	@mkdir -p dist
	@cat deploy/requirements.build.txt deploy/requirements.txt | PYTHONWARNINGS=ignore $(VENV)/bin/cyclonedx-py requirements - \
	  --pyproject pyproject.toml --output-reproducible --output-file dist/sbom.cdx.json

$(VENV)/.supply: $(STAMP)
	@$(PYTHON) -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[supply]'
	@touch $@

clean: ## Remove .venv, the demo's data and all caches
	rm -rf $(VENV) .demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last and names the folder it was written in. An environment that was interrupted, moved or
# copied, or whose Python is gone, is rebuilt. A changed pyproject.toml or constraints.txt is installed into it.
ifneq ($(shell $(PYTHON) -c '' 2>/dev/null && cat $(STAMP) 2>/dev/null),$(CURDIR))
$(STAMP): FORCE
endif
.PHONY: FORCE
FORCE:

$(STAMP): pyproject.toml constraints.txt
	@set -eu; \
	if $(PYTHON) -c '' 2>/dev/null && [ "$$(cat $@ 2>/dev/null)" = "$$(pwd -P)" ]; then \
	  rm -f $@; \
	  echo 'Bringing .venv up to date ...'; \
	else \
	  python=; \
	  for candidate in python3 python3.13 python3.12 python3.11 python3.10 python3.14 python; do \
	    if "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' \
	        >/dev/null 2>&1; then python=$$candidate; break; fi; \
	  done; \
	  if [ -z "$$python" ]; then \
	    echo 'No Python 3.10 to 3.14 with its venv module found: install one (as python3), then repeat the command.' >&2; \
	    exit 1; \
	  fi; \
	  echo "Setting up .venv with $$("$$python" --version) (once, a minute or two) ..."; \
	  rm -rf $(VENV); \
	  "$$python" -m venv $(VENV); \
	fi; \
	$(PYTHON) -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'; \
	$(PYTHON) -m compileall -q billing_orchestration $(TESTS); \
	pwd -P > $@
