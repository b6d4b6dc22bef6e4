"""Draw two pictures and watch the first half of them appear: ``python examples/draw.py MODEL "a red fox"``."""

import sys

import mlx_janus

if len(sys.argv) != 3:
    sys.exit(__doc__)
model, prompt = sys.argv[1:]

try:
    janus = mlx_janus.load(model)
    for step in janus.stream_images(prompt, n=2, seed=7):
        if step.index == step.total // 2 and not step.images:
            for i, preview in enumerate(step.preview()):
                preview.save(f"janus_half_{i + 1}.png")
        for image in step.images:
            print(image.save("janus.png"), "seed", image.seed)
except mlx_janus.JanusError as error:
    sys.exit(f"Error: {error}")
