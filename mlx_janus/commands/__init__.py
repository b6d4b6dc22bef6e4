"""The commands, one file each, and the parts that they share. The only place that knows click."""
