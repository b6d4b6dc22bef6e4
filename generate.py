"""``python generate.py`` is ``python -m mlx_janus.generate``."""

from mlx_janus.generate import main

main(prog_name="python generate.py")
