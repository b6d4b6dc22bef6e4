"""Training in MLX: a loop that survives being killed, the losses of Janus, and recipes."""
