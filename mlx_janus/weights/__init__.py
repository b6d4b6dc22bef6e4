"""From files to modules: reading published checkpoints, converting once, quantizing, loading."""
