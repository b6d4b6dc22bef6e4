"""Ask about a picture, word by word.

python examples/answer.py                                          draws a picture first, with Janus-Tiny
python examples/answer.py photo.jpg "What is this?" deepseek-ai/Janus-Pro-1B
"""

import sys

import mlx_janus


def main(
    picture: str | None = None,
    question: str = "What colour is the circle?",
    model: str | None = None,
) -> None:
    janus = mlx_janus.load(model)
    shown = picture or janus.generate_images("a red circle", seed=1)[0].image
    for chunk in janus.stream_text(question, shown, max_tokens=256):
        print(chunk.text, end="", flush=True)
        if chunk.result is not None:
            print()
            print(
                f"first token after {chunk.result.first_token_seconds:.2f} seconds", file=sys.stderr
            )


try:
    main(*sys.argv[1:4])
except mlx_janus.JanusError as error:
    sys.exit(f"Error: {error}")
