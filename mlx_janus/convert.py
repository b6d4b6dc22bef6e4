"""``python -m mlx_janus.convert``: the command in ``commands/convert.py``."""

from .commands.convert import main

if __name__ == "__main__":
    main(prog_name="python -m mlx_janus.convert")
