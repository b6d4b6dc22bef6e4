"""Changing images as the published code of Janus-4o does, on the pro folder's weights.

The reference's numbers are in ``fixtures/janus4o.golden.safetensors``.
"""
