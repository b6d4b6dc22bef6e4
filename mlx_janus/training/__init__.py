"""Training in MLX: a loop that survives being killed, and the recipes that run in it."""
