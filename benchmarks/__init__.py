"""Measurements and what they need: model folders with random weights, real photographs."""
