"""Caption every image of a folder, as JSON lines. (``mlx-janus caption`` does more.)

Without a model, this uses Janus-Tiny:
    python examples/caption_folder.py FOLDER
    python examples/caption_folder.py FOLDER deepseek-ai/Janus-Pro-1B > captions.jsonl
"""

import json
import sys
from pathlib import Path

import mlx_janus


def main(folder: str, model: str | None = None) -> None:
    janus = mlx_janus.load(model)
    for path in sorted(Path(folder).glob("*.png")) + sorted(Path(folder).glob("*.jp*g")):
        result = janus.generate_text("Describe the picture.", path, max_tokens=128)
        print(json.dumps({"path": str(path), "text": result.text}, ensure_ascii=False), flush=True)


if len(sys.argv) < 2:
    sys.exit(__doc__)
try:
    main(*sys.argv[1:3])
except mlx_janus.JanusError as error:
    sys.exit(f"Error: {error}")
