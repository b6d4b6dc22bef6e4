"""``python caption.py`` is ``python -m mlx_janus.caption``."""

from mlx_janus.commands.caption import main

if __name__ == "__main__":
    main(prog_name="python caption.py")
