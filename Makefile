# `make demo` and `make test` do all the set-up on a fresh machine.
PYTHON ?= python3
VENV := .venv
SOURCES := setup.cfg pyproject.toml $(shell find core data extract train retrieve -type f -not -path '*/__pycache__/*')

.PHONY: demo test test-all check format clean

# Install the package as a user does, not linked: then what setup.cfg forgets is missing here too.
$(VENV)/installed: $(SOURCES)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	rm -rf build
	$(VENV)/bin/pip install --disable-pip-version-check --quiet '.[dev]'
	$(VENV)/bin/pip install --disable-pip-version-check --quiet --force-reinstall --no-deps .
	touch $@

demo: $(VENV)/installed
	$(VENV)/bin/svb demo

test: $(VENV)/installed
	$(VENV)/bin/python -m pytest -n 2

test-all: $(VENV)/installed
	$(VENV)/bin/python -m pytest -n 2 -m "slow or not slow"

check: $(VENV)/installed
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	cd $(VENV) && bin/mypy --config-file ../setup.cfg -p svb

format: $(VENV)/installed
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

clean:
	rm -rf build $(VENV) demo
