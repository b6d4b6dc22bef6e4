# Everything runs with the active environment's python, or the one given: make test PYTHON=.venv/bin/python
PYTHON ?= python

.PHONY: lint format check test fuzz bench bench-real-size bench-serving clean

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(PYTHON) -c "from importlinter.cli import lint_imports_command; lint_imports_command()"
	$(PYTHON) docs/check_voice.py

format:
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

# The linters and a part of the tests: laws, reference numbers, one path through each command.
check: lint
	$(PYTHON) -m pytest -m check

test:
	$(PYTHON) -m pytest

# Random damage to every kind of file and request that is read: make fuzz FUZZ="--minutes 60 --jobs 4"
FUZZ ?=

fuzz:
	$(PYTHON) -m tests.fuzz $(FUZZ)

bench:
	$(PYTHON) benchmarks/bench.py

bench-real-size:
	$(PYTHON) benchmarks/real_size.py

bench-serving:
	$(PYTHON) benchmarks/serving.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage .venv-test
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +
