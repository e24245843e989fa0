# Two commands do everything on a fresh machine with Python 3.11 and make: `make run` and `make test`.

PYTHON ?= python3
JOBS ?= 2 # processes that run tests; 0: this one, for ARGS=--pdb
BIN := .venv/bin
UV := $(shell uv --version >/dev/null 2>&1 && echo uv || echo .uv/bin/uv)
export UV_CUSTOM_COMPILE_COMMAND := make lock
export ORT_DISABLE_TELEMETRY ?= 1
INSTALL := $(UV) pip install --quiet --python $(BIN)/python
WITHOUT_ONNXRUNTIME := $(UV) pip uninstall --quiet --python $(BIN)/python onnxruntime onnxruntime-openvino
COMPILE := $(UV) pip compile --quiet --universal --generate-hashes --python-version 3.11
LOCKED := core sensors torch trainer evaluation api openvino run dev

.PHONY: run test check lock bench clean help

run: .venv/.run $(if $(OPENVINO),.venv/.openvino) ## set up, then run the whole system on a simulated site (Ctrl-C stops it); OPENVINO=1
	@$(BIN)/echosight up $(ARGS)

test: .venv/.dev check ## set up, then lint, types, import directions and all tests
	@$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile $(ARGS)

check: .venv/.dev
	@$(BIN)/ruff format --check --quiet . && $(BIN)/ruff check --quiet . && $(BIN)/mypy && $(BIN)/lint-imports --no-logo

bench: .venv/.bench ## run every benchmark, each against its named reference
	@for script in $$(grep -l '^if __name__' benchmarks/*.py); do echo "== $$script"; $(BIN)/python $$script || exit 1; done

lock: ## write the requirement files anew, with today's versions
	$(COMPILE) requirements/uv.in -o requirements/uv.txt
	$(COMPILE) $(UPGRADE) requirements/bench.in -o requirements/bench.txt
	@for name in $(LOCKED); do \
	  $(COMPILE) requirements/$$name.in -c requirements/bench.txt -o requirements/$$name.txt || exit 1; done

clean: ## remove the virtual environments; data under var/ stays
	rm -rf .venv .uv

help:
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

.uv/bin/uv:
	$(PYTHON) -m venv .uv
	.uv/bin/pip install --quiet --disable-pip-version-check --require-hashes -r requirements/uv.txt

.venv/bin/python: | $(filter .uv/bin/uv,$(UV))
	$(UV) venv --quiet --python 3.11 .venv

# Each stamp is newer than the requirements that it stands for.
.venv/.%: requirements/%.txt pyproject.toml | .venv/bin/python
	@echo "setting up .venv from $< (the learning framework is large; this takes a while once)"
	$(if $(wildcard .venv/.openvino),$(WITHOUT_ONNXRUNTIME) && rm .venv/.openvino)
	$(INSTALL) --require-hashes -r $<
	$(INSTALL) --no-deps --no-build-isolation --editable .
	@touch $@

# The other onnxruntime: both own the same module, so one goes before the other comes.
.venv/.openvino: requirements/openvino.txt .venv/.run
	$(WITHOUT_ONNXRUNTIME)
	$(INSTALL) --require-hashes -r $<
	@touch $@
