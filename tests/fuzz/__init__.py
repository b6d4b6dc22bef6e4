"""Fuzzing of every reader of foreign data: ``make fuzz``, or ``python -m tests.fuzz --help``."""
