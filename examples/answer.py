"""Ask about an image and print the answer as it is generated.

Without an image, one is generated first, with Janus-Tiny:
    python examples/answer.py
    python examples/answer.py photo.jpg "What is this?" deepseek-ai/Janus-Pro-1B
"""

import sys

import mlx_janus


def main(
    image: str | None = None,
    question: str = "What colour is the circle?",
    model: str | None = None,
) -> None:
    janus = mlx_janus.load(model)
    subject = image or janus.generate_images("a red circle", seed=1)[0].image
    for chunk in janus.stream_text(question, subject, max_tokens=256):
        print(chunk.text, end="", flush=True)
        if chunk.result is not None:
            print()
            seconds = chunk.result.first_token_seconds
            print(f"first token after {seconds:.2f} seconds", file=sys.stderr)


try:
    main(*sys.argv[1:4])
except mlx_janus.JanusError as error:
    sys.exit(f"Error: {error}")
