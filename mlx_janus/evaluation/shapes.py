"""The shapes benchmark: how well a model answers about, and draws, combinations that its training never showed.

Pictures of the shapes world have known contents, and drawn ones are read by the world's judge, so every score is exact.
Three parts, each after a published benchmark, all at the defaults of ``generate_text`` and ``generate_images``:

- existence, after POPE (arXiv 2305.10355): "Is there a red circle?", as often yes as no, with three kinds of absent
  things: random, popular (those that the other pictures hold most often), adversarial (like a thing that is there, but
  for its shape or colour);
- attributes: colour, shape, number and position;
- drawing, after GenEval (arXiv 2310.11513): six tasks, several pictures a prompt. A picture is right if it holds what
  was asked and nothing else.

The fourth part, the codec's, compares pictures with their reconstructions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..models.vq_parts import token_config
from ..worlds import judge, language, shapes

if TYPE_CHECKING:
    from ..pipeline import JanusPipeline

NEGATIVES = ("random", "popular", "adversarial")
ATTRIBUTES = ("colour", "shape", "number", "position")
TASKS = ("single object", "two objects", "counting", "colours", "position", "colour attribution")

Progress = Callable[[str, int, int], None]
"""Called with the part, and what is done of it and in all."""


@dataclass(frozen=True)
class Sizes:
    """How much is asked and drawn."""

    pictures: int = 200  # of existence, with one question of each answer and kind, and of each attribute
    prompts: int = 24  # of each drawing task
    drawn: int = 4  # pictures of a prompt
    reconstructed: int = 400


@dataclass(frozen=True)
class Answers:
    """Yes and no, as POPE counts them; shares from 0 to 1."""

    accuracy: float
    f1: float
    yes_rate: float
    questions: int


@dataclass(frozen=True)
class Wanted:
    """A prompt, and what a right picture holds: shapes with a colour, or "" for any; maybe how the first lies to the
    second."""

    prompt: str
    things: tuple[tuple[str, str], ...]
    relation: str | None = None

    def is_met(self, seen: Sequence[judge.Seen]) -> bool:
        """Whether the objects are just those that are wanted, in the relation that is wanted."""
        if len(seen) != len(self.things):
            return False
        if self.relation is None:
            return _match(self.things, seen)
        return any(
            _match(self.things[:1], [a]) and _match(self.things[1:], [b]) and _lies(a, b, self.relation)
            for a in seen
            for b in seen
            if a is not b
        )


def _match(wanted: Sequence[tuple[str, str]], seen: Sequence[judge.Seen]) -> bool:
    """Whether each wanted thing is one of those seen, each of those one of the wanted."""
    if not wanted:
        return not seen
    (shape, colour), rest = wanted[0], wanted[1:]
    for i, one in enumerate(seen):
        if one.shape == shape and colour in ("", one.colour) and _match(rest, [*seen[:i], *seen[i + 1 :]]):
            return True
    return False


def _lies(a: judge.Seen, b: judge.Seen, relation: str) -> bool:
    """GenEval's rule: the offset points that way by more than half of its length."""
    dx, dy = a.x - b.x, a.y - b.y
    towards = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation]
    return bool(towards > 0.5 * np.hypot(dx, dy))


# Answering


def measure_existence(janus: JanusPipeline, sizes: Sizes, seed: int, progress: Progress) -> dict[str, Answers]:
    """POPE's three numbers for each kind of absent thing, over scenes that training never shows."""
    random = np.random.default_rng([seed, 11])
    scenes = list(_unseen(random, sizes.pictures, least=1))
    counts = Counter(name for scene in scenes for name in {t.name for t in scene.things})
    popular = [name for name, _ in counts.most_common()]
    results, done = {}, 0
    for kind in NEGATIVES:
        outcomes = []  # (what is true, what was said)
        for scene in scenes:
            names = sorted({t.name for t in scene.things})
            unseen = [n for n in names if n in shapes.HELD_OUT] or names
            present = unseen[int(random.integers(len(unseen)))]
            absent = _absent(kind, set(names), popular, random)
            for (shape, colour), yes in ((present, True), (absent, False)):
                said = _answer(janus, scene, language.existence_question(shape, colour, yes=yes))
                outcomes.append((yes, {"yes": True, "no": False}.get(said)))
            done += 1
            progress("existence", done, len(NEGATIVES) * len(scenes))
        results[kind] = _count(outcomes)
    return results


def _absent(
    kind: str, names: set[tuple[str, str]], popular: Sequence[tuple[str, str]], random: np.random.Generator
) -> tuple[str, str]:
    absent = [(s, c) for s in shapes.SHAPES for c in shapes.COLOURS if (s, c) not in names]
    if kind == "popular":
        absent = [n for n in popular if n not in names][:4] or absent
    if kind == "adversarial":
        absent = [n for n in absent if any((n[0] == s) != (n[1] == c) for s, c in names)] or absent
    return absent[int(random.integers(len(absent)))]


def _count(outcomes: Sequence[tuple[bool, bool | None]]) -> Answers:
    """An answer that is neither yes nor no is wrong."""
    right = sum(said is yes for yes, said in outcomes)
    hits = sum(yes and said is True for yes, said in outcomes)
    said_yes = sum(said is True for _, said in outcomes)
    asked_yes = sum(yes for yes, _ in outcomes)
    f1 = 2 * hits / (said_yes + asked_yes) if said_yes + asked_yes else 0.0
    return Answers(right / len(outcomes), f1, said_yes / len(outcomes), len(outcomes))


def measure_attributes(janus: JanusPipeline, sizes: Sizes, seed: int, progress: Progress) -> dict[str, float]:
    """The share of right answers for each attribute, over scenes that training never shows."""
    random = np.random.default_rng([seed, 12])
    results = {}
    for number, about in enumerate(ATTRIBUTES):
        right = asked = 0
        scenes = _unseen(random, None, least=1)
        while asked < sizes.pictures:
            scene = next(scenes)
            try:
                question = language.question(scene, random, about)
            except ValueError:
                continue
            asked += 1
            right += _answer(janus, scene, question) == question.answer
            progress("attributes", number * sizes.pictures + asked, len(ATTRIBUTES) * sizes.pictures)
        results[about] = right / asked
    return results


def _unseen(random: np.random.Generator, n: int | None, *, least: int) -> Iterator[shapes.Scene]:
    """By turns, scenes with a held-out pair of shape and colour, and with two things that never stand together."""
    made = 0
    while n is None or made < n:
        scene = shapes.sample_scene(random, split="pairs" if made % 2 else "scenes")
        if len(scene.things) >= least:
            made += 1
            yield scene


def _answer(janus: JanusPipeline, scene: shapes.Scene, question: language.Question) -> str:
    result = janus.generate_text(question.text, shapes.render(scene), max_tokens=48)
    return result.text.strip().lower().rstrip(".")


# Drawing


def drawing_prompts(task: str, count: int, seed: int, *, held_out: bool = True) -> list[Wanted]:
    """Prompts of a task. Where one names colours, it names a combination that training never shows; what cannot be held
    out (a single shape, two, or several of one) is asked for in every way in turn.

    Args:
        task: one of ``TASKS``.
        count: how many.
        seed: of the choice.
        held_out: False: combinations of training instead, to choose settings by.
    """
    random = np.random.default_rng([seed, 13, TASKS.index(task)])
    make = {
        "single object": _single, "two objects": _two, "counting": _counting, "colours": _colours,
        "position": _position, "colour attribution": _attribution,
    }[task]  # fmt: skip
    return [make(i, random, held_out) for i in range(count)]


def _single(i: int, *_: Any) -> Wanted:
    shape = shapes.SHAPES[i % 4]
    text = language.with_article(shape)
    wordings = (text, f"one {shape}", f"a picture of {text}", f"there is {text}", f"draw {text}")
    return Wanted(wordings[i // 4 % 5], ((shape, ""),))


def _two(i: int, random: np.random.Generator, *_: Any) -> Wanted:
    a, b = random.choice(shapes.SHAPES, 2, replace=False).tolist()
    return Wanted(language.listed([language.with_article(a), language.with_article(b)]), ((a, ""), (b, "")))


def _counting(i: int, *_: Any) -> Wanted:
    shape, n = shapes.SHAPES[i % 4], 2 + i // 4 % 3
    return Wanted(language.counted(n, shape), ((shape, ""),) * n)


def _colours(i: int, random: np.random.Generator, held_out: bool) -> Wanted:
    shape, colour = sorted(shapes.HELD_OUT)[i % len(shapes.HELD_OUT)]
    if not held_out:
        shape, colour = shapes.sample_scene(random, "single").things[0].name
    text = language.with_article(f"{colour} {shape}")
    wordings = (text, f"one {colour} {shape}", f"a picture of {text}", f"there is {text}", f"draw {text}")
    return Wanted(wordings[i // 4 % 5], ((shape, colour),))


def _pair(i: int, random: np.random.Generator, held_out: bool) -> tuple[shapes.Thing, shapes.Thing]:
    """Two things of different shape and colour; held out: that training never shows together."""
    split: shapes.Split = ("pairs" if i % 2 else "scenes") if held_out else "train"
    while True:
        a, b = shapes.sample_scene(random, "two", split).things
        if a.shape != b.shape and a.colour != b.colour:
            return a, b


def _position(i: int, random: np.random.Generator, held_out: bool) -> Wanted:
    a, b = _pair(i, random, held_out)
    relation = language.RELATIONS[i % 4]
    return Wanted(f"{language.phrase(a)} {relation} {language.phrase(b)}", (a.name, b.name), relation)


def _attribution(i: int, random: np.random.Generator, held_out: bool) -> Wanted:
    a, b = _pair(i, random, held_out)
    return Wanted(language.listed([language.phrase(a), language.phrase(b)]), (a.name, b.name))


def measure_drawing(
    janus: JanusPipeline, sizes: Sizes, seed: int, progress: Progress, *, held_out: bool = True, **choice: Any
) -> dict[str, float]:
    """The share of right pictures of each task, and their mean as "overall".

    Args:
        janus: the model.
        sizes: prompts of a task and pictures of a prompt.
        seed: of prompts and pictures.
        progress: called after every prompt.
        held_out: as for ``drawing_prompts``.
        choice: ``cfg_weight`` and such, in place of the defaults.
    """
    results = {}
    for number, task in enumerate(TASKS):
        right = 0
        for i, wanted in enumerate(drawing_prompts(task, sizes.prompts, seed, held_out=held_out)):
            first = 1_000_000 * (number + 1) + 100 * i + seed
            drawn = janus.generate_images(wanted.prompt, n=sizes.drawn, seed=first, **choice)
            right += sum(wanted.is_met(judge.read(image.image)) for image in drawn)
            progress("drawing", number * sizes.prompts + i + 1, len(TASKS) * sizes.prompts)
        results[task] = right / (sizes.prompts * sizes.drawn)
    return {**results, "overall": float(np.mean(list(results.values())))}


# The codec and the judge


def measure_codec(janus: JanusPipeline, sizes: Sizes, seed: int, progress: Progress) -> dict[str, float]:
    """Peak signal-to-noise ratio in decibels, and how often the judge is right before and after coding."""
    import mlx.core as mx

    random = np.random.default_rng([seed, 14])
    before = after = 0
    noise = []
    for i in range(sizes.reconstructed):
        scene = shapes.sample_scene(random, split="any")
        pixels = shapes.pixels(scene)
        tokens = janus.model.encode_image_tokens(mx.array(pixels)[None])
        decoded = np.array(janus.model.decode_image_tokens(tokens)[0]).clip(-1, 1)
        noise.append(10 * np.log10(4 / max(float(((decoded - pixels) ** 2).mean()), 1e-10)))
        before += is_read_right(scene, shapes.render(scene))
        after += is_read_right(scene, ((decoded + 1) * 127.5).round().astype(np.uint8))
        progress("codec", i + 1, sizes.reconstructed)
    n = sizes.reconstructed
    return {"psnr": float(np.mean(noise)), "judge_right_before": before / n, "judge_right_after": after / n}


def is_read_right(scene: shapes.Scene, picture: Any) -> bool:
    """Whether the judge finds just the things of a scene, each near its place."""
    seen = judge.read(picture)
    if Counter(s.name for s in seen) != Counter(t.name for t in scene.things):
        return False
    return all(
        min(np.hypot(s.x - t.x, s.y - t.y) for s in seen if s.name == t.name) < shapes.SMALLEST / 2
        for t in scene.things
    )


def measure(
    janus: JanusPipeline, sizes: Sizes | None = None, *, seed: int = 0, progress: Progress | None = None
) -> dict[str, Any]:
    """Every part, as plain values for JSON."""
    sizes, report = sizes or Sizes(), progress or (lambda *_: None)
    existence = measure_existence(janus, sizes, seed, report)
    own = token_config(janus.config)
    return {
        "model": janus.name,
        "seed": seed,
        "sizes": asdict(sizes),
        "existence": {kind: asdict(answers) for kind, answers in existence.items()},
        "attributes": measure_attributes(janus, sizes, seed, report),
        "drawing": measure_drawing(janus, sizes, seed, report),
        "drawing_unguided": measure_drawing(janus, sizes, seed, report, cfg_weight=1.0),
        "guidance": own.cfg_weight,
        "temperature": own.temperature,
        "codec": measure_codec(janus, sizes, seed, report),
    }
