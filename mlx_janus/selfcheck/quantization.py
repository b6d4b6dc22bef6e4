"""The part "quantization": quantized layers against their own weights, unpacked by numpy.

The reference has no quantized model. A quantized layer is right if it has the recorded bits and
group size, and computes the same as a float layer with the unpacked weights. Janus-Tiny is used,
since its layers have several groups in a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten

from ..config import Dtype
from ..models.janus import JanusModel
from ..weights.names import TINY
from .findings import Bound, Check, Status, failed, judge, on_device
from .numbers import float_bound
from .reference import FOLDER, Precision, load_at, recorded_groups, relative_rms

PART = "quantization"
_TYPES: tuple[Dtype, ...] = ("float32", "float16", "bfloat16")
PRECISIONS = tuple(Precision(dtype, bits) for bits in (8, 4) for dtype in _TYPES)
_MODELS = {"check": FOLDER, "tiny": TINY}
_TOKENS = {"cpu": 1, "gpu": 24}  # text tokens of a prompt; half precision is slow on a CPU


def check_quantization(
    device: str, precisions: Sequence[Precision] = PRECISIONS
) -> Iterator[Check]:
    """Yield checks of the group sizes of quantized layers, and of what the layers compute.

    Args:
        device: "cpu" or "gpu".
        precisions: float types, each alone or with the bits of quantized weights.
    """
    for bits in sorted({precision.bits for precision in precisions if precision.bits}):
        for name, folder in _MODELS.items():
            with on_device(device):
                yield _check_groups(name, folder, bits, device)
    for precision in precisions:
        try:
            deviation = _deviation_from_unpacked(device, precision)
        except Exception as error:  # a broken installation can fail in any way
            yield failed(PART, "products", device, precision.name, error)
            continue
        bound = _products_bound(precision.dtype, device)
        yield judge(PART, "products", device, precision.name, deviation, bound)


def _products_bound(dtype: Dtype, device: str) -> Bound:
    """Return the bound of the products in a float type.

    In half precision it is twice the bound of a stage in the part "numbers", since Janus-Tiny has
    more layers than the model of that part.
    """
    bound = float_bound(dtype, device)
    if dtype == "float32":
        return bound
    return Bound(2 * bound.ok, 2 * bound.fail, f"twice as many as a stage: {bound.reason}")


def _check_groups(name: str, folder: Path, bits: int, device: str) -> Check:
    """Check that a model's quantized layers have the bits and group sizes of ``recorded_groups``.

    ``name`` is the model's name there.
    """
    about = f"groups of the model {name!r}"
    try:
        model = load_at(folder, Precision("float32", bits))
    except Exception as error:
        return failed(PART, about, device, f"{bits} bits", error)
    wanted = recorded_groups(name, bits)
    found = {}  # [bits, group size], by the layer's path
    for path, layer in _quantized_layers(model).items():
        # The width of the layer's input. A packed item holds 32 bits of weights.
        width = layer.weight.shape[-1] * 32 // layer.bits
        found[path] = [layer.bits, width // layer.scales.shape[-1]]
    wrong = [path for path in wanted | found if wanted.get(path) != found.get(path)]
    status: Status = "fail" if wrong else "ok"
    text = f"{len(found)} layers as recorded"
    if wrong:
        path = wrong[0]
        text = f"{len(wrong)} layers differ: {path} has {found.get(path)} as bits and group size, "
        text += f"recorded are {wanted.get(path)}"
    return Check(PART, about, device, f"{bits} bits", status, text)


def _quantized_layers(model: JanusModel) -> dict[str, nn.QuantizedLinear]:
    """Return the quantized layers of a model by path."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.QuantizedLinear)
    }


def _deviation_from_unpacked(device: str, precision: Precision) -> float:
    """Return the largest deviation of a quantized Janus-Tiny from its unpacked copy on the CPU."""
    with on_device(device):
        model = load_at(TINY, precision)
        outputs = _outputs(model, _TOKENS[device])
        mx.eval(outputs)
    with on_device("cpu"):
        expected = _outputs(unpacked_copy(model), _TOKENS[device])
        pairs = zip(outputs, expected, strict=True)
        return float(np.max([relative_rms(*pair) for pair in pairs]))  # NaN counts as the greatest


def _outputs(model: JanusModel, tokens: int) -> list[mx.array]:
    """Return the text logits of a prompt, and the image logits after one more image token.

    GPUs have different kernels for one position and for many. The outputs depend on all quantized
    layers except the vision adaptor's.
    """
    cache = model.make_cache()
    hidden = model.hidden_states(model.embed_text(mx.arange(1, tokens + 1)[None]), cache)
    image_token = model.embed_image_tokens(mx.array([[1]]))
    step = model.hidden_states(image_token, cache)
    return [model.text_logits(hidden), model.image_logits(step)]


def unpacked_copy(model: JanusModel) -> JanusModel:
    """Return a float32 copy of a quantized model; its weights are unpacked by numpy."""
    copy = JanusModel(replace(model.config, quantization=None, dtype="float32"))
    layers = _quantized_layers(model)
    unpacked = {f"{path}.weight": unpack(layer) for path, layer in layers.items()}
    packed = {f"{path}.{name}" for path in layers for name in ("weight", "scales", "biases")}
    weights = [(name, mx.array(array)) for name, array in unpacked.items()]
    for name, array in tree_flatten(model.parameters()):
        if name not in packed:
            weights.append((name, mx.array(np.array(array.astype(mx.float32)))))
    copy.load_weights(weights, strict=True)
    copy.eval()
    return copy


def unpack(layer: nn.QuantizedLinear) -> np.ndarray:
    """Return the weight of a layer of 4 or 8 bits: (out, in) float32, without MLX's kernels."""
    packed = np.array(layer.weight)  # uint32, the lowest bits are the first value
    shifts = np.arange(0, 32, layer.bits, dtype=np.uint32)
    values = (packed[..., None] >> shifts) & np.uint32((1 << layer.bits) - 1)
    rows = len(packed)
    scales = np.array(layer.scales.astype(mx.float32))
    biases = np.array(layer.biases.astype(mx.float32))
    grouped = values.reshape(rows, scales.shape[-1], -1).astype(np.float32)
    return (grouped * scales[..., None] + biases[..., None]).reshape(rows, -1)
