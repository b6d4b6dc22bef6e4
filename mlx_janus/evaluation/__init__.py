"""Benchmarks of quality, over the pipeline's public API."""
