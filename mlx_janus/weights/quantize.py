"""Which layers get which bits: one rule, at conversion and at loading.

Drawing magnifies errors of the logits by the guidance weight, so what stands next to the image tokens keeps more bits
where the language model takes few; the table of image embeddings, the norms, the codec and the vision encoder are not
quantized at all.

The recipes rest on Janus-Tiny (``benchmarks/recipes.py --sensitivity``): each kind of layer alone in 4 bits, and how
far that moves the guided distribution of image tokens and the distribution of answers.

- Weight for weight the image head moves drawing most by far, and the adaptor of pictures moves answers most. In 6 bits
  both add little to what 4 bits of the language model do, so ``light`` takes 6 there.
- In the language model it is v_proj and o_proj for drawing, and lm_head for answers: ``balanced`` is 4 bits with these
  in 6. They gain little more from 8. q_proj, k_proj and the MLP move less for their size.
- With the language model in 8 bits, image head and adaptors in 8 are a third to a half of what is left of the
  distance, and they are a small part of a large model: ``faithful`` keeps them float, which is closer than groups of
  32 everywhere.

Of MLX's small floats none came as close in drawing as whole numbers of about as many bits. Groups of 128 could not be
measured: Janus-Tiny's language model has no layer that they divide, and takes 64 or 32.
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

_FORMS: dict[
    QuantizationMode, tuple[tuple[int, ...], tuple[int, ...]]
] = {  # bits and groups that MLX has, and we use
    "affine": ((4, 5, 6, 8), GROUP_SIZES),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}


@dataclass(frozen=True)
class Precision:
    """How a layer is stored: bits a weight, weights that share a scale at most, and the mode."""

    bits: int
    group_size: int = DEFAULT_GROUP_SIZE
    mode: QuantizationMode = "affine"


@dataclass(frozen=True)
class Rule:
    """The precision of every linear layer that is quantized."""

    language: Precision  # of the language model, lm_head included
    careful: Precision | None  # of the adaptors and the image head; None: float
    exceptions: Mapping[str, Precision] = field(
        default_factory=dict
    )  # in the language model: q_proj, lm_head, ...

    def of(self, path: str, careful: Collection[str]) -> Precision | None:
        """Return the precision of the linear layer at ``path``, or None to keep it float.

        Args:
            path: of the layer in the model.
            careful: names of the model's adaptors and image heads.
        """
        if path.startswith("language_model."):
            return self.exceptions.get(path.rpartition(".")[2], self.language)
        return self.careful if path.partition(".")[0] in careful else None


RULES = {
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
    """The rule that is asked for by bits or by name; None if neither is.

    Args:
        bits: 4 or 8, of the language model.
        recipe: one of ``RECIPES``.
        group_size: 32, 64 or 128, with ``bits``; a recipe has its own.

    Raises:
        OptionError: another value, or both bits and a recipe.
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
    """Bits and group of every layer, and which layers that the rule names stayed float; None if nothing is asked for.

    The arguments are those of ``choose_rule``. A layer whose input width the group does not divide takes the largest
    smaller group of its mode that does, else it stays float (``gen_aligner``'s first layer, 8 wide, always does).

    Raises:
        OptionError: as ``choose_rule``, or the model has no layer that is wide enough.
    """
    rule = choose_rule(bits, recipe, group_size)
    return plan_by_rule(config, rule, recipe) if rule else None


def plan_by_rule(config: JanusConfig, rule: Rule, recipe: str | None = None) -> QuantizationConfig:
    """What ``plan_quantization`` gives for a rule; ``recipe`` is the name that is recorded."""
    layers, kept = [], []
    careful = ("aligner", *generation_parts(config).careful)
    for path, module in JanusModel(config).named_modules():
        precision = rule.of(path, careful) if isinstance(module, nn.Linear) else None
        if precision is None:
            continue
        width, groups = module.weight.shape[-1], _FORMS[precision.mode][1]
        group = next(
            (g for g in reversed(groups) if g <= precision.group_size and width % g == 0), None
        )
        if group is None:
            kept.append(path)
        else:
            layers.append(
                LayerBits(path=path, bits=precision.bits, group_size=group, mode=precision.mode)
            )
    if not layers:
        raise OptionError(
            "no layer of this model is wide enough to be quantized: leave bits=... and recipe=... out"
        )
    layers.sort(key=lambda layer: layer.path)
    return QuantizationConfig(
        bits=rule.language.bits,
        group_size=rule.language.group_size,
        layers=tuple(layers),
        kept_float=tuple(sorted(kept)) or None,
        recipe=recipe,  # type: ignore[arg-type]
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
            raise ConfigError(
                f"quantization lists {path!r}, which is no linear layer of this model"
            )
        bits, groups = _FORMS[layer.mode]
        if (
            module.weight.shape[-1] % layer.group_size
            or layer.bits not in bits
            or layer.group_size not in groups
        ):
            raise ConfigError(
                f"quantization of {path!r} with {layer.bits} bits in groups of {layer.group_size} ({layer.mode}) is off"
            )

    def choice(path: str, _: nn.Module) -> bool | dict[str, int | str]:
        layer = wanted.get(path)
        return (
            {"bits": layer.bits, "group_size": layer.group_size, "mode": layer.mode}
            if layer
            else False
        )

    nn.quantize(model, class_predicate=choice)


def quantize_array(weight: mx.array, layer: LayerBits) -> dict[str, mx.array]:
    """(out, in) float -> packed weight, scales and, in the affine mode, biases under their parameter names."""
    parts = mx.quantize(weight, group_size=layer.group_size, bits=layer.bits, mode=layer.mode)
    return dict(zip(("weight", "scales", "biases"), parts, strict=False))


def bits_a_weight(layer: LayerBits, scale_bits: int = 16) -> float:
    """Bits that a weight of a layer takes, its share of the group's scale and bias counted.

    Args:
        layer: of a plan.
        scale_bits: of a scale and of a bias in the affine mode: the width of the float weights' type. The other modes
            have a scale of 8 bits.
    """
    return layer.bits + (2 * scale_bits if layer.mode == "affine" else 8) / layer.group_size
