"""The shapes benchmark: how well a model answers about and draws combinations held out of training.

Images of the shapes world have known contents, and the world's judge reads generated images, so
every score is exact. Three parts follow a published benchmark, at the defaults of ``generate_text``
and ``generate_images``:

- existence, after POPE (arXiv 2305.10355): "Is there a red circle?", with "yes" as often as "no",
  and three ways to pick an absent object: random, popular (one of the most frequent in all
  images), adversarial (like a present object except for its shape or colour);
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

# POPE's ways to pick an absent object
NEGATIVES = ("random", "popular", "adversarial")
ATTRIBUTES = ("colour", "shape", "number", "position")
TASKS = ("single object", "two objects", "counting", "colours", "position", "colour attribution")
_POPULAR = 4  # number of popular objects: the most frequent ones that a scene lacks

Progress = Callable[[str, int, int], None]
"""Called with a part's name, its finished items and all its items."""


@dataclass(frozen=True)
class Sizes:
    """Numbers of images and prompts in each part."""

    pictures: int = 200  # images of existence, used for each of NEGATIVES; questions per attribute
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
    things: tuple[language.Name, ...]  # a colour of "" stands for any
    relation: str | None = None  # of the first thing to the second; None: any

    def is_met(self, found: Sequence[judge.Detection]) -> bool:
        """Return whether the found objects are exactly ``things``, in ``relation`` if it is set."""
        if len(found) != len(self.things):
            return False
        if self.relation is None:
            return _match_one_to_one(self.things, found)
        first, second = self.things  # only prompts for two objects have a relation
        for a, b in permutations(found, 2):
            fits = _fits(first, a) and _fits(second, b)
            if fits and _is_related(a, b, self.relation):
                return True
        return False


def _fits(name: language.Name, one: judge.Detection) -> bool:
    """Return whether a found object has a name's shape, and its colour if the name has one."""
    shape, colour = name
    if one.shape != shape:
        return False
    return colour in ("", one.colour)


def _match_one_to_one(names: Sequence[language.Name], found: Sequence[judge.Detection]) -> bool:
    """Return whether wanted names and found objects match one to one.

    Every found object is tried for the first name. Otherwise a name without colour could take the
    only object that fits another name.
    """
    if not names:
        return not found
    first, *rest = names
    for i, one in enumerate(found):
        if not _fits(first, one):
            continue
        others = [*found[:i], *found[i + 1 :]]
        if _match_one_to_one(rest, others):
            return True
    return False


def _is_related(a: judge.Detection, b: judge.Detection, relation: str) -> bool:
    """Return whether ``a`` is "left of", "right of", "above" or "below" ``b``, by GenEval's rule.

    The centres' offset in the relation's direction must exceed half of their distance.
    """
    dx = a.x - b.x
    dy = a.y - b.y
    offsets = {
        "left of": -dx,
        "right of": dx,
        "above": -dy,  # y grows down
        "below": dy,
    }
    length = np.hypot(dx, dy)
    return bool(offsets[relation] > 0.5 * length)


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
        JanusError: the model's images have another size than the benchmark's.
        UnsupportedModelError: the model does not generate image tokens.
    """
    side = janus.config.image_size
    if side != shapes.SIDE:
        raise JanusError(
            f"{janus.name} draws {side} pixels a side; this benchmark's pictures have {shapes.SIDE}"
        )
    sizes = sizes or Sizes()
    progress = progress or (lambda *_: None)
    existence = measure_existence(janus, sizes, seed, progress)
    attributes = measure_attributes(janus, sizes, seed, progress)
    guided = measure_drawing(janus, sizes, seed, progress)
    unguided = measure_drawing(janus, sizes, seed, progress, cfg_weight=1.0)  # 1 is no guidance
    codec = measure_codec(janus, sizes, seed, progress)
    defaults = token_config(janus.config)
    return {
        "model": janus.name,
        "seed": seed,
        "sizes": asdict(sizes),
        "existence": {kind: asdict(scores) for kind, scores in existence.items()},
        "attributes": attributes,
        "drawing": guided,
        "drawing_unguided": unguided,
        "guidance": defaults.cfg_weight,
        "temperature": defaults.temperature,
        "codec": codec,
    }


def table(scores: Mapping[str, Any]) -> list[str]:
    """Format the scores of ``measure`` as the lines of Markdown tables."""
    lines = ["| existence | accuracy | F1 | yes-rate |", "|---|---|---|---|"]
    for kind, one in scores["existence"].items():
        accuracy = one["accuracy"]
        f1 = one["f1"]
        yes_rate = one["yes_rate"]
        lines.append(f"| {kind} | {accuracy:.1%} | {f1:.1%} | {yes_rate:.1%} |")

    attributes = scores["attributes"]
    mean = sum(attributes.values()) / len(attributes)
    lines += ["", "| attributes | right |", "|---|---|"]
    for about, share in attributes.items():
        lines.append(f"| {about} | {share:.1%} |")
    lines.append(f"| mean | {mean:.1%} |")

    guidance = scores["guidance"]
    lines += ["", f"| drawing | guidance {guidance:g} | none |", "|---|---|---|"]
    for task, guided in scores["drawing"].items():
        unguided = scores["drawing_unguided"][task]
        lines.append(f"| {task} | {guided:.1%} | {unguided:.1%} |")

    codec = scores["codec"]
    before = codec["judge_right_before"]
    after = codec["judge_right_after"]
    lines += ["", "| codec | |", "|---|---|"]
    lines.append(f"| PSNR | {codec['psnr']:.1f} dB |")
    lines.append(f"| the judge is right on pictures | {before:.1%} |")
    lines.append(f"| the judge is right on reconstructions | {after:.1%} |")
    return lines


# Answering


def measure_existence(
    janus: JanusPipeline,
    sizes: Sizes,
    seed: int,
    progress: Progress,
) -> dict[str, YesNoScores]:
    """Measure POPE's scores on scenes held out of training, for each of ``NEGATIVES``."""
    random = np.random.default_rng([seed, 11])  # 11: random numbers of this part only
    held_out = _held_out_scenes(random)
    scenes = list(islice(held_out, sizes.pictures))
    popular = _by_popularity(scenes)
    done = 0
    total = len(NEGATIVES) * len(scenes)
    results = {}
    for kind in NEGATIVES:
        outcomes = []
        for scene in scenes:
            outcomes += _ask_about_present_and_absent(janus, scene, kind, popular, random)
            done += 1
            progress("existence", done, total)
        results[kind] = _score_yes_no(outcomes)
    return results


def _by_popularity(scenes: Sequence[shapes.Scene]) -> list[language.Name]:
    """List the names in some scenes: those in most scenes first, equally frequent ones sorted."""
    counts: Counter[language.Name] = Counter()
    for scene in scenes:
        names = {thing.name for thing in scene.things}
        counts.update(names)

    def frequent_first(name: language.Name) -> tuple[int, language.Name]:
        return -counts[name], name

    return sorted(counts, key=frequent_first)


def _ask_about_present_and_absent(
    janus: JanusPipeline,
    scene: shapes.Scene,
    kind: str,
    popular: Sequence[language.Name],
    random: np.random.Generator,
) -> list[tuple[bool, bool | None]]:
    """Ask whether a scene holds a present and an absent object; return a pair for each question.

    A pair is the truth and the answer; an answer that is neither yes nor no is None. The present
    object is a combination held out of training if the scene has one.

    Args:
        janus: the model.
        scene: the scene.
        kind: the way to pick the absent object, one of ``NEGATIVES``.
        popular: the objects of all scenes, the most frequent first.
        random: source of all choices.
    """
    meanings = {"yes": True, "no": False}
    names = sorted({thing.name for thing in scene.things})
    held_out = [name for name in names if name in shapes.HELD_OUT]
    present = _pick(random, held_out or names)
    absent = _absent_name(kind, names, popular, random)
    outcomes = []
    for name, truth in ((present, True), (absent, False)):
        shape, colour = name
        question = language.existence_question(shape, colour, yes=truth)
        answer = _answer(janus, scene, question)
        outcomes.append((truth, meanings.get(answer)))
    return outcomes


def _absent_name(
    kind: str,
    present: Sequence[language.Name],
    popular: Sequence[language.Name],
    random: np.random.Generator,
) -> language.Name:
    """Pick an absent object in one of the ways of ``NEGATIVES``.

    If that way finds none, any absent object is picked.
    """
    absent = language.absent_names(present)
    candidates = absent
    if kind == "popular":
        missing = [name for name in popular if name not in present]
        candidates = missing[:_POPULAR]
    elif kind == "adversarial":
        candidates = language.near_misses(absent, present)
    return _pick(random, candidates or absent)


def _pick(random: np.random.Generator, names: Sequence[language.Name]) -> language.Name:
    """Pick one name."""
    index = int(random.integers(len(names)))
    return names[index]


def _score_yes_no(outcomes: Sequence[tuple[bool, bool | None]]) -> YesNoScores:
    """Score one or more pairs of truth and answer; None, neither yes nor no, is a wrong answer."""
    questions = len(outcomes)
    right = 0
    true_positives = 0
    answered_yes = 0
    truly_yes = 0
    for truth, answer in outcomes:
        right += answer is truth
        true_positives += truth and answer is True
        answered_yes += answer is True
        truly_yes += truth
    # F1 is 2 TP / (2 TP + FP + FN). TP + FP counts the answers "yes"; TP + FN counts the questions
    # whose true answer is "yes".
    f1_divisor = answered_yes + truly_yes
    return YesNoScores(
        accuracy=right / questions,
        f1=2 * true_positives / f1_divisor if f1_divisor else 0.0,
        yes_rate=answered_yes / questions,
        questions=questions,
    )


def measure_attributes(
    janus: JanusPipeline,
    sizes: Sizes,
    seed: int,
    progress: Progress,
) -> dict[str, float]:
    """Measure the share of right answers for each attribute, on scenes held out of training."""
    random = np.random.default_rng([seed, 12])  # 12: random numbers of this part only
    done = 0
    total = len(ATTRIBUTES) * sizes.pictures
    results = {}
    for about in ATTRIBUTES:
        right = 0
        questions = _held_out_questions(random, about)
        for scene, question in islice(questions, sizes.pictures):
            answer = _answer(janus, scene, question)
            right += answer == question.answer
            done += 1
            progress("attributes", done, total)
        results[about] = right / sizes.pictures
    return results


def _held_out_scenes(random: np.random.Generator) -> Iterator[shapes.Scene]:
    """Yield held-out scenes without end, alternately of the splits "scenes" and "pairs"."""
    made = 0
    while True:
        split: shapes.Split = "pairs" if made % 2 else "scenes"
        scene = shapes.sample_scene(random, split=split)
        if scene.things:
            made += 1
            yield scene


def _held_out_questions(
    random: np.random.Generator,
    about: str,
) -> Iterator[tuple[shapes.Scene, language.Question]]:
    """Yield held-out scenes without end, each with a question about an attribute.

    Scenes that allow no such question are left out.
    """
    for scene in _held_out_scenes(random):
        try:
            question = language.question(scene, random, about)
        except ValueError:
            continue
        yield scene, question


def _answer(janus: JanusPipeline, scene: shapes.Scene, question: language.Question) -> str:
    """Return the model's answer in lower case without a full stop."""
    image = shapes.render(scene)
    result = janus.generate_text(question.text, image, max_tokens=48)
    answer = result.text.strip()
    return answer.lower().rstrip(".")


# Drawing


def drawing_prompts(
    task: str,
    count: int,
    seed: int,
    *,
    held_out: bool = True,
) -> list[DrawingTarget]:
    """Make the prompts of a task.

    The tasks "colours", "position" and "colour attribution" name colours, so that their prompts can
    ask for combinations held out of training. The prompts of the other tasks name only shapes, and
    no shape is held out: "single object" and "counting" go through all their prompts in turn, "two
    objects" samples two different shapes.

    Args:
        task: one of ``TASKS``.
        count: number of prompts.
        seed: seed of the choice.
        held_out: True to name only combinations held out of training; False to name only those that
            occur in training, so that settings can be chosen without the held-out ones.
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
    """Ask for one shape: "a circle".

    Prompt number ``i`` changes the shape; every fourth one also changes the wording.
    """
    shape = shapes.SHAPES[i % 4]
    text = _worded(shape, i // 4)
    return DrawingTarget(text, ((shape, ""),))


def _two_objects(i: int, random: np.random.Generator, *_: Any) -> DrawingTarget:
    """Ask for two shapes: "a circle and a star"."""
    chosen = random.choice(shapes.SHAPES, 2, replace=False).tolist()
    phrases = [language.with_article(shape) for shape in chosen]
    things = tuple((shape, "") for shape in chosen)
    return DrawingTarget(language.listed(phrases), things)


def _counting(i: int, *_: Any) -> DrawingTarget:
    """Ask for several of one shape: "three stars".

    Prompt number ``i`` changes the shape; every fourth one also changes the number, from 2 to 4.
    """
    shape = shapes.SHAPES[i % 4]
    n = 2 + i // 4 % 3
    text = language.counted(n, shape)
    return DrawingTarget(text, ((shape, ""),) * n)


def _colours(i: int, random: np.random.Generator, held_out: bool) -> DrawingTarget:
    """Ask for one coloured shape: "a purple circle".

    With ``held_out``, prompt number ``i`` takes the four held-out names in turn. Otherwise the name
    is that of a thing in a random training scene.
    """
    if held_out:
        names = sorted(shapes.HELD_OUT)
        name = names[i % len(names)]
    else:
        scene = shapes.sample_scene(random, "single")
        name = scene.things[0].name
    shape, colour = name
    text = _worded(f"{colour} {shape}", i // 4)
    return DrawingTarget(text, (name,))


def _worded(noun: str, i: int) -> str:
    """Word a prompt for one object in one of five ways; ``i`` counts through them."""
    text = language.with_article(noun)
    wordings = (
        text,
        f"one {noun}",
        f"a picture of {text}",
        f"there is {text}",
        f"draw {text}",
    )
    return wordings[i % len(wordings)]


def _position(i: int, random: np.random.Generator, held_out: bool) -> DrawingTarget:
    """Ask for two objects in a relative position: "a red circle above a blue star".

    Prompt number ``i`` takes the four relations in turn. The names are those of a sampled scene,
    but not the positions.
    """
    a, b = _two_things(i, random, held_out)
    subject = language.phrase(a)
    landmark = language.phrase(b)
    relation = language.RELATIONS[i % 4]
    names = (a.name, b.name)
    return DrawingTarget(f"{subject} {relation} {landmark}", names, relation)


def _attribution(i: int, random: np.random.Generator, held_out: bool) -> DrawingTarget:
    """Ask for two objects with their colours: "a red circle and a blue star"."""
    things = _two_things(i, random, held_out)
    phrases = [language.phrase(thing) for thing in things]
    names = tuple(thing.name for thing in things)
    return DrawingTarget(language.listed(phrases), names)


def _two_things(
    i: int,
    random: np.random.Generator,
    held_out: bool,
) -> tuple[shapes.Thing, shapes.Thing]:
    """Sample two things of different shape and colour.

    Args:
        i: number of the sample. Held-out samples alternate between the two held-out splits.
        random: the generator.
        held_out: whether to sample from held-out scenes, not from training scenes.
    """
    split: shapes.Split = "train"
    if held_out:
        split = "pairs" if i % 2 else "scenes"
    while True:
        scene = shapes.sample_scene(random, "two", split)
        a, b = scene.things
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
        held_out: whether prompts with colours name combinations held out of training; see
            ``drawing_prompts``.
        choice: options of ``generate_images``, such as ``cfg_weight``, instead of its defaults.
    """
    done = 0
    total = len(TASKS) * sizes.prompts
    results = {}
    for number, task in enumerate(TASKS):
        right = 0
        targets = drawing_prompts(task, sizes.prompts, seed, held_out=held_out)
        for i, target in enumerate(targets):
            # Image k has this seed plus k: prompts of up to 100 images never share a seed.
            first_seed = 1_000_000 * (number + 1) + 100 * i + seed
            drawn = janus.generate_images(
                target.prompt,
                n=sizes.drawn,
                seed=first_seed,
                **choice,
            )
            for one in drawn:
                found = judge.read(one.image)
                right += target.is_met(found)
            done += 1
            progress("drawing", done, total)
        results[task] = right / (sizes.prompts * sizes.drawn)
    shares = list(results.values())
    results["overall"] = float(np.mean(shares))
    return results


# The codec and the judge


def measure_codec(
    janus: JanusPipeline,
    sizes: Sizes,
    seed: int,
    progress: Progress,
) -> dict[str, float]:
    """Measure the codec: PSNR in dB, and how often the judge is right before and after coding."""
    import mlx.core as mx

    random = np.random.default_rng([seed, 14])  # 14: random numbers of this part only
    right_before = 0
    right_after = 0
    psnr = []
    n = sizes.reconstructed
    for i in range(n):
        scene = shapes.sample_scene(random, split="any")
        pixels = shapes.pixels(scene)
        batch = mx.array(pixels)[None]
        tokens = janus.model.encode_image_tokens(batch)
        output = janus.model.decode_image_tokens(tokens)
        decoded = np.array(output[0]).clip(-1, 1)
        errors = decoded - pixels
        squared_error = float((errors**2).mean())
        noise = max(squared_error, 1e-10)  # more than 0, as a divisor
        # PSNR needs the squared range of the values: 2 squared, as they are from -1 to 1.
        psnr.append(10 * np.log10(4 / noise))
        values = (decoded + 1) * 127.5
        reconstruction = values.round().astype(np.uint8)
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
    names_found = Counter(one.name for one in found)
    names = Counter(thing.name for thing in scene.things)
    if names_found != names:
        return False
    far = shapes.SMALLEST / 2  # pixels
    return all(_distance_to_nearest(thing, found) < far for thing in scene.things)


def _distance_to_nearest(thing: shapes.Thing, found: Sequence[judge.Detection]) -> float:
    """Return the distance in pixels from a thing to the nearest object of its name.

    There must be such an object.
    """
    distances = []
    for one in found:
        if one.name == thing.name:
            distance = np.hypot(one.x - thing.x, one.y - thing.y)
            distances.append(float(distance))
    return min(distances)
