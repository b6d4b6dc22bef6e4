"""Generate two images with progress, and save previews halfway.

Without a model, this uses Janus-Tiny:
    python examples/draw.py
    python examples/draw.py "a red fox" deepseek-ai/Janus-Pro-1B
"""

import sys

import mlx_janus


def main(prompt: str = "a red circle above a blue square", model: str | None = None) -> None:
    janus = mlx_janus.load(model)
    for step in janus.stream_images(prompt, n=2, seed=7):
        print(f"\r{step.index} of {step.total} tokens", end="", file=sys.stderr)
        if step.index == step.total // 2 and not step.images:
            for number, preview in enumerate(step.preview(), 1):
                preview.save(f"janus_half_{number}.png")
        for image in step.images:
            print(f"\n{image.save('janus.png')} seed {image.seed}")


try:
    main(*sys.argv[1:3])
except mlx_janus.JanusError as error:
    sys.exit(f"Error: {error}")
