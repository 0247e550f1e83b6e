# `make demo` and `make test` are all one needs; each prepares .venv first (PYTHON= chooses the interpreter).
VENV ?= .venv
export PYTHON VENV

.PHONY: demo test lint
demo:
	@bash tools/setup.sh demo
	@$(VENV)/bin/python tools/demo.py $(ARGS)

test:
	@bash tools/setup.sh test
	@$(VENV)/bin/python -m pytest -n 2 --dist loadfile $(ARGS)

lint:
	@bash tools/setup.sh test
	@$(VENV)/bin/ruff check --no-cache . && $(VENV)/bin/ruff format --check .
