"""Which layers get which bits: the one rule, at conversion and at loading.

Drawing magnifies errors of the logits by the guidance weight, so what stands next to the image tokens stays at 8 bits
when the language model takes fewer; the table of image embeddings, the norms, the codec and the vision encoder are
not quantized at all.
"""

from __future__ import annotations

import mlx.core as mx
from mlx import nn

from ..config import JanusConfig, LayerBits, QuantizationConfig
from ..errors import ConfigError, OptionError
from ..models.janus import JanusModel

BITS = (4, 8)
GROUP_SIZES = (32, 64, 128)
DEFAULT_GROUP_SIZE = 64

_CAREFUL = ("gen_head.", "gen_aligner.", "aligner.")
_CAREFUL_BITS = 8


def _bits_for(path: str, bits: int) -> int | None:
    """Bits of the linear layer at ``path``, or None to keep it float."""
    if path.startswith("language_model."):
        return bits
    return _CAREFUL_BITS if path.startswith(_CAREFUL) else None


def plan_quantization(config: JanusConfig, bits: int, group_size: int = DEFAULT_GROUP_SIZE) -> QuantizationConfig:
    """Bits and group of every layer, and which layers that the rule names stayed float.

    A layer whose input width ``group_size`` does not divide takes the largest smaller group that does, else it stays
    float (``gen_aligner``'s first layer, 8 wide, always does).

    Raises:
        OptionError: bits other than 4 and 8, or a group size other than 32, 64 and 128.
    """
    if bits not in BITS:
        raise OptionError(f"bits must be 4 or 8, got {bits!r}")
    if group_size not in GROUP_SIZES:
        raise OptionError(f"group size must be 32, 64 or 128, got {group_size!r}")
    layers, kept = [], []
    for path, module in JanusModel(config).named_modules():
        layer_bits = _bits_for(path, bits) if isinstance(module, nn.Linear) else None
        if layer_bits is None:
            continue
        width = module.weight.shape[-1]
        group = next((g for g in reversed(GROUP_SIZES) if g <= group_size and width % g == 0), None)
        if group is None:
            kept.append(path)
        else:
            layers.append(LayerBits(path=path, bits=layer_bits, group_size=group))
    if not layers:
        raise OptionError("no layer of this model is wide enough to be quantized: leave --bits out")
    layers.sort(key=lambda layer: layer.path)
    return QuantizationConfig(
        bits=bits, group_size=group_size, layers=tuple(layers), kept_float=tuple(sorted(kept)) or None
    )


def quantize_model(model: JanusModel, quantization: QuantizationConfig) -> None:
    """Replace the listed layers by quantized ones, in place; float weights are quantized lazily.

    Raises:
        ConfigError: the list names a layer that the model does not have, or a group that does not divide its width.
    """
    wanted = {layer.path: layer for layer in quantization.layers}
    modules = dict(model.named_modules())
    for path, layer in wanted.items():
        module = modules.get(path)
        if not isinstance(module, nn.Linear):
            raise ConfigError(f"quantization lists {path!r}, which is no linear layer of this model")
        if module.weight.shape[-1] % layer.group_size or layer.bits not in BITS or layer.group_size not in GROUP_SIZES:
            raise ConfigError(f"quantization of {path!r} with {layer.bits} bits in groups of {layer.group_size} is off")

    def choice(path: str, _: nn.Module) -> bool | dict[str, int]:
        layer = wanted.get(path)
        return {"bits": layer.bits, "group_size": layer.group_size} if layer else False

    nn.quantize(model, class_predicate=choice)


def quantize_array(weight: mx.array, layer: LayerBits) -> dict[str, mx.array]:
    """(out, in) float -> packed weight, scales and biases under their parameter names."""
    packed, scales, biases = mx.quantize(weight, group_size=layer.group_size, bits=layer.bits)
    return {"weight": packed, "scales": scales, "biases": biases}
