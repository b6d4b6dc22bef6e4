"""The shapes world says the truth about itself, and its judge reads pictures right."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from mlx_janus.evaluation.answers import _by_popularity
from mlx_janus.evaluation.codec import is_read_right
from mlx_janus.evaluation.drawing import DrawingTarget, drawing_prompts
from mlx_janus.worlds import judge, language, shapes

SCENES = 2000


@pytest.fixture(scope="module")
def scenes() -> list[shapes.Scene]:
    random = np.random.default_rng(3)
    return [shapes.sample_scene(random, split="any") for _ in range(SCENES)]


def test_the_judge_reads_true_pictures(scenes: list[shapes.Scene]) -> None:
    right = [is_read_right(scene, shapes.render(scene)) for scene in scenes]
    assert np.mean(right) >= 0.995


def test_the_judge_measures_to_a_fraction_of_a_pixel(scenes: list[shapes.Scene]) -> None:
    for scene in scenes[:200]:
        for one in judge.read(shapes.render(scene)):
            there = min(scene.things, key=lambda t: np.hypot(t.x - one.x, t.y - one.y))
            assert np.hypot(there.x - one.x, there.y - one.y) < 0.6
            assert one.size == pytest.approx(there.size, rel=0.12)


def test_the_judge_sees_a_wrong_picture_as_wrong(scenes: list[shapes.Scene]) -> None:
    """Pictures of another scene, or with a shape painted over, are not read as this one."""
    for scene, other in pairwise(scenes[:301]):
        if Counter(t.name for t in scene.things) != Counter(t.name for t in other.things):
            assert not is_read_right(scene, shapes.render(other))
        if scene.things:
            picture = shapes.render(scene)
            box = [round(v) for v in scene.things[0].box()]
            picture.paste(scene.background, (box[0] - 1, box[1] - 1, box[2] + 1, box[3] + 1))
            assert not is_read_right(scene, picture)


@pytest.mark.parametrize(
    "outline", [[(10, 10), (50, 10), (50, 20), (20, 20), (20, 50), (10, 50)], [(5, 30), (58, 34)]]
)
def test_the_judge_has_a_word_for_no_shape(outline: list[tuple[int, int]]) -> None:
    picture = Image.new("RGB", (shapes.SIDE,) * 2, "white")
    draw = ImageDraw.Draw(picture)
    if len(outline) > 2:
        draw.polygon(outline, fill=shapes.COLOURS["red"])
    else:
        draw.rectangle([*outline[0], *outline[1]], fill=shapes.COLOURS["red"])
    assert [(s.shape, s.colour) for s in judge.read(picture)] == [("none", "red")]


def test_the_judge_bears_a_little_blur() -> None:
    random = np.random.default_rng(5)
    scenes = [shapes.sample_scene(random, "single") for _ in range(100)]
    blurred = [shapes.render(scene).filter(ImageFilter.GaussianBlur(0.7)) for scene in scenes]
    assert np.mean([is_read_right(s, p) for s, p in zip(scenes, blurred, strict=True)]) > 0.95


def test_what_the_world_is_made_of(scenes: list[shapes.Scene]) -> None:
    assert {len(scene.things) for scene in scenes} == {0, 1, 2, 3, 4}
    things = [thing for scene in scenes for thing in scene.things]
    assert {t.name for t in things} == {(s, c) for s in shapes.SHAPES for c in shapes.COLOURS}
    assert all(shapes.SIDE / 8 <= t.size <= shapes.SIDE / 2 for t in things)
    assert {t.angle == 0 for t in things if t.shape == "square"} == {True, False}
    assert (255, 255, 255) in {scene.background for scene in scenes}
    picture = shapes.render(scenes[0])
    assert picture.size == (64, 64)
    assert picture.mode == "RGB"


def test_edges_are_antialiased() -> None:
    thing = shapes.Thing("circle", "blue", 20, 32, 32, 0, shapes.COLOURS["blue"])
    colours = shapes.render(shapes.Scene((thing,))).getcolors()
    assert colours is not None
    assert len(colours) > 5  # two of them are the circle's and the background's


def test_training_never_shows_what_is_held_out() -> None:
    random = np.random.default_rng(1)
    for _ in range(1000):
        scene = shapes.sample_scene(random)
        assert not any(t.name in shapes.HELD_OUT for t in scene.things)
        assert not shapes.is_held_out_scene(scene.things)
    for split in ("pairs", "scenes"):
        for _ in range(100):
            assert not shapes.belongs(shapes.sample_scene(random, split=split).things, "train")


def test_a_scene_depends_on_the_seed_alone() -> None:
    def some(seed: int) -> list[shapes.Scene]:
        random = np.random.default_rng(seed)
        return [shapes.sample_scene(random) for _ in range(20)]

    assert some(4) == some(4)
    assert some(4) != some(5)


NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4}


def _things_of(caption: str) -> Counter[tuple[str, str]]:
    """Shapes, and their colours where they are said, by a grammar of its own."""
    colours, found = "|".join(shapes.COLOURS), Counter[tuple[str, str]]()
    for number, colour, shape in re.findall(
        rf"(a|an|one|two|three|four) (?:({colours}) )?(\w+?)s?\b", caption
    ):
        if shape in (*shapes.SHAPES, "shape"):
            found["" if shape == "shape" else shape, colour] += NUMBERS[number]
    return found


def test_captions_say_what_is_there() -> None:
    random = np.random.default_rng(6)
    wordings = set()
    for _ in range(1000):
        scene = shapes.sample_scene(random)
        caption = language.caption(scene, random)
        said = _things_of(caption)
        assert sum(said.values()) == len(scene.things), caption
        for (shape, colour), n in said.items():
            assert n == sum(
                shape in ("", t.shape) and colour in ("", t.colour) for t in scene.things
            ), caption
        for relation in language.RELATIONS:
            if relation in caption:
                first, second = (_things_of(part) for part in caption.split(relation))
                pairs = [
                    (a, b)
                    for a in scene.things
                    for b in scene.things
                    if language.relation(a, b) == relation
                ]
                (one, _), (two, _) = next(iter(first)), next(iter(second))
                assert any(one in ("", a.shape) and two in ("", b.shape) for a, b in pairs), caption
        wordings.add(caption.split()[0])
    assert {"a", "one", "there", "two", "draw"} <= wordings


def test_answers_are_true() -> None:
    random = np.random.default_rng(7)
    yes: Counter[str] = Counter()
    seen = set()
    for _ in range(2000):
        scene = shapes.sample_scene(random)
        question = language.question(scene, random)
        text, answer = question.text, question.answer
        seen.add(question.about)
        colour = next((c for c in shapes.COLOURS if re.search(rf"\b{c}\b", text)), None)
        shape = next((s for s in shapes.SHAPES if re.search(rf"\b{s}s?\b", text)), None)
        fitting = [
            t for t in scene.things if colour in (None, t.colour) and shape in (None, t.shape)
        ]
        if question.about == "existence":
            assert answer == ("yes" if fitting else "no"), text
            yes[answer] += 1
        elif question.about == "number":
            assert answer == language.NUMBERS[len(fitting)], text
        elif question.about == "colour":
            assert [t.colour for t in fitting] == [answer], text
        elif question.about == "shape":
            assert [t.shape for t in fitting] == [answer], text
        elif question.about == "content":
            where = next(
                w
                for w in (
                    "top left",
                    "top right",
                    "bottom left",
                    "bottom right",
                    "top",
                    "left",
                    "middle",
                    "right",
                    "bottom",
                )
                if text.endswith(f" {w}?")
            )
            (there,) = [t for t in scene.things if language.place(t).endswith(f"the {where}")]
            whole = f"{'an' if there.colour == 'orange' else 'a'} {there.colour} {there.shape}"
            assert answer == (
                there.colour if "colo" in text else there.shape if "shape" in text else whole
            ), text
        elif question.about == "description":
            assert sum(_things_of(answer).values()) == len(scene.things)
    assert seen == {"existence", "colour", "shape", "number", "position", "content", "description"}
    assert 0.4 < yes["yes"] / yes.total() < 0.6


def test_training_never_asks_for_what_is_held_out() -> None:
    """Else it would learn that no purple circle exists; where one is, a question may name it."""
    held_out = [" ".join(reversed(name)) for name in shapes.HELD_OUT]
    random = np.random.default_rng(9)
    for _ in range(2000):
        text = language.question(shapes.sample_scene(random), random).text
        assert not any(name in text for name in held_out), text
    unseen = [
        language.ask_existence(shapes.sample_scene(random, "single", "pairs"), random)
        for _ in range(50)
    ]
    assert any(name in q.text for q in unseen if q and q.answer == "yes" for name in held_out)


def test_shares_say_what_is_asked() -> None:
    random = np.random.default_rng(10)
    scenes = [shapes.sample_scene(random, "single") for _ in range(20)]
    asked = {
        language.question(scene, random, shares={"shape": 0.5, "colour": 0.5}).about
        for scene in scenes
    }
    assert asked == {"shape", "colour"}
    assert sum(language.SHARES.values()) == sum(language.LOOKUPS.values()) == pytest.approx(1)


def test_both_spellings_of_colour_are_asked() -> None:
    random = np.random.default_rng(8)
    texts = {
        language.question(shapes.sample_scene(random, "single"), random, "colour").text
        for _ in range(100)
    }
    assert any("color" in text for text in texts)
    assert any("colour" in text for text in texts)


def test_questions_of_place_are_true() -> None:
    random = np.random.default_rng(9)
    for _ in range(300):
        scene = shapes.sample_scene(random, "single")
        thing = scene.things[0]
        where = language.place(thing)
        assert ("left" in where) == (thing.x < 64 / 3)
        assert ("right" in where) == (thing.x >= 128 / 3)
        assert ("top" in where) == (thing.y < 64 / 3)
        assert ("bottom" in where) == (thing.y >= 128 / 3)
    a = shapes.Thing("circle", "red", 10, 16, 30)
    b = shapes.Thing("square", "blue", 10, 48, 34)
    assert [language.relation(a, b), language.relation(b, a)] == ["left of", "right of"]
    assert language.relation(a, shapes.Thing("star", "red", 10, 36, 50)) is None  # neither is plain


def test_a_drawing_is_right_only_if_it_holds_just_what_was_asked() -> None:
    red = judge.Detection("circle", "red", 20, 16, 32, 0)
    blue = judge.Detection("square", "blue", 20, 48, 32, 0)
    wanted = DrawingTarget(
        "a red circle left of a blue square", (("circle", "red"), ("square", "blue")), "left of"
    )
    assert wanted.is_met([red, blue])
    assert wanted.is_met([blue, red])
    assert not wanted.is_met([red])
    assert not wanted.is_met([red, blue, blue])
    assert not DrawingTarget("", wanted.things, "above").is_met([red, blue])
    assert not DrawingTarget("", (("circle", "blue"), ("square", "red"))).is_met([red, blue])
    assert DrawingTarget("", (("circle", ""), ("square", ""))).is_met([red, blue])
    assert not DrawingTarget("", (("circle", ""), ("circle", ""))).is_met([red, blue])


def test_benchmark_prompts_name_what_training_never_shows() -> None:
    for wanted in drawing_prompts("colours", 12, 0):
        assert wanted.things[0] in shapes.HELD_OUT
        assert _things_of(wanted.prompt) == Counter(wanted.things)
    for task in ("position", "colour attribution"):
        for wanted in drawing_prompts(task, 12, 0):
            things = [shapes.Thing(shape, colour, 10, 0, 0) for shape, colour in wanted.things]
            assert not shapes.belongs(things, "train")
            assert _things_of(wanted.prompt) == Counter(wanted.things)


def test_equally_popular_objects_are_in_order_of_their_names() -> None:
    """A set's own order differs between processes, since strings are hashed with a random seed."""
    names = [("star", "red"), ("circle", "blue"), ("square", "green"), ("circle", "red")]
    things = [shapes.Thing(shape, colour, 8.0, 8.0, 8.0) for shape, colour in names]
    scenes = [shapes.Scene(tuple(things)), shapes.Scene((things[0], things[0]))]
    assert _by_popularity(scenes) == [names[0], names[1], names[3], names[2]]
