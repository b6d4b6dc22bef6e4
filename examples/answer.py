"""Ask about a picture, word by word: ``python examples/answer.py MODEL PICTURE "What is this?"``."""

import sys

import mlx_janus

if len(sys.argv) != 4:
    sys.exit(__doc__)
model, picture, question = sys.argv[1:]

try:
    janus = mlx_janus.load(model)
    for chunk in janus.stream_text(question, picture, max_tokens=256):
        print(chunk.text, end="", flush=True)
        if chunk.result is not None:
            print(f"\n{len(chunk.result.tokens)} tokens, {chunk.result.generation_tps:.1f} a second", file=sys.stderr)
except mlx_janus.JanusError as error:
    sys.exit(f"Error: {error}")
