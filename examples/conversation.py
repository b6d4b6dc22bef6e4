"""Generate an image and ask about it; the second question reads only its own tokens.

Without a model, this uses Janus-Tiny:
    python examples/conversation.py
    python examples/conversation.py deepseek-ai/Janus-Pro-1B
"""

import sys

import mlx_janus


def main(model: str | None = None) -> None:
    talk = mlx_janus.load(model).conversation()
    talk.draw("a blue square", seed=1)
    for question in ("What colour is the square?", "How many shapes are there?"):
        answer = talk.send(question)
        read = answer.prompt_tokens - answer.cached_tokens
        print(f"{question} {answer.text} ({read} of {answer.prompt_tokens} tokens read)")
    print(talk.save("janus.json"))


try:
    main(*sys.argv[1:2])
except mlx_janus.JanusError as error:
    sys.exit(f"Error: {error}")
