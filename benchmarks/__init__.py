"""Measurements, and their tools: model folders with random weights, real photographs."""
