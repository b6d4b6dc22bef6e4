"""``python generate.py`` is ``python -m mlx_janus.generate``."""

from mlx_janus.commands.generate import main

if __name__ == "__main__":
    main(prog_name="python generate.py")
