"""Write the reference of ``doctor --check``: ``python docs/write_selfcheck.py``.

The folder is ``mlx_janus/assets/check``. It holds a converted fixture model, and a cut of the
numbers that DeepSeek's code computed with it (``tests/fixtures``). The tests fail if it is stale.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
FIXTURE = ROOT / "tests" / "fixtures" / "deepseek-pro-bin"
GOLDEN = FIXTURE.with_name("deepseek-pro-bin.golden.safetensors")
TARGET = ROOT / "mlx_janus" / "assets" / "check"

# Arrays that are kept whole.
WHOLE = (
    "image.0.rgb",
    "image.0.pixel_values",
    "text.input_ids",
    "text.embeds",
    "text.layer0",
    "text.hidden",
    "text.logits_last4",
    "gen_embeds.ids",
    "gen_embeds.out",
    "gen_head.in",
    "gen_head.out",
    "gen.tokens",
    "gen.greedy_tokens",
    "gen.greedy.margin",
    "gen.hidden",
    "gen.logits_cfg",
    "und.input_ids",
    "und.hidden",
    "und.greedy_tokens",
    "und.greedy.margin",
    "und.greedy_logits",
)
# Arrays of two images, of which one is enough.
FIRST_ROW = (
    "vision.pixel_values",
    "vision.embed",
    "vision.block0",
    "vision.out",
    "aligner.out",
    "vq.codes",
    "vq.quant",
    "vq.dec_mid",
    "vq.dec",
    "vq.enc_in",
    "vq.enc_quant_conv",
    "vq.enc_indices",
    "vq.enc.margin",
)


def cut_numbers() -> dict[str, np.ndarray]:
    """Return the chosen arrays of the reference; integers have 32 bits."""
    golden = load_file(GOLDEN)
    numbers = {name: golden[name] for name in WHOLE}
    numbers |= {name: golden[name][:1] for name in FIRST_ROW}
    for name, array in numbers.items():
        if array.dtype == np.int64:
            array = array.astype(np.int32)
        numbers[name] = np.ascontiguousarray(array)
    return numbers


def planned_groups() -> dict[str, str]:
    """Return the group size of every quantized layer, as JSON by model and bits."""
    from mlx_janus.config import JanusConfig
    from mlx_janus.weights.names import TINY
    from mlx_janus.weights.quantize import plan_quantization

    groups = {}
    for name, folder in (("check", TARGET), ("tiny", TINY)):
        config = JanusConfig.load(folder / "config.json")
        for bits in (4, 8):
            plan = plan_quantization(config, bits)
            assert plan is not None
            sizes = {layer.path: [layer.bits, layer.group_size] for layer in plan.layers}
            groups[f"{name}.{bits}"] = json.dumps(sizes, sort_keys=True)
    return groups


def main() -> int:
    """Convert the fixture model, and write the numbers beside it."""
    sys.path.insert(0, str(ROOT))
    from mlx_janus.weights.convert import Source, convert_checkpoint

    shutil.rmtree(TARGET, ignore_errors=True)
    convert_checkpoint(Source(FIXTURE, FIXTURE.name), TARGET)
    path = TARGET / "reference.safetensors"
    save_file(cut_numbers(), path, metadata=planned_groups())
    path.chmod(0o644)
    return 0


if __name__ == "__main__":
    sys.exit(main())
