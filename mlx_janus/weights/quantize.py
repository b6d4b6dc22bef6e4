"""Quantization: the bits of every layer, by the same rules at conversion and at loading.

Guidance multiplies the errors of image logits, so the image head and the adaptors keep more bits
than a 4-bit language model. The table of image embeddings, the norms, the codec and the vision
encoder are not quantized.

The recipes are based on measurements of Janus-Tiny (``benchmarks/recipes.py --sensitivity``). One
kind of layer at a time was quantized to 4 bits. The change was measured in the guided distribution
of image tokens and in the distribution of answers.

- Relative to its size, the image head changes images by far the most, and the adaptor of images
  changes answers the most. In 6 bits, both add little to the error of a 4-bit language model, so
  ``light`` uses 6 bits for them.
- In the language model, v_proj and o_proj change images the most, and lm_head changes answers the
  most. ``balanced`` uses 4 bits, and 6 for these layers; 8 would improve little. q_proj, k_proj
  and the MLP change less for their size.
- With an 8-bit language model, an 8-bit image head and 8-bit adaptors cause a third to a half of
  the remaining divergence. They are a small part of a large model, so ``faithful`` keeps them
  float. That is better than groups of 32 everywhere.

None of MLX's small float types came as close in images as integers of similar size. A group's scale
in nvfp4 is a float of 8 bits, too small a range for weights of every size: without a scale for each
layer, weights of 0.004 lose 0.24 of their size (relative rms) and weights of 0.002 all of it. With
it they lose 0.094 at any size, next to 0.090 of integers of 4 bits. MLX's ``quantized_matmul``
knows no such scale, so ``ScaledLinear`` applies it.
 Groups of 128
could not be measured: no layer width of Janus-Tiny's language model is a multiple of 128, so its
groups hold 64 or 32 weights.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_map_with_path

from ..config import (
    BITS,
    GROUP_SIZES,
    RECIPES,
    JanusConfig,
    LayerBits,
    QuantizationConfig,
    QuantizationMode,
)
from ..errors import ConfigError, OptionError
from ..models.janus import JanusModel, generation_parts
from ..models.layers import ScaledLinear, layer_scale_of
from ..threads import computing

DEFAULT_GROUP_SIZE = 64

_BITS_AND_GROUP_SIZES: dict[QuantizationMode, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((4, 5, 6, 8), GROUP_SIZES),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}
"""The bits and the group sizes, in ascending order, that this package allows for each mode."""

_SCALED_MODES: tuple[QuantizationMode, ...] = ("nvfp4",)
"""Modes whose group scales have too small a range, so that a layer has a scale of its own."""

_PACKED = 32  # MLX packs so many weights of a layer together


@dataclass(frozen=True)
class Precision:
    """The quantization that a rule asks for in a layer."""

    bits: int  # per weight
    group_size: int = DEFAULT_GROUP_SIZE  # largest number of weights that share a scale
    mode: QuantizationMode = "affine"


@dataclass(frozen=True)
class Rule:
    """The precision of every linear layer that is quantized."""

    language: Precision  # for the language model, including lm_head
    sensitive: Precision | None  # for the adaptors and the image head; None keeps them float
    # Exceptions in the language model, by the last name in a layer's path: q_proj, lm_head, ...
    exceptions: Mapping[str, Precision] = field(default_factory=dict)

    def precision_of(self, path: str, sensitive_parts: Collection[str]) -> Precision | None:
        """Return the precision of a linear layer, or None to keep it float.

        Layers outside the language model and the sensitive parts stay float.

        Args:
            path: the layer's path in the model, such as "gen_head.output_mlp_projector".
            sensitive_parts: names of the model's adaptors and image head.
        """
        part = path.partition(".")[0]
        if part == "language_model":
            layer_name = path.rpartition(".")[2]
            return self.exceptions.get(layer_name, self.language)
        return self.sensitive if part in sensitive_parts else None


RULES = {  # the arguments of a ``Rule``: language, sensitive, exceptions
    "light": Rule(Precision(4, 128), Precision(6)),
    "balanced": Rule(
        Precision(4), Precision(8), dict.fromkeys(("v_proj", "o_proj", "lm_head"), Precision(6))
    ),
    "faithful": Rule(Precision(8), None),
    "mxfp4": Rule(Precision(4, 32, "mxfp4"), Precision(8)),
    "mxfp8": Rule(Precision(8, 32, "mxfp8"), Precision(8)),
    "nvfp4": Rule(Precision(4, 16, "nvfp4"), Precision(8)),
}


def choose_rule(
    bits: int | None, recipe: str | None, group_size: int = DEFAULT_GROUP_SIZE
) -> Rule | None:
    """Return the rule for ``bits`` or for a recipe; None if both are None.

    Args:
        bits: 4 or 8 bits per weight of the language model.
        recipe: one of ``RECIPES``.
        group_size: 32, 64 or 128. It is ignored with a recipe, which has its own.

    Raises:
        OptionError: a value is invalid, or both bits and recipe are set.
    """
    if recipe is not None:
        if bits is not None:
            raise OptionError("bits and a recipe are two ways to say one thing: give one of them")
        if recipe not in RECIPES:
            raise OptionError(f"recipe must be one of {', '.join(RECIPES)}, got {recipe!r}")
        return RULES[recipe]
    if bits is None:
        return None
    if bits not in BITS:
        raise OptionError(f"bits must be 4 or 8, got {bits!r}")
    if group_size not in GROUP_SIZES:
        raise OptionError(f"group size must be 32, 64 or 128, got {group_size!r}")
    return Rule(language=Precision(bits, group_size), sensitive=Precision(8, group_size))


def plan_quantization(
    config: JanusConfig,
    bits: int | None = None,
    group_size: int = DEFAULT_GROUP_SIZE,
    *,
    recipe: str | None = None,
) -> QuantizationConfig | None:
    """Plan the bits and group size of every layer; return None if bits and recipe are None.

    The options are those of ``choose_rule``. The group size is an upper limit: each layer gets the
    largest allowed size that fits its shape. If there is none, the layer stays float. An
    example is the first layer of ``gen_aligner``, whose input has a width of 8.

    Raises:
        OptionError: an option is invalid, both bits and recipe are set, or no layer of the model
            is wide enough.
    """
    rule = choose_rule(bits, recipe, group_size)
    return plan_by_rule(config, rule, recipe) if rule else None


@computing
def plan_by_rule(config: JanusConfig, rule: Rule, recipe: str | None = None) -> QuantizationConfig:
    """Plan the bits and group size of every layer by a rule.

    ``recipe`` is the rule's name, which the config records; None if the rule has no name.

    Raises:
        OptionError: no layer of the model is wide enough.
    """
    layers: list[LayerBits] = []
    kept_float: list[str] = []  # layers that the rule quantizes, but whose shapes no group fits
    # The vision adaptor, then the image pathway's adaptor and head.
    sensitive_parts = ("aligner", *generation_parts(config).sensitive)
    for path, module in JanusModel(config).named_modules():  # its weights are lazy
        if not isinstance(module, nn.Linear):
            continue
        precision = rule.precision_of(path, sensitive_parts)
        if precision is None:
            continue
        size = _largest_group_size(module.weight.shape, precision)
        if size is None:
            kept_float.append(path)
            continue
        mode = precision.mode
        scaled = mode in _SCALED_MODES
        layers.append(LayerBits(path, precision.bits, size, mode, scaled))
    if not layers:
        raise OptionError(
            "no layer of this model is wide enough to be quantized: "
            "leave bits=... and recipe=... out"
        )
    layers.sort(key=lambda layer: layer.path)
    return QuantizationConfig(
        bits=rule.language.bits,
        group_size=rule.language.group_size,
        layers=tuple(layers),
        kept_float=tuple(sorted(kept_float)) or None,
        recipe=recipe,  # type: ignore[arg-type]
    )


def _largest_group_size(shape: Sequence[int], precision: Precision) -> int | None:
    """Return the largest allowed group size that fits a weight of shape (out, in), or None.

    The precision's mode allows some sizes, and its ``group_size`` is their upper limit.
    """
    _, sizes = _BITS_AND_GROUP_SIZES[precision.mode]
    for size in reversed(sizes):  # largest first
        if size <= precision.group_size and _fits(shape, size):
            return size
    return None


def _fits(shape: Sequence[int], group_size: int) -> bool:
    """Return whether MLX can quantize a weight of shape (out, in) in groups of this size.

    Groups divide the input width, and the whole weight is packed in blocks of ``_PACKED``.
    """
    return shape[-1] % group_size == 0 and math.prod(shape) % _PACKED == 0


def quantize_model(model: JanusModel, quantization: QuantizationConfig) -> None:
    """Replace the layers that ``quantization`` lists by quantized ones, in place and lazily.

    Raises:
        ConfigError: a listed layer is not a linear layer of the model, its mode does not allow its
            bits, group size or scale, or the group size does not fit its shape.
    """
    listed = {layer.path: layer for layer in quantization.layers}
    modules = dict(model.named_modules())
    for path, layer in listed.items():
        module = modules.get(path)
        if not isinstance(module, nn.Linear):
            raise ConfigError(
                f"quantization lists {path!r}, which is no linear layer of this model"
            )
        bits, group_sizes = _BITS_AND_GROUP_SIZES[layer.mode]
        allowed = layer.bits in bits and layer.group_size in group_sizes
        scale_allowed = layer.mode in _SCALED_MODES or not layer.scaled
        if not (allowed and scale_allowed and _fits(module.weight.shape, layer.group_size)):
            raise ConfigError(
                f"quantization of {path!r} with {layer.bits} bits "
                f"in groups of {layer.group_size} ({layer.mode}) is off"
            )

    def quantized(path: str, module: nn.Module) -> nn.Module:
        """Return a layer of the model in quantized form, or as it is if it is not listed."""
        layer = listed.get(path)
        if layer is None:
            return module
        kind = ScaledLinear if layer.scaled else nn.QuantizedLinear
        return kind.from_linear(module, layer.group_size, layer.bits, layer.mode)

    leaves = model.leaf_modules()
    model.update_modules(tree_map_with_path(quantized, leaves, is_leaf=nn.Module.is_module))


def quantize_array(weight: mx.array, layer: LayerBits) -> dict[str, mx.array]:
    """Quantize a float weight of shape (out, in), and return the resulting arrays by name.

    They are the packed weight, the scales of its groups, in the affine mode their biases, and the
    scale of the layer if it is ``scaled``.
    """
    arrays = {}
    if layer.scaled:
        scale = layer_scale_of(weight)
        weight = weight / scale
        arrays["layer_scale"] = scale
    parts = mx.quantize(weight, group_size=layer.group_size, bits=layer.bits, mode=layer.mode)
    return dict(zip(("weight", "scales", "biases"), parts, strict=False)) | arrays  # 2 or 3 parts


def bits_per_weight(layer: LayerBits, scale_bits: int = 16) -> float:
    """Return the bits per weight of a quantized layer, including the scale and bias of each group.

    Args:
        layer: the layer's bits, group size and mode.
        scale_bits: bits of a scale, and also of a bias, in the affine mode. The other modes have
            scales of 8 bits and no biases.
    """
    per_group = 2 * scale_bits if layer.mode == "affine" else 8
    return layer.bits + per_group / layer.group_size
