"""Benchmarks of quality: one file each, on the pipeline's public API."""
