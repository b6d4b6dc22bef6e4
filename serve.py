"""``python serve.py`` is ``python -m mlx_janus.serve``."""

from mlx_janus.commands.serve import main

if __name__ == "__main__":
    main(prog_name="python serve.py")
