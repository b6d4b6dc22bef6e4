"""Weights: reading published checkpoints, converting, quantizing, loading."""
