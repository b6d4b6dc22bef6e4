"""What a person types: one file a command, and the parts that commands share. The only place that knows click."""
