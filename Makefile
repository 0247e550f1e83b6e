# `make demo` and `make test` are all one needs; each prepares .venv first (PYTHON= chooses the interpreter).
# `make test-latest` and `make demo LATEST=1` do so with today's torch, in .venv-latest.
LATEST ?=
VENV ?= $(if $(LATEST),.venv-latest,.venv)
export PYTHON VENV

.PHONY: demo test coverage test-latest test-newest lint docs
demo:
	@bash tools/setup.sh $(if $(LATEST),latest,demo)
	@$(VENV)/bin/python tools/demo.py $(ARGS)

test:
	@bash tools/setup.sh test
	@$(VENV)/bin/python -m pytest -n 2 --dist loadfile $(ARGS)

# The share of plugins/ that the suite runs, with what it starts and forks (pyproject.toml: tool.coverage).
coverage:
	@bash tools/setup.sh test
	@$(VENV)/bin/coverage erase
	@$(VENV)/bin/coverage run -m pytest -n 2 --dist loadfile $(ARGS)
	@$(VENV)/bin/coverage combine --quiet
	@$(VENV)/bin/coverage report

# What needs neither mmcv's operators nor fairseq, which are built for older versions of torch.
LATEST_TESTS = plugins/selfkd plugins/selfkd_torch plugins/selfkd_lightning plugins/selfkd_transformers tests/selfkd \
    tests/selfkd_torch tests/selfkd_lightning tests/selfkd_transformers tests/selfkd_mmengine tests/selfkd_mmpretrain
test-latest:
	@VENV=.venv-latest bash tools/setup.sh latest
	@.venv-latest/bin/python -m pytest -n 2 --dist loadfile $(wildcard $(LATEST_TESTS)) $(ARGS)
	@.venv-latest/bin/python -m pytest -n 2 tests/promises/test_promises.py -k 'torch- or lightning- or transformers-'

# The core and own loops with the newest releases that the index has, in .venv-newest, made anew each time.
test-newest:
	@$(or $(PYTHON),python3) -m venv --clear .venv-newest
	@.venv-newest/bin/pip install -qq --disable-pip-version-check '.[test,metrics]' numpy torchvision packaging
	@.venv-newest/bin/python -m pytest -p no:cacheprovider tests/selfkd tests/selfkd_torch $(ARGS)

lint:
	@bash tools/setup.sh test
	@$(VENV)/bin/ruff check --no-cache . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy
	@if command -v actionlint >/dev/null; then actionlint; else echo 'no actionlint here: .github/workflows was not checked'; fi

# The documentation site, in site/; an error for each broken link and missing reference.
docs: .venv-docs/.made
	@NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet $(ARGS)
	@echo site/index.html

.venv-docs/.made: requirements/docs.txt requirements/constraints-docs.txt
	@$(or $(PYTHON),python3.11) -m venv --clear .venv-docs
	@.venv-docs/bin/pip install -qq --disable-pip-version-check -r requirements/docs.txt -c requirements/constraints-docs.txt
	@touch $@
