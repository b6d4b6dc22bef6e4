"""``python chat.py`` is ``python -m mlx_janus.chat``."""

from mlx_janus.commands.chat import main

if __name__ == "__main__":
    main(prog_name="python chat.py")
