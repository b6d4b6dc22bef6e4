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

None of MLX's small float types came as close in images as integers of similar size. Groups of 128
could not be measured: no layer width of Janus-Tiny's language model is a multiple of 128, so its
groups hold 64 or 32 weights.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import mlx.core as mx
from mlx import nn

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

DEFAULT_GROUP_SIZE = 64

_FORMS: dict[QuantizationMode, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((4, 5, 6, 8), GROUP_SIZES),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}
"""Bits and group sizes of each mode, as far as MLX supports them and this package uses them."""


@dataclass(frozen=True)
class Precision:
    """Bits per weight, largest group of weights that share a scale, and mode of a layer."""

    bits: int
    group_size: int = DEFAULT_GROUP_SIZE
    mode: QuantizationMode = "affine"


@dataclass(frozen=True)
class Rule:
    """The precision of every linear layer that is quantized."""

    language: Precision  # the language model's, including lm_head
    careful: Precision | None  # the adaptors' and the image head's; None keeps them float
    # exceptions in the language model, by the last part of the path: q_proj, lm_head, ...
    exceptions: Mapping[str, Precision] = field(default_factory=dict)

    def of(self, path: str, careful_parts: Collection[str]) -> Precision | None:
        """Return the precision of a linear layer, or None to keep it float.

        Args:
            path: the layer's path in the model.
            careful_parts: names of the model's adaptors and image heads, which get the precision
                ``careful``. Layers of other parts, such as the vision encoder, stay float.
        """
        if path.startswith("language_model."):
            return self.exceptions.get(path.rpartition(".")[2], self.language)
        return self.careful if path.partition(".")[0] in careful_parts else None


RULES = {  # the arguments of a ``Rule``: language, careful, exceptions
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
        group_size: 32, 64 or 128 with ``bits``; a recipe has its own.

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
    return Rule(Precision(bits, group_size), Precision(8, group_size))


def plan_quantization(
    config: JanusConfig,
    bits: int | None = None,
    group_size: int = DEFAULT_GROUP_SIZE,
    *,
    recipe: str | None = None,
) -> QuantizationConfig | None:
    """Plan the bits and group size of every layer; None without ``bits`` and ``recipe``.

    The arguments are those of ``choose_rule``. A quantized layer gets the largest group size, up
    to the rule's, that its mode allows and that divides its input width. A layer without such a
    size stays float, such as the first layer of ``gen_aligner``, which is 8 wide.

    Raises:
        OptionError: a value is invalid, both bits and recipe are set, or no layer of the model is
            wide enough.
    """
    rule = choose_rule(bits, recipe, group_size)
    return plan_by_rule(config, rule, recipe) if rule else None


def plan_by_rule(config: JanusConfig, rule: Rule, recipe: str | None = None) -> QuantizationConfig:
    """Plan the bits and group size of every layer by a rule; ``recipe`` names it in the config.

    Raises:
        OptionError: no layer of the model is wide enough.
    """
    layers: list[LayerBits] = []
    kept_float: list[str] = []  # layers that the rule quantizes, but that are too narrow
    # The adaptors and the image head cost few bytes, and get the rule's precision ``careful``.
    careful_parts = ("aligner", *generation_parts(config).careful)
    for path, module in JanusModel(config).named_modules():
        precision = rule.of(path, careful_parts) if isinstance(module, nn.Linear) else None
        if precision is None:
            continue
        group = _largest_group(module.weight.shape[-1], precision)
        if group is None:
            kept_float.append(path)
        else:
            layers.append(
                LayerBits(path=path, bits=precision.bits, group_size=group, mode=precision.mode)
            )
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


def _largest_group(width: int, precision: Precision) -> int | None:
    """Return the largest size up to the precision's that divides a width; None if none does."""
    _, sizes = _FORMS[precision.mode]
    for size in reversed(sizes):  # largest first
        if size <= precision.group_size and width % size == 0:
            return size
    return None


def quantize_model(model: JanusModel, quantization: QuantizationConfig) -> None:
    """Replace the listed layers by quantized ones, in place; float weights are quantized lazily.

    Raises:
        ConfigError: the model has no such layer, or its width, bits and group size do not match.
    """
    wanted = {layer.path: layer for layer in quantization.layers}
    modules = dict(model.named_modules())
    for path, layer in wanted.items():
        module = modules.get(path)
        if not isinstance(module, nn.Linear):
            raise ConfigError(
                f"quantization lists {path!r}, which is no linear layer of this model"
            )
        bits, groups = _FORMS[layer.mode]
        possible = layer.bits in bits and layer.group_size in groups
        if not possible or module.weight.shape[-1] % layer.group_size:
            raise ConfigError(
                f"quantization of {path!r} with {layer.bits} bits "
                f"in groups of {layer.group_size} ({layer.mode}) is off"
            )

    def options_of(path: str, _: nn.Module) -> bool | dict[str, int | str]:
        """Return MLX's options for a layer; False to leave it float."""
        layer = wanted.get(path)
        if layer is None:
            return False
        return {"bits": layer.bits, "group_size": layer.group_size, "mode": layer.mode}

    nn.quantize(model, class_predicate=options_of)


def quantize_array(weight: mx.array, layer: LayerBits) -> dict[str, mx.array]:
    """Quantize a float weight, (out, in); return the parts by parameter name.

    The parts are the packed weight, the scales and, in the affine mode, the biases.
    """
    parts = mx.quantize(weight, group_size=layer.group_size, bits=layer.bits, mode=layer.mode)
    return dict(zip(("weight", "scales", "biases"), parts, strict=False))


def bits_a_weight(layer: LayerBits, scale_bits: int = 16) -> float:
    """Return the bits per weight of a layer, including its share of the group's scale and bias.

    Args:
        layer: bits, group size and mode.
        scale_bits: bits of a scale, and of a bias, in the affine mode: those of the float type. The
            other modes have a scale of 8 bits.
    """
    per_group = 2 * scale_bits if layer.mode == "affine" else 8
    return layer.bits + per_group / layer.group_size
