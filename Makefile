# `make help` lists the targets. Needs Python 3.11+ with venv, git, make and g++; everything else goes into .venv.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

PYTHON ?= python3
BIN := .venv/bin
# uv from the PATH, or one of our own.
UV := $(shell command -v uv || echo .venv-uv/bin/uv)
READY := .venv/.ready
BENCHMARKS = $(sort $(wildcard benchmarks/[a-z]*.py))

.PHONY: help
help: ## list the targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

.PHONY: setup
setup: $(READY) ## make the environment in .venv; at once where nothing changed

# The stamp is touched last: a set-up that was broken off is done again, and what is there already is kept.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; name another one: make PYTHON=python3.12")'
	@command -v $${CXX:-c++} >/dev/null || { echo "A C++ compiler is needed: install g++." >&2; exit 2; }
	@test -x "$(UV)" || { $(PYTHON) -m venv .venv-uv && .venv-uv/bin/pip install --quiet uv; }
	$(UV) sync --all-extras --compile-bytecode --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')"
	$(BIN)/python -m prima_ray.training.engine_build
	@touch $@

.PHONY: demo
demo: setup ## every stage on generated data with small models, in minutes
	$(BIN)/prima demo

.PHONY: test
test: setup lint types imports ## everything that can be tested on this machine
	@logs=$$(mktemp -d); trap 'kill %1 2>/dev/null || true; rm -rf "$$logs"' EXIT; status=0; export COLUMNS=200; \
	echo "Unit tests run meanwhile, and are shown when they are done."; \
	$(BIN)/pytest tests/unit > "$$logs/unit" 2>&1 & unit=$$!; \
	$(BIN)/pytest tests/distributed tests/e2e tests/ray 2>&1 | tee "$$logs/others" || status=$$?; \
	wait $$unit || status=$$?; cat "$$logs/unit"; echo "And in short, what failed of either:"; \
	grep -hE '^(E  |FAILED|ERROR)' "$$logs/others" "$$logs/unit" | cut -c -400 | tail -n 20 || true; \
	tail -n 1 "$$logs/unit"; tail -n 1 "$$logs/others"; exit $$status

.PHONY: check
check: setup lint types imports unit ## what to run before every commit

.PHONY: lint types imports unit
lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
types: setup
	$(BIN)/mypy
imports: setup
	$(BIN)/lint-imports
unit: setup
	$(BIN)/pytest tests/unit

.PHONY: bench
bench: setup ## every benchmark, one after the other; one that needs a GPU says so
	@for benchmark in $(BENCHMARKS); do echo "== $$benchmark"; $(BIN)/python $$benchmark || [ $$? = 2 ]; done

docs/images/phantoms.jpg: prima_ray/data/phantoms.py prima_ray/data/phantom_pictures.py | $(READY)
	$(BIN)/python -c 'from prima_ray.data.phantoms import sample_sheet; sample_sheet().save("$@", quality=82)'

.PHONY: clean
clean: ## remove caches and build outputs; .venv and runs stay
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find prima_ray tests jobs benchmarks -name __pycache__ -type d -exec rm -rf {} +
