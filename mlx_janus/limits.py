"""Bounds that several layers check, in one place."""
