"""The shapes benchmark: scores of answers and drawings on scenes held out of training.

Images of the shapes world have known contents, and the world's judge reads generated images, so
every score is exact. All parts use the defaults of ``generate_text`` and ``generate_images``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..errors import JanusError
from ..models.vq_parts import token_config
from ..worlds import shapes
from .answers import measure_attributes, measure_existence
from .codec import measure_codec
from .drawing import measure_drawing
from .question_forms import measure_forms
from .sizes import Progress, Sizes

if TYPE_CHECKING:
    from ..pipeline import JanusPipeline


def measure(
    janus: JanusPipeline,
    sizes: Sizes | None = None,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run all parts of the benchmark, and return their scores as plain values for JSON.

    Args:
        janus: the model.
        sizes: numbers of images and prompts; None for the defaults.
        seed: seed of scenes, questions and generated images.
        progress: called after every item.

    Raises:
        JanusError: the model's images have another size than the benchmark's.
        UnsupportedModelError: the model does not generate image tokens.
    """
    side = janus.config.image_size
    if side != shapes.SIDE:
        raise JanusError(
            f"{janus.name} draws {side} pixels a side; this benchmark's pictures have {shapes.SIDE}"
        )
    defaults = token_config(janus.config)
    sizes = sizes or Sizes()
    progress = progress or (lambda *_: None)
    existence = measure_existence(janus, sizes, seed, progress)
    attributes = measure_attributes(janus, sizes, seed, progress)
    forms = measure_forms(janus, sizes, seed, progress)
    guided = measure_drawing(janus, sizes, seed, progress)
    unguided = measure_drawing(janus, sizes, seed, progress, cfg_weight=1.0)  # 1 is no guidance
    codec = measure_codec(janus, sizes, seed, progress)
    return {
        "model": janus.name,
        "seed": seed,
        "sizes": asdict(sizes),
        "existence": {strategy: asdict(scores) for strategy, scores in existence.items()},
        "attributes": attributes,
        "forms": {form: asdict(scores) for form, scores in forms.items()},
        "drawing": guided,
        "drawing_unguided": unguided,
        "guidance": defaults.cfg_weight,
        "temperature": defaults.temperature,
        "codec": codec,
    }


def table(scores: Mapping[str, Any]) -> list[str]:
    """Format the scores that ``measure`` returns as lines of Markdown: one table for each part."""
    lines = ["| existence | accuracy | F1 | yes-rate |", "|---|---|---|---|"]
    for strategy, yes_no_scores in scores["existence"].items():
        accuracy = yes_no_scores["accuracy"]
        f1 = yes_no_scores["f1"]
        yes_rate = yes_no_scores["yes_rate"]
        lines.append(f"| {strategy} | {accuracy:.1%} | {f1:.1%} | {yes_rate:.1%} |")

    attributes = scores["attributes"]
    mean = sum(attributes.values()) / len(attributes)
    lines += ["", "| attributes | right |", "|---|---|"]
    for attribute, share in attributes.items():
        lines.append(f"| {attribute} | {share:.1%} |")
    lines.append(f"| mean | {mean:.1%} |")

    lines += [
        "",
        "| form of the question | right | if the plain one is right |",
        "|---|---|---|",
    ]
    for form, form_scores in scores["forms"].items():
        right = form_scores["right"]
        right_if_plain = form_scores["right_if_plain"]
        lines.append(f"| {form} | {right:.1%} | {right_if_plain:.1%} |")

    guidance = scores["guidance"]
    lines += ["", f"| drawing | guidance {guidance:g} | none |", "|---|---|---|"]
    for task, guided in scores["drawing"].items():
        unguided = scores["drawing_unguided"][task]
        lines.append(f"| {task} | {guided:.1%} | {unguided:.1%} |")

    codec = scores["codec"]
    right_on_originals = codec["judge_right_before"]
    right_on_reconstructions = codec["judge_right_after"]
    lines += ["", "| codec | |", "|---|---|"]
    lines.append(f"| PSNR | {codec['psnr']:.1f} dB |")
    lines.append(f"| the judge is right on pictures | {right_on_originals:.1%} |")
    lines.append(f"| the judge is right on reconstructions | {right_on_reconstructions:.1%} |")
    return lines
