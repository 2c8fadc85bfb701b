# stride-lightning: `make demo` and `make test` set up everything they need.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The stamp is written last, so an interrupted installation is repeated and a complete one is not.
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test messages lint bench clean .venv

help:  ## Show this list
	@awk -F ':.*## ' '/^[.a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv: $(STAMP)  ## Install the package and its tools into .venv

demo: $(STAMP)  ## Attribute handwritten digits to their training examples
	$(BIN)/python examples/attribute_digits.py

# Two processes of one thread each: for the tiny models of the tests a second thread only waits.
test: $(STAMP)  ## Run the tests and the examples in the docstrings
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadscope $(ARGS)

messages: $(STAMP)  ## Run the tests and write tests/messages.txt, the errors and warnings that they provoke
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p tests.helpers.messages.harvest --numprocesses 2 --dist loadscope $(ARGS)

lint: $(STAMP)  ## Check style, formatting, types (those of README and docs too) and the order of the rooms
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m tests.helpers.readme build/README.py build/your_model.py build/your_data.py
	$(BIN)/pyright stride_lightning build/README.py build/your_model.py build/your_data.py
	$(BIN)/lint-imports

bench: $(STAMP)  ## Run the benchmarks (with TRUTH=file.npz those too that compare with retrained models)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[bench]"
	for script in $$(grep -LE '"--(truth|retrained)"' benchmarks/*.py); do $(BIN)/python "$$script" || exit 1; done
	$(if $(TRUTH),for script in $$(grep -l '"--truth"' benchmarks/*.py); do $(BIN)/python "$$script" --truth $(TRUTH) || exit 1; done)

clean:  ## Remove the environment and everything generated
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .import_linter_cache lightning_logs
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and alone: an exact version is already there when the other packages ask for it.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "constraints.txt needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@
