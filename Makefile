# Two commands on a fresh machine with nothing but python3 and make:
#   make demo                 set up (without torch) and run the main job: a coordinator and three hospitals on this
#                             machine, over Flower and gRPC, on DICOM images that the program draws
#   make demo DATA=PATH [BUNDLE=FILE]   the same on your own labelled images; with a bundle that knows their classes
#   make demo-site            one hospital alone, offline
#   make test                 set up and pass every check: lint, types, import contracts, both test suites
# For daily work: make check (lint, types, contracts), make quick (fast tests).

PYTHON ?= python3
SITE   := .venv-site
DEV    := .venv-dev
PIP    := -m pip install --quiet --disable-pip-version-check
# One thread per process: with two on a busy two-core machine a training step took 8-25 times longer.
export OMP_NUM_THREADS ?= 1

.PHONY: demo demo-site test check quick site-test dev-test protos clean

$(SITE)/.installed: pyproject.toml
	$(PYTHON) -m venv $(SITE)
	$(SITE)/bin/python $(PIP) -e ".[test,dicom-net]"
	touch $@

$(DEV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(DEV)
	$(DEV)/bin/python $(PIP) torch==2.13.0
	$(DEV)/bin/python $(PIP) -e ".[dev]"
	touch $@

demo: $(SITE)/.installed
	$(if $(DATA),,rm -rf medveil-demo-campaign)
	$(SITE)/bin/medveil-agent demo --campaign $(if $(DATA),--data "$(DATA)") $(if $(BUNDLE),--bundle "$(BUNDLE)")

demo-site: $(SITE)/.installed
	$(SITE)/bin/medveil-agent demo $(if $(DATA),--data "$(DATA)") $(if $(BUNDLE),--bundle "$(BUNDLE)")

test: check site-test dev-test

check: $(DEV)/.installed
	$(DEV)/bin/ruff check .
	$(DEV)/bin/ruff format --check .
	$(DEV)/bin/mypy
	$(DEV)/bin/lint-imports

# A test that takes its process along ends the suite: without --max-worker-restart 0, pytest-xdist waits for it forever.
# The hospital's side: torch is absent from this environment, and a test asserts that it is.
site-test: $(SITE)/.installed
	MEDVEIL_EXPECT_NO_TORCH=1 $(SITE)/bin/python -m pytest -m "not train and not dev" -n 2 --dist loadfile --max-worker-restart 0 tests

dev-test: $(DEV)/.installed
	$(DEV)/bin/python -m pytest -m "train or dev" -n 2 --max-worker-restart 0 tests

quick: $(DEV)/.installed
	$(DEV)/bin/python -m pytest -m "not slow" tests

# Regenerates the committed protobuf code; a test fails when it was forgotten.
protos: $(DEV)/.installed
	$(DEV)/bin/python -m medveil.protos.generate

clean:
	rm -rf $(SITE) $(DEV) build dist
