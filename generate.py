"""``python generate.py`` is ``python -m mlx_janus.generate``."""

from mlx_janus.generate import main

if __name__ == "__main__":
    main(prog_name="python generate.py")
