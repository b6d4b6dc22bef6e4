"""``python convert.py`` is ``python -m mlx_janus.convert``."""

from mlx_janus.commands.convert import main

if __name__ == "__main__":
    main(prog_name="python convert.py")
