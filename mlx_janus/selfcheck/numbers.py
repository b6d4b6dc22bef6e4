"""The part "numbers": the reference's numbers of every stage, on each device and in each precision.

A bound has a reason:

- float32: the commonest mistake, a wrong eps, changes a stage by 4e-5 or more, so the bound is
  1e-5. Some GPUs multiply float32 matrices in units that round to 10 bits (TF32), or convolve by
  Winograd's transform. Their deviation is allowed, with a warning.
- float16 and bfloat16: 16 times the type's unit of rounding. The CPU's deviations are up to 6 times
  the unit.
- 8 and 4 bits: the change that quantization makes to this model, times 1.5, and the bound of the
  float type. The model has random weights and narrow layers, so 4 bits change it a lot. The part
  "quantization" has narrow bounds.
- The codec is always computed in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np

from ..config import Dtype
from ..models.janus import JanusModel
from ..processing.images import preprocess
from .findings import Bound, Check, Status, failed, judge, on_device
from .reference import FOLDER, Precision, load_at, reference_numbers, relative_rms
from .stages import STAGES, Stage

PART = "numbers"
PRECISIONS = (
    Precision("float32"),
    Precision("float16"),
    Precision("bfloat16"),
    Precision("float32", 8),
    Precision("float32", 4),
    Precision("bfloat16", 8),
    Precision("bfloat16", 4),
)

_FLOAT32_BOUND = 1e-5
_TF32_BOUND = 2e-3
_UNITS = {"float16": 2.0**-11, "bfloat16": 2.0**-8}  # units of rounding
_ROUNDINGS = 16  # units of rounding that a deviation may have
_QUANTIZED = {8: 0.04, 4: 0.65}  # deviation of a stage of the language model, by bits
_ADAPTOR_CHANGE = 0.011  # deviation of an adaptor or the image head, which have 8 bits
# Share of the median margin between the two best tokens. Rounding to TF32 does not change a choice
# with a larger margin.
_CLEAR_MARGIN = 0.1


def float_bound(dtype: Dtype, device: str) -> Bound:
    """Return the bound of a stage in a float type."""
    if dtype == "float32":
        if device == "cpu":
            return Bound(_FLOAT32_BOUND, _FLOAT32_BOUND, "a wrong eps exceeds it")
        reason = "a wrong eps exceeds it; up to 2e-3, the GPU may round to TF32 or use Winograd"
        return Bound(_FLOAT32_BOUND, _TF32_BOUND, reason)
    bound = _ROUNDINGS * _UNITS[dtype]
    return Bound(bound, bound, f"{_ROUNDINGS} roundings of {_UNITS[dtype]:.1e}")


def stage_bound(stage: Stage, precision: Precision, device: str) -> Bound:
    """Return the bound of a stage in a precision.

    It is the bound of the float type. For quantized weights, the change that quantization makes is
    added. The adaptors and the image head have 8 bits in each quantized precision.
    """
    bound = float_bound("float32" if stage.weights == "float32" else precision.dtype, device)
    if precision.bits is None or stage.weights in ("float32", "float"):
        return bound
    change = _ADAPTOR_CHANGE if stage.weights == "8 bits" else _QUANTIZED[precision.bits]
    bits = 8 if stage.weights == "8 bits" else precision.bits
    reason = f"{bits} bits change this random model by up to {change:g}"
    return Bound(bound.ok + change, bound.fail + change, reason)


def check_numbers(device: str, precisions: Sequence[Precision] = PRECISIONS) -> Iterator[Check]:
    """Yield a check of each stage in each precision, of types and of token choices.

    On the CPU, the preparation of images is checked too.

    Args:
        device: "cpu" or "gpu".
        precisions: float types, each alone or with the bits of quantized weights.
    """
    if device == "cpu":
        yield _check_preprocessing()
    for precision in precisions:
        with on_device(device):
            try:
                model = load_at(FOLDER, precision)
            except Exception as error:  # a broken installation can fail in any way
                yield failed(PART, "loading", device, precision.name, error)
                continue
            yield from _check_stages(model, device, precision)
            yield _check_types(model, device, precision)
            if precision == Precision("float32"):
                yield _check_choices(model, device)


def _check_stages(model: JanusModel, device: str, precision: Precision) -> Iterator[Check]:
    """Yield the check of each stage; its deviation is the largest of the stage's outputs."""
    numbers = reference_numbers()
    for stage in STAGES:
        try:
            deviations = [
                relative_rms(ours, numbers[name]) for ours, name in stage.compute(model, numbers)
            ]
        except Exception as error:
            yield failed(PART, stage.name, device, precision.name, error)
            continue
        bound = stage_bound(stage, precision, device)
        largest = float(np.max(deviations))  # nan if one is nan
        yield judge(PART, stage.name, device, precision.name, largest, bound)


def _check_types(model: JanusModel, device: str, precision: Precision) -> Check:
    """Check that the language model, its KV cache and the codec compute in the right types."""
    wanted = getattr(mx, precision.dtype)
    cache = model.make_cache()
    hidden = model.hidden_states(model.embed_text(mx.array([[1, 2]])), cache)
    pixels = model.decode_image_tokens(mx.zeros((1, 16), mx.int32))
    found = {  # the type, and the right type
        "hidden states": (hidden.dtype, wanted),
        "KV cache": (cache[0].keys.dtype, wanted),
        "pixels": (pixels.dtype, mx.float32),
    }
    wrong = [
        f"{name} are {_type_name(dtype)}, not {_type_name(right)}"
        for name, (dtype, right) in found.items()
        if dtype != right
    ]
    status: Status = "fail" if wrong else "ok"
    text = "; ".join(wrong) or f"{precision.dtype}, and float32 in the codec"
    return Check(PART, "types", device, precision.name, status, text)


def _type_name(dtype: mx.Dtype) -> str:
    """Return the name of a type: "float32"."""
    return str(dtype).removeprefix("mlx.core.")


def _check_choices(model: JanusModel, device: str) -> Check:
    """Compare tokens of an image and of the codec's encoder with the reference's.

    Only clear choices of the reference count, in which the best token is far ahead of the second.
    """
    numbers = reference_numbers()
    outputs: dict[str, mx.array] = {}
    for stage in STAGES:
        if stage.name in ("guided image logits", "codec encoder"):
            outputs |= {name: ours for ours, name in stage.compute(model, numbers)}
    drawn = np.array(mx.argmax(outputs["gen.logits_cfg"], axis=-1))
    vectors = outputs["vq.enc_quant_conv"].transpose(0, 2, 3, 1)
    encoded = np.array(model.gen_vision_model.quantize.nearest(vectors)).reshape(1, -1)
    wrong = 0
    clear = 0
    for tokens, tokens_name, margins_name in (  # the names are those of the reference's numbers
        (drawn, "gen.greedy_tokens", "gen.greedy.margin"),
        (encoded, "vq.enc_indices", "vq.enc.margin"),
    ):
        margins = numbers[margins_name]
        is_clear = margins > _CLEAR_MARGIN * np.median(margins)
        is_wrong = tokens != numbers[tokens_name]
        clear += int(is_clear.sum())
        wrong += int((is_wrong & is_clear).sum())
    status: Status = "fail" if wrong else "ok"
    text = f"{clear - wrong} of {clear} clear choices equal the reference's"
    return Check(PART, "chosen tokens", device, "float32", status, text)


def _check_preprocessing() -> Check:
    """Check that Pillow and this package prepare an image as the reference does."""
    from ..config import JanusConfig

    numbers = reference_numbers()
    config = JanusConfig.load(FOLDER / "config.json")
    try:
        from PIL import Image

        pixels = preprocess(Image.fromarray(numbers["image.0.rgb"]), config.image)
        deviation = relative_rms(pixels.transpose(2, 0, 1), numbers["image.0.pixel_values"])
    except Exception as error:
        return failed(PART, "image preparation", "", "", error)
    bound = Bound(_FLOAT32_BOUND, _FLOAT32_BOUND, "Pillow's bicubic filter is the reference's")
    return judge(PART, "image preparation", "", "", deviation, bound)
