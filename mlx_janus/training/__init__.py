"""Training in MLX: the recipe of Janus-Tiny, stage by stage, in a loop that survives being killed."""
