"""``python -m mlx_janus.chat``: the command in ``commands/chat.py``."""

from .commands.chat import main

if __name__ == "__main__":
    main(prog_name="python -m mlx_janus.chat")
