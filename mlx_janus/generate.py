"""``python -m mlx_janus.generate``: the command in ``commands/generate.py``."""

from .commands.generate import main

if __name__ == "__main__":
    main(prog_name="python -m mlx_janus.generate")
