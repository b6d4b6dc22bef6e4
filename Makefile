# Everything runs with the active environment's python, or the one given: make test PYTHON=.venv/bin/python
PYTHON ?= python

.PHONY: lint format check test fuzz bench bench-real-size bench-serving dist try-wheel clean

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

# make bench REPORT=mac.md also writes the table and a description of the machine to a new file.
bench:
	$(PYTHON) benchmarks/bench.py $(if $(REPORT),--report "$(REPORT)")

bench-real-size:
	$(PYTHON) benchmarks/real_size.py

bench-serving:
	$(PYTHON) benchmarks/serving.py

# The source distribution, and the wheel that is built from it. Needs the extra "release".
dist:
	rm -rf dist
	$(PYTHON) -m build
	$(PYTHON) -m twine check --strict dist/*

# The wheel in a fresh environment. make try-wheel REPORT=report.md also keeps the report of `mlx-janus doctor --check`.
try-wheel:
	PYTHON="$(PYTHON)" bash .ci/try-wheel "$(or $(REPORT),build/report.md)"

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage .venv-test
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +
