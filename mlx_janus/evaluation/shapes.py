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

# POPE's strategies to choose an absent object
STRATEGIES = ("random", "popular", "adversarial")
ATTRIBUTES = ("colour", "shape", "number", "position")  # keys of ``language.TOPICS``
TASKS = ("single object", "two objects", "counting", "colours", "position", "colour attribution")
_POPULAR_COUNT = 4  # the most frequent absent objects, of which "popular" chooses one

Progress = Callable[[str, int, int], None]
"""Called with a part's name, its finished items and all its items."""


@dataclass(frozen=True)
class Sizes:
    """Numbers of images and prompts in each part."""

    pictures: int = 200  # images of existence, the same for each strategy; questions per attribute
    prompts: int = 24  # prompts per drawing task
    drawn: int = 4  # images per prompt
    reconstructed: int = 400  # images for the codec


@dataclass(frozen=True)
class YesNoScores:
    """POPE's scores of yes-or-no questions, from 0 to 1."""

    accuracy: float
    f1: float  # of "yes"
    yes_rate: float  # share of questions answered with "yes"
    questions: int  # number of questions


@dataclass(frozen=True)
class DrawingTarget:
    """A prompt, and the objects that an image of it must show."""

    prompt: str
    things: tuple[language.Name, ...]  # shapes and colours; a colour of "" means any
    relation: str | None = None  # of the first thing to the second; None: any

    def is_met(self, found: Sequence[judge.Detection]) -> bool:
        """Return whether an image's objects are exactly ``things``, in ``relation`` if it is set.

        Args:
            found: the objects that the judge finds in the image.
        """
        if len(found) != len(self.things):
            return False
        if self.relation is None:
            return _match_one_to_one(self.things, found)
        first, second = self.things  # only prompts for two objects have a relation
        for a, b in permutations(found, 2):
            fits = _fits(a, first) and _fits(b, second)
            if fits and _is_related(a, b, self.relation):
                return True
        return False


def _fits(detection: judge.Detection, name: language.Name) -> bool:
    """Return whether a found object has the shape and colour of a name; "" means any."""
    shape, colour = name
    if detection.shape != shape:
        return False
    return colour in ("", detection.colour)


def _match_one_to_one(names: Sequence[language.Name], found: Sequence[judge.Detection]) -> bool:
    """Return whether wanted names and found objects match one to one.

    A name without a colour fits several objects, and one of these may be the only one that fits
    another name. Therefore every object that fits the first name is tried.
    """
    if not names:
        return not found
    first_name, *other_names = names
    for i, detection in enumerate(found):
        if not _fits(detection, first_name):
            continue
        others_found = [*found[:i], *found[i + 1 :]]
        if _match_one_to_one(other_names, others_found):
            return True
    return False


def _is_related(a: judge.Detection, b: judge.Detection, relation: str) -> bool:
    """Return whether ``a`` has a relation to ``b``, by GenEval's rule.

    From the centre of ``b`` to that of ``a``, the offset in the relation's direction must be more
    than half of the distance.

    Args:
        a: a found object.
        b: another found object.
        relation: one of ``language.RELATIONS``.
    """
    dx = a.x - b.x
    dy = a.y - b.y
    offsets = {
        "left of": -dx,
        "right of": dx,
        "above": -dy,  # y grows down
        "below": dy,
    }
    distance = np.hypot(dx, dy)
    return bool(offsets[relation] > 0.5 * distance)


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
        "existence": {strategy: asdict(scores) for strategy, scores in existence.items()},
        "attributes": attributes,
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
    """Measure POPE's scores on held-out scenes, for each strategy to choose an absent object."""
    random = np.random.default_rng([seed, 11])  # 11: random numbers of this part only
    held_out = _held_out_scenes(random)
    scenes = list(islice(held_out, sizes.pictures))
    popular = _by_popularity(scenes)
    done = 0
    total = len(STRATEGIES) * len(scenes)
    results = {}
    for strategy in STRATEGIES:
        outcomes = []
        for scene in scenes:
            outcomes += _ask_about_present_and_absent(janus, scene, strategy, popular, random)
            done += 1
            progress("existence", done, total)
        results[strategy] = _score_yes_no(outcomes)
    return results


def _by_popularity(scenes: Sequence[shapes.Scene]) -> list[language.Name]:
    """List the names (shape, colour) that occur in these scenes, the most frequent first.

    A name's frequency is the number of scenes that have it. Equally frequent names are sorted.
    """
    counts: Counter[language.Name] = Counter()
    for scene in scenes:
        names = {thing.name for thing in scene.things}
        counts.update(names)

    def sort_key(name: language.Name) -> tuple[int, language.Name]:
        return -counts[name], name

    return sorted(counts, key=sort_key)


def _ask_about_present_and_absent(
    janus: JanusPipeline,
    scene: shapes.Scene,
    strategy: str,
    popular: Sequence[language.Name],
    random: np.random.Generator,
) -> list[tuple[bool, bool | None]]:
    """Ask the model whether a scene has a present object, then whether it has an absent one.

    An object that is held out of training is the first choice for the present one.

    Args:
        janus: the model.
        scene: the scene.
        strategy: how to choose the absent object, one of ``STRATEGIES``.
        popular: the objects of all scenes, the most frequent first.
        random: source of all choices.

    Returns:
        For each question, whether the object is present, and the model's answer: True for "yes",
        False for "no", None for any other text.
    """
    meanings = {"yes": True, "no": False}
    names = sorted({thing.name for thing in scene.things})
    held_out = [name for name in names if name in shapes.HELD_OUT]
    present = _choose(random, held_out or names)
    absent = _choose_absent(strategy, names, popular, random)
    outcomes = []
    for name, is_present in ((present, True), (absent, False)):
        shape, colour = name
        question = language.existence_question(shape, colour, yes=is_present)
        answer = answer_to(janus, scene, question)
        outcomes.append((is_present, meanings.get(answer)))
    return outcomes


def _choose_absent(
    strategy: str,
    present: Sequence[language.Name],
    popular: Sequence[language.Name],
    random: np.random.Generator,
) -> language.Name:
    """Choose an absent object.

    Args:
        strategy: one of ``STRATEGIES``. If it finds no object, any absent one is chosen.
        present: the objects of the scene.
        popular: the objects of all scenes, the most frequent first.
        random: source of all choices.
    """
    absent = language.absent_names(present)
    candidates = absent
    if strategy == "popular":
        absent_and_popular = [name for name in popular if name not in present]
        candidates = absent_and_popular[:_POPULAR_COUNT]
    elif strategy == "adversarial":
        candidates = language.near_misses(absent, present)
    return _choose(random, candidates or absent)


def _choose(random: np.random.Generator, names: Sequence[language.Name]) -> language.Name:
    """Choose one of the names with equal probability."""
    index = int(random.integers(len(names)))
    return names[index]


def _score_yes_no(outcomes: Sequence[tuple[bool, bool | None]]) -> YesNoScores:
    """Score the answers to one or more yes-or-no questions.

    Args:
        outcomes: for each question, whether "yes" is right, and the answer: True for "yes", False
            for "no", None for any other text, which counts as wrong.
    """
    questions = len(outcomes)
    right = 0
    true_positives = 0
    answered_yes = 0
    truly_yes = 0
    for is_yes, answer in outcomes:
        right += answer is is_yes
        true_positives += is_yes and answer is True
        answered_yes += answer is True
        truly_yes += is_yes
    # F1 is 2 TP / (2 TP + FP + FN). TP + FP counts the answers "yes", and TP + FN counts the
    # questions to which "yes" is right.
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
    """Measure the share of right answers to questions about each attribute of held-out scenes."""
    random = np.random.default_rng([seed, 12])  # 12: random numbers of this part only
    done = 0
    total = len(ATTRIBUTES) * sizes.pictures
    results = {}
    for attribute in ATTRIBUTES:
        right = 0
        questions = held_out_questions(random, attribute)
        for scene, question in islice(questions, sizes.pictures):
            answer = answer_to(janus, scene, question)
            right += answer == question.answer
            done += 1
            progress("attributes", done, total)
        results[attribute] = right / sizes.pictures
    return results


def _held_out_scenes(random: np.random.Generator) -> Iterator[shapes.Scene]:
    """Yield held-out scenes without end, in turn of the splits "scenes" and "pairs"."""
    yielded = 0
    while True:
        split: shapes.Split = "pairs" if yielded % 2 else "scenes"
        scene = shapes.sample_scene(random, split=split)
        if scene.things:
            yielded += 1
            yield scene


def held_out_questions(
    random: np.random.Generator,
    attribute: str,
) -> Iterator[tuple[shapes.Scene, language.Question]]:
    """Yield held-out scenes without end, each with a question about an attribute."""
    for scene in _held_out_scenes(random):
        try:
            question = language.question(scene, random, attribute)
        except ValueError:  # the scene allows no question about the attribute
            continue
        yield scene, question


def answer_to(
    janus: JanusPipeline,
    scene: shapes.Scene,
    question: language.Question,
    **options: Any,
) -> str:
    """Return the model's answer to a question about a scene, in lower case without a full stop.

    ``options`` are more options of ``generate_text``, such as ``system``.
    """
    image = shapes.render(scene)
    result = janus.generate_text(question.text, image, max_tokens=48, **options)
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

    The prompts of "colours", "position" and "colour attribution" name colours, so that they can ask
    for combinations held out of training. The prompts of "single object", "counting" and "two
    objects" name only shapes, none of which is held out.

    Args:
        task: one of ``TASKS``.
        count: number of prompts.
        seed: seed of the prompts.
        held_out: in prompts with colours, True to name only combinations held out of training;
            False to name only combinations of training, to choose settings on.
    """
    random = np.random.default_rng([seed, 13, TASKS.index(task)])
    makers = {
        "single object": _single_object,
        "two objects": _two_objects,
        "counting": _counting,
        "colours": _colours,
        "position": _position,
        "colour attribution": _colour_attribution,
    }
    make = makers[task]
    return [make(index, random, held_out) for index in range(count)]


def _single_object(index: int, *_: Any) -> DrawingTarget:
    """Make prompt number ``index`` for one object: "a circle".

    The four shapes take turns; after each round the wording changes.
    """
    shape = shapes.SHAPES[index % 4]
    text = _word_prompt(shape, index // 4)
    return DrawingTarget(text, ((shape, ""),))


def _two_objects(index: int, random: np.random.Generator, *_: Any) -> DrawingTarget:
    """Make a random prompt for two objects of different shapes: "a circle and a star"."""
    chosen = random.choice(shapes.SHAPES, 2, replace=False).tolist()
    phrases = [language.with_article(shape) for shape in chosen]
    things = tuple((shape, "") for shape in chosen)
    return DrawingTarget(language.listed(phrases), things)


def _counting(index: int, *_: Any) -> DrawingTarget:
    """Make prompt number ``index`` for several objects of one shape: "three stars".

    The four shapes take turns; after each round the number of objects changes, from 2 to 4.
    """
    shape = shapes.SHAPES[index % 4]
    objects = 2 + index // 4 % 3
    text = language.counted(objects, shape)
    return DrawingTarget(text, ((shape, ""),) * objects)


def _colours(index: int, random: np.random.Generator, held_out: bool) -> DrawingTarget:
    """Make prompt number ``index`` for one coloured object: "a purple circle".

    With ``held_out``, the four held-out pairs of shape and colour take turns. Otherwise the pair is
    that of a random training scene.
    """
    if held_out:
        names = sorted(shapes.HELD_OUT)
        name = names[index % len(names)]
    else:
        scene = shapes.sample_scene(random, "single")
        name = scene.things[0].name
    shape, colour = name
    text = _word_prompt(f"{colour} {shape}", index // 4)
    return DrawingTarget(text, (name,))


def _word_prompt(noun: str, wording: int) -> str:
    """Word a prompt for one object; there are five wordings, and number 5 is the first again."""
    text = language.with_article(noun)
    wordings = (
        text,
        f"one {noun}",
        f"a picture of {text}",
        f"there is {text}",
        f"draw {text}",
    )
    return wordings[wording % len(wordings)]


def _position(index: int, random: np.random.Generator, held_out: bool) -> DrawingTarget:
    """Make prompt number ``index`` for two objects in a relation: "a red circle above a blue star".

    The four relations take turns. Shapes and colours are those of a sampled scene.
    """
    a, b = _sample_two_things(index, random, held_out)
    subject = language.phrase(a)
    landmark = language.phrase(b)
    relation = language.RELATIONS[index % 4]
    names = (a.name, b.name)
    return DrawingTarget(f"{subject} {relation} {landmark}", names, relation)


def _colour_attribution(index: int, random: np.random.Generator, held_out: bool) -> DrawingTarget:
    """Make prompt number ``index`` for two coloured objects: "a red circle and a blue star"."""
    things = _sample_two_things(index, random, held_out)
    phrases = [language.phrase(thing) for thing in things]
    names = tuple(thing.name for thing in things)
    return DrawingTarget(language.listed(phrases), names)


def _sample_two_things(
    index: int,
    random: np.random.Generator,
    held_out: bool,
) -> tuple[shapes.Thing, shapes.Thing]:
    """Sample two things that differ in shape and in colour.

    Args:
        index: number of the sample; held-out samples are of the splits "scenes" and "pairs" in
            turn.
        random: source of all randomness.
        held_out: True to sample a held-out scene, False to sample a training scene.
    """
    split: shapes.Split = "train"
    if held_out:
        split = "pairs" if index % 2 else "scenes"
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
    **options: Any,
) -> dict[str, float]:
    """Measure the share of right images for each task, and the mean of all tasks as "overall".

    Args:
        janus: the model.
        sizes: number of prompts per task and of images per prompt.
        seed: seed of prompts and images.
        progress: called after every prompt.
        held_out: whether prompts with colours name combinations held out of training; see
            ``drawing_prompts``.
        options: options of ``generate_images``, such as ``cfg_weight``, instead of its defaults.
    """
    done = 0
    total = len(TASKS) * sizes.prompts
    results = {}
    for number, task in enumerate(TASKS):
        right = 0
        targets = drawing_prompts(task, sizes.prompts, seed, held_out=held_out)
        for i, target in enumerate(targets):
            # Image k of a prompt has the seed ``first_seed + k``. With at most 100 images per
            # prompt, no two images have the same seed.
            first_seed = 1_000_000 * (number + 1) + 100 * i + seed
            drawn = janus.generate_images(
                target.prompt,
                n=sizes.drawn,
                seed=first_seed,
                **options,
            )
            for result in drawn:
                found = judge.read(result.image)
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
    """Measure the image codec on random scenes.

    Returns:
        The mean PSNR in dB, and the share of images that the judge reads right, for the images
        before coding and for their reconstructions.
    """
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
        noise = max(squared_error, 1e-10)  # never 0, because it is a divisor
        # PSNR divides the square of the values' range by the noise. The range is 2, from -1 to 1.
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
    """Return whether the judge finds exactly the things of a scene, each near its true place.

    Args:
        scene: the scene.
        image: an image of the scene, as ``judge.read`` takes it.
    """
    found = judge.read(image)
    names_found = Counter(detection.name for detection in found)
    names = Counter(thing.name for thing in scene.things)
    if names_found != names:
        return False
    too_far = shapes.SMALLEST / 2  # pixels
    return all(_distance_to_nearest(thing, found) < too_far for thing in scene.things)


def _distance_to_nearest(thing: shapes.Thing, found: Sequence[judge.Detection]) -> float:
    """Return the distance in pixels from a thing to the nearest found object of the same name.

    At least one found object must have this name.
    """
    distances = []
    for detection in found:
        if detection.name == thing.name:
            distance = np.hypot(detection.x - thing.x, detection.y - thing.y)
            distances.append(float(distance))
    return min(distances)
