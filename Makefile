# Everything happens inside .venv: nothing is registered or written outside this folder.
PYTHON ?= python3
PROFILE ?= laptop
# Notebooks to run, by number; all without: make reproduce ONLY="00-06 20"
ONLY ?=
# Extra words for pip, e.g. a CPU-only torch:
#   make reproduce PIP_INSTALL_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_INSTALL_ARGS ?=

BIN := .venv/bin
QUIET := $(shell test -t 2 || echo --quiet)  # on a terminal pip shows how far it is
# Kernels and settings of other Jupyter installations stay out: the venv's own `python3` kernel is used.
unexport JUPYTER_PATH
unexport JUPYTER_CONFIG_PATH
unexport PYTHONPATH
unexport PYTHONHOME
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help reproduce smoke test lab bench lint hooks lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo '  PROFILE=$(PROFILE) (smoke, laptop, gpu); ONLY="00-06 20" for some notebooks'
	@echo '  PIP_INSTALL_ARGS="--extra-index-url …" for another torch wheel'

reproduce: .venv/.ready ## run every notebook and write reports/index.html (PROFILE=laptop)
	$(BIN)/python -m projectable reproduce --profile $(PROFILE) $(ONLY:%=--only %)

smoke: .venv/.ready ## run every notebook at toy size into reports/smoke/: checks that they work, shows nothing
	$(BIN)/python -m projectable reproduce --profile smoke

test: .venv/.ready ## run the tests
	$(BIN)/python -m pytest -n 2 --dist worksteal

lab: .venv/.ready ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab notebooks

bench: .venv/.bench-ready ## time the building blocks on one thread, into build/bench.json
	@mkdir -p build
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest tests/bench --benchmark-only --benchmark-json=build/bench.json

lint: .venv/.ready ## check format, style and types of the code, and what the notebooks store
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m projectable check

hooks: .venv/.dev-ready ## check every commit before it is made (pre-commit, local hooks only)
	$(BIN)/pre-commit install

lock: .venv/.dev-ready ## renew requirements.lock: the newest versions that go together
	CUSTOM_COMPILE_COMMAND='make lock' $(BIN)/pip-compile --quiet --upgrade --extra dev --strip-extras \
		--unsafe-package projectable --unsafe-package setuptools --unsafe-package pip --no-emit-options \
		--no-emit-index-url --no-emit-find-links --no-emit-trusted-host --output-file requirements.lock pyproject.toml

clean: ## remove build/ and caches; keeps reports/, runs/ and .venv
	rm -rf build .pytest_cache .ruff_cache .mypy_cache .benchmarks *.egg-info
	find projectable tests notebooks -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last, so an interrupted install is taken up again.
.venv/.ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv: up to 7 GB, most of it torch (see README.md for a smaller one)"
	$(BIN)/python -m pip install $(QUIET) $(PIP_INSTALL_ARGS) -e '.[test]'
	@touch $@

.venv/.bench-ready .venv/.dev-ready: .venv/.%-ready: .venv/.ready
	$(BIN)/python -m pip install $(QUIET) $(PIP_INSTALL_ARGS) -e '.[test,$*]'
	@touch $@
