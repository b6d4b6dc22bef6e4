"""The shapes benchmark: how well a model answers about and draws combinations held out of training.

Images of the shapes world have known contents, and the world's judge reads generated images, so
every score is exact. Three parts follow a published benchmark, at the defaults of ``generate_text``
and ``generate_images``:

- existence, after POPE (arXiv 2305.10355): "Is there a red circle?", with "yes" as often as "no",
  and three kinds of absent objects: random, popular (the most frequent in the other images),
  adversarial (like a present object except for its shape or colour);
- attributes: colour, shape, number and position;
- drawing, after GenEval (arXiv 2310.11513): six tasks, several images per prompt. An image is right
  if it holds the prompt's objects and nothing else.

A fourth part measures the codec: it compares images with their reconstructions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, permutations
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import JanusError
from ..models.vq_parts import token_config
from ..worlds import judge, language, shapes

if TYPE_CHECKING:
    from ..pipeline import JanusPipeline

NEGATIVES = ("random", "popular", "adversarial")
ATTRIBUTES = ("colour", "shape", "number", "position")
TASKS = ("single object", "two objects", "counting", "colours", "position", "colour attribution")
_POPULAR = 4  # absent objects that count as popular

Progress = Callable[[str, int, int], None]
"""Called with a part's name, its finished items and all its items."""


@dataclass(frozen=True)
class Sizes:
    """Numbers of images and prompts in each part."""

    pictures: int = 200  # images of existence (two questions per kind), and questions per attribute
    prompts: int = 24  # prompts per drawing task
    drawn: int = 4  # images per prompt
    reconstructed: int = 400  # images for the codec


@dataclass(frozen=True)
class YesNoScores:
    """POPE's scores of yes-or-no questions, from 0 to 1."""

    accuracy: float
    f1: float  # of "yes"
    yes_rate: float  # share of questions answered with "yes"
    questions: int


@dataclass(frozen=True)
class DrawingTarget:
    """A prompt, and the objects of a right image: their names and their relative position."""

    prompt: str
    things: tuple[language.Name, ...]
    relation: str | None = None  # the first's to the second; None if it does not matter

    def is_met(self, found: Sequence[judge.Detection]) -> bool:
        """Return whether an image holds these objects, in this relation, and no others."""
        if len(found) != len(self.things):
            return False
        if self.relation is None:
            return _match_one_to_one(self.things, found)
        first, second = self.things
        return any(
            _fits(first, a) and _fits(second, b) and _is_related(a, b, self.relation)
            for a, b in permutations(found, 2)
        )


def _fits(name: language.Name, one: judge.Detection) -> bool:
    """Return whether an object has a name's shape, and its colour if the name has one."""
    shape, colour = name
    return one.shape == shape and colour in ("", one.colour)


def _match_one_to_one(names: Sequence[language.Name], found: Sequence[judge.Detection]) -> bool:
    """Return whether wanted and found objects match one to one."""
    if not names:
        return not found
    for i, one in enumerate(found):
        others = [*found[:i], *found[i + 1 :]]
        if _fits(names[0], one) and _match_one_to_one(names[1:], others):
            return True
    return False


def _is_related(a: judge.Detection, b: judge.Detection, relation: str) -> bool:
    """Apply GenEval's rule: the offset points that way by more than half of its length."""
    dx = a.x - b.x
    dy = a.y - b.y
    towards = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation]
    return bool(towards > 0.5 * np.hypot(dx, dy))


def measure(
    janus: JanusPipeline,
    sizes: Sizes | None = None,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure all parts; return plain values for JSON.

    Args:
        janus: the model.
        sizes: numbers of images and prompts.
        seed: seed of scenes, questions and drawings.
        progress: called after every item.

    Raises:
        JanusError: the model's images are not as large as the benchmark's.
    """
    if janus.config.image_size != shapes.SIDE:
        raise JanusError(
            f"{janus.name} draws {janus.config.image_size} pixels a side; "
            f"this benchmark's pictures have {shapes.SIDE}"
        )
    sizes = sizes or Sizes()
    progress = progress or (lambda *_: None)
    existence = measure_existence(janus, sizes, seed, progress)
    defaults = token_config(janus.config)
    return {
        "model": janus.name,
        "seed": seed,
        "sizes": asdict(sizes),
        "existence": {kind: asdict(scores) for kind, scores in existence.items()},
        "attributes": measure_attributes(janus, sizes, seed, progress),
        "drawing": measure_drawing(janus, sizes, seed, progress),
        "drawing_unguided": measure_drawing(janus, sizes, seed, progress, cfg_weight=1.0),
        "guidance": defaults.cfg_weight,
        "temperature": defaults.temperature,
        "codec": measure_codec(janus, sizes, seed, progress),
    }


def table(scores: Mapping[str, Any]) -> list[str]:
    """Format the scores of ``measure`` as the lines of Markdown tables."""
    lines = ["| existence | accuracy | F1 | yes-rate |", "|---|---|---|---|"]
    for kind, one in scores["existence"].items():
        lines.append(
            f"| {kind} | {one['accuracy']:.1%} | {one['f1']:.1%} | {one['yes_rate']:.1%} |"
        )
    lines += ["", "| attributes | right |", "|---|---|"]
    lines += [f"| {about} | {share:.1%} |" for about, share in scores["attributes"].items()]
    mean = sum(scores["attributes"].values()) / len(scores["attributes"])
    lines += [f"| mean | {mean:.1%} |", ""]
    lines += [f"| drawing | guidance {scores['guidance']:g} | none |", "|---|---|---|"]
    for task, share in scores["drawing"].items():
        lines.append(f"| {task} | {share:.1%} | {scores['drawing_unguided'][task]:.1%} |")
    codec = scores["codec"]
    lines += ["", "| codec | |", "|---|---|", f"| PSNR | {codec['psnr']:.1f} dB |"]
    lines.append(f"| the judge is right on pictures | {codec['judge_right_before']:.1%} |")
    lines.append(f"| the judge is right on reconstructions | {codec['judge_right_after']:.1%} |")
    return lines


# Answering


def measure_existence(
    janus: JanusPipeline, sizes: Sizes, seed: int, progress: Progress
) -> dict[str, YesNoScores]:
    """Measure POPE's scores for each kind of absent object, on scenes held out of training."""
    random = np.random.default_rng([seed, 11])
    scenes = list(islice(_held_out_scenes(random), sizes.pictures))
    popular = _by_popularity(scenes)
    results = {}
    for number, kind in enumerate(NEGATIVES):
        outcomes = []
        for i, scene in enumerate(scenes):
            outcomes += _ask_about_present_and_absent(janus, scene, kind, popular, random)
            progress("existence", number * len(scenes) + i + 1, len(NEGATIVES) * len(scenes))
        results[kind] = _score_yes_no(outcomes)
    return results


def _by_popularity(scenes: Sequence[shapes.Scene]) -> list[language.Name]:
    """List the objects by the number of scenes with them, and equally frequent ones by name."""
    counts: Counter[language.Name] = Counter()
    for scene in scenes:
        counts.update({thing.name for thing in scene.things})
    return sorted(counts, key=lambda name: (-counts[name], name))


def _ask_about_present_and_absent(
    janus: JanusPipeline,
    scene: shapes.Scene,
    kind: str,
    popular: Sequence[language.Name],
    random: np.random.Generator,
) -> list[tuple[bool, bool | None]]:
    """Ask for a present and an absent object; return the truth and the answer of each.

    An answer that is neither yes nor no is None.
    """
    names = sorted({thing.name for thing in scene.things})
    candidates = [name for name in names if name in shapes.HELD_OUT] or names
    present = candidates[int(random.integers(len(candidates)))]
    absent = _absent_name(kind, names, popular, random)
    outcomes = []
    for (shape, colour), truth in ((present, True), (absent, False)):
        answer = _answer(janus, scene, language.existence_question(shape, colour, yes=truth))
        outcomes.append((truth, {"yes": True, "no": False}.get(answer)))
    return outcomes


def _absent_name(
    kind: str,
    present: Sequence[language.Name],
    popular: Sequence[language.Name],
    random: np.random.Generator,
) -> language.Name:
    """Pick an absent object of a kind in ``NEGATIVES``; any absent one if that kind is empty."""
    absent = language.absent_names(present)
    candidates = absent
    if kind == "popular":
        candidates = [name for name in popular if name not in present][:_POPULAR]
    elif kind == "adversarial":
        candidates = language.near_misses(absent, present)
    candidates = candidates or absent
    return candidates[int(random.integers(len(candidates)))]


def _score_yes_no(outcomes: Sequence[tuple[bool, bool | None]]) -> YesNoScores:
    """Score pairs of truth and answer; an answer that is neither yes nor no (None) is wrong."""
    right = sum(answer is truth for truth, answer in outcomes)
    true_positives = sum(truth and answer is True for truth, answer in outcomes)
    answered_yes = sum(answer is True for _, answer in outcomes)
    truly_yes = sum(truth for truth, _ in outcomes)
    f1 = 2 * true_positives / (answered_yes + truly_yes) if answered_yes + truly_yes else 0.0
    return YesNoScores(right / len(outcomes), f1, answered_yes / len(outcomes), len(outcomes))


def measure_attributes(
    janus: JanusPipeline, sizes: Sizes, seed: int, progress: Progress
) -> dict[str, float]:
    """Measure the share of right answers for each attribute, on scenes held out of training."""
    random = np.random.default_rng([seed, 12])
    results = {}
    for number, about in enumerate(ATTRIBUTES):
        right = 0
        items = islice(_held_out_questions(random, about), sizes.pictures)
        for i, (scene, question) in enumerate(items):
            right += _answer(janus, scene, question) == question.answer
            done = number * sizes.pictures + i + 1
            progress("attributes", done, len(ATTRIBUTES) * sizes.pictures)
        results[about] = right / sizes.pictures
    return results


def _held_out_scenes(random: np.random.Generator) -> Iterator[shapes.Scene]:
    """Yield scenes that are held out: in turn by two things together and by a shape's colour."""
    made = 0
    while True:
        scene = shapes.sample_scene(random, split="pairs" if made % 2 else "scenes")
        if scene.things:
            made += 1
            yield scene


def _held_out_questions(
    random: np.random.Generator, about: str
) -> Iterator[tuple[shapes.Scene, language.Question]]:
    """Yield held-out scenes that allow a question about an attribute, with the question."""
    for scene in _held_out_scenes(random):
        try:
            question = language.question(scene, random, about)
        except ValueError:
            continue
        yield scene, question


def _answer(janus: JanusPipeline, scene: shapes.Scene, question: language.Question) -> str:
    """Return the model's answer in lower case without a full stop."""
    result = janus.generate_text(question.text, shapes.render(scene), max_tokens=48)
    return result.text.strip().lower().rstrip(".")


# Drawing


def drawing_prompts(
    task: str, count: int, seed: int, *, held_out: bool = True
) -> list[DrawingTarget]:
    """Make the prompts of a task.

    A prompt with colours names a combination held out of training. A single shape, two shapes, or
    several of one cannot be held out; these prompts go through all possibilities in turn.

    Args:
        task: one of ``TASKS``.
        count: number of prompts.
        seed: seed of the choice.
        held_out: False for combinations of training instead, to choose settings with.
    """
    random = np.random.default_rng([seed, 13, TASKS.index(task)])
    makers = {
        "single object": _single_object,
        "two objects": _two_objects,
        "counting": _counting,
        "colours": _colours,
        "position": _position,
        "colour attribution": _attribution,
    }
    make = makers[task]
    return [make(i, random, held_out) for i in range(count)]


def _single_object(i: int, *_: Any) -> DrawingTarget:
    """Ask for one shape: "a circle"."""
    shape = shapes.SHAPES[i % 4]
    return DrawingTarget(_wordings(shape)[i // 4 % 5], ((shape, ""),))


def _two_objects(i: int, random: np.random.Generator, *_: Any) -> DrawingTarget:
    """Ask for two shapes: "a circle and a star"."""
    a, b = random.choice(shapes.SHAPES, 2, replace=False).tolist()
    text = language.listed([language.with_article(a), language.with_article(b)])
    return DrawingTarget(text, ((a, ""), (b, "")))


def _counting(i: int, *_: Any) -> DrawingTarget:
    """Ask for several of one shape: "three stars"."""
    shape = shapes.SHAPES[i % 4]
    n = 2 + i // 4 % 3
    return DrawingTarget(language.counted(n, shape), ((shape, ""),) * n)


def _colours(i: int, random: np.random.Generator, held_out: bool) -> DrawingTarget:
    """Ask for one coloured shape: "a purple circle"."""
    shape, colour = sorted(shapes.HELD_OUT)[i % len(shapes.HELD_OUT)]
    if not held_out:
        shape, colour = shapes.sample_scene(random, "single").things[0].name
    return DrawingTarget(_wordings(f"{colour} {shape}")[i // 4 % 5], ((shape, colour),))


def _wordings(noun: str) -> tuple[str, ...]:
    """Word a prompt for one object in five ways."""
    text = language.with_article(noun)
    return (text, f"one {noun}", f"a picture of {text}", f"there is {text}", f"draw {text}")


def _position(i: int, random: np.random.Generator, held_out: bool) -> DrawingTarget:
    """Ask for two objects in a relative position: "a red circle above a blue star"."""
    a, b = _two_things(i, random, held_out)
    relation = language.RELATIONS[i % 4]
    text = f"{language.phrase(a)} {relation} {language.phrase(b)}"
    return DrawingTarget(text, (a.name, b.name), relation)


def _attribution(i: int, random: np.random.Generator, held_out: bool) -> DrawingTarget:
    """Ask for two objects with their colours: "a red circle and a blue star"."""
    a, b = _two_things(i, random, held_out)
    text = language.listed([language.phrase(a), language.phrase(b)])
    return DrawingTarget(text, (a.name, b.name))


def _two_things(
    i: int, random: np.random.Generator, held_out: bool
) -> tuple[shapes.Thing, shapes.Thing]:
    """Sample two things of different shape and colour, from a scene that is held out or not."""
    split: shapes.Split = ("pairs" if i % 2 else "scenes") if held_out else "train"
    while True:
        a, b = shapes.sample_scene(random, "two", split).things
        if a.shape != b.shape and a.colour != b.colour:
            return a, b


def measure_drawing(
    janus: JanusPipeline,
    sizes: Sizes,
    seed: int,
    progress: Progress,
    *,
    held_out: bool = True,
    **choice: Any,
) -> dict[str, float]:
    """Measure the share of right images for each task, and their mean as "overall".

    Args:
        janus: the model.
        sizes: number of prompts per task and of images per prompt.
        seed: seed of prompts and images.
        progress: called after every prompt.
        held_out: as for ``drawing_prompts``.
        choice: options of ``generate_images``, such as ``cfg_weight``, instead of its defaults.
    """
    results = {}
    for number, task in enumerate(TASKS):
        right = 0
        for i, target in enumerate(drawing_prompts(task, sizes.prompts, seed, held_out=held_out)):
            first_seed = 1_000_000 * (number + 1) + 100 * i + seed
            drawn = janus.generate_images(target.prompt, n=sizes.drawn, seed=first_seed, **choice)
            right += sum(target.is_met(judge.read(one.image)) for one in drawn)
            progress("drawing", number * sizes.prompts + i + 1, len(TASKS) * sizes.prompts)
        results[task] = right / (sizes.prompts * sizes.drawn)
    return {**results, "overall": float(np.mean(list(results.values())))}


# The codec and the judge


def measure_codec(
    janus: JanusPipeline, sizes: Sizes, seed: int, progress: Progress
) -> dict[str, float]:
    """Measure the codec: PSNR in dB, and how often the judge is right before and after coding."""
    import mlx.core as mx

    random = np.random.default_rng([seed, 14])
    right_before = 0
    right_after = 0
    psnr = []
    n = sizes.reconstructed
    for i in range(n):
        scene = shapes.sample_scene(random, split="any")
        pixels = shapes.pixels(scene)
        tokens = janus.model.encode_image_tokens(mx.array(pixels)[None])
        decoded = np.array(janus.model.decode_image_tokens(tokens)[0]).clip(-1, 1)
        squared_error = float(((decoded - pixels) ** 2).mean())
        psnr.append(10 * np.log10(4 / max(squared_error, 1e-10)))
        reconstruction = ((decoded + 1) * 127.5).round().astype(np.uint8)
        right_before += is_read_right(scene, shapes.render(scene))
        right_after += is_read_right(scene, reconstruction)
        progress("codec", i + 1, n)
    return {
        "psnr": float(np.mean(psnr)),
        "judge_right_before": right_before / n,
        "judge_right_after": right_after / n,
    }


def is_read_right(scene: shapes.Scene, image: Any) -> bool:
    """Return whether the judge finds exactly the things of a scene, each near its place.

    Args:
        scene: the scene.
        image: its image, as for ``judge.read``.
    """
    found = judge.read(image)
    if Counter(one.name for one in found) != Counter(thing.name for thing in scene.things):
        return False
    return all(_distance_to_nearest(thing, found) < shapes.SMALLEST / 2 for thing in scene.things)


def _distance_to_nearest(thing: shapes.Thing, found: Sequence[judge.Detection]) -> float:
    """Return the distance in pixels from a thing to the nearest object of its name."""
    same = [one for one in found if one.name == thing.name]
    return min(float(np.hypot(one.x - thing.x, one.y - thing.y)) for one in same)
