"""Scenes of open colours show what they say, and nothing that training is not to see."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mlx_janus.worlds import open_scenes, shapes

SCENES = 500


@pytest.fixture(scope="module")
def scenes() -> list[open_scenes.OpenScene]:
    random = np.random.default_rng(3)
    return [open_scenes.sample_open_scene(random) for _ in range(SCENES)]


def test_outlines_are_of_the_named_shapes_and_the_others_for_training(
    scenes: list[open_scenes.OpenScene],
) -> None:
    names = {figure.name for scene in scenes for figure in scene.figures}
    assert names == {*shapes.SHAPES, *open_scenes.OUTLINES}
    assert not names & set(open_scenes.UNSEEN)


def test_no_named_shape_has_a_hue_that_is_held_out(scenes: list[open_scenes.OpenScene]) -> None:
    shown = {
        (figure.name, shapes.nearest_hue(figure.rgb))
        for scene in scenes
        for figure in scene.figures
    }
    assert not shown & shapes.HELD_OUT
    assert len(shown) == 10 * len(shapes.COLOURS) - len(shapes.HELD_OUT)


def test_colours_are_of_all_rgb_and_stand_out(scenes: list[open_scenes.OpenScene]) -> None:
    colours = np.array([figure.rgb for scene in scenes for figure in scene.figures])
    cells = {tuple(cell) for cell in colours // 64}
    assert len(cells) == 4**3
    for scene in scenes:
        assert all(
            math.dist(figure.rgb, scene.background) >= open_scenes.CONTRAST
            for figure in scene.figures
        )


@pytest.mark.parametrize("name", [*shapes.SHAPES, *open_scenes.OUTLINES, *open_scenes.UNSEEN])
def test_an_outline_lies_in_its_circle_and_is_seen(name: str) -> None:
    random = np.random.default_rng(4)
    for angle in (0.0, 0.7):
        figure = open_scenes.make_figure(random, name, (200, 30, 90), (30.0, 34.0, 12.0), angle)
        assert np.hypot(*(figure.outline - (30.0, 34.0)).T).max() <= 12.0 * 1.02
        picture = np.asarray(open_scenes.render(open_scenes.OpenScene((figure,), (10, 120, 60))))
        assert (picture == (200, 30, 90)).all(-1).sum() > 40
        assert (picture[[0, -1]] == (10, 120, 60)).all()


def test_a_ring_has_a_hole() -> None:
    figure = open_scenes.make_figure(
        np.random.default_rng(0), "ring", (250, 0, 0), (32.0, 32.0, 14.0)
    )
    picture = np.asarray(open_scenes.render(open_scenes.OpenScene((figure,), (0, 0, 250))))
    assert tuple(picture[32, 32]) == (0, 0, 250)
    assert tuple(picture[32, 32 + 12]) == (250, 0, 0)


def test_a_scene_depends_on_the_seed_alone() -> None:
    def some(seed: int) -> np.ndarray:
        random = np.random.default_rng(seed)
        return np.stack(
            [open_scenes.pixels(open_scenes.sample_open_scene(random)) for _ in range(10)]
        )

    assert (some(4) == some(4)).all()
    assert (some(4) != some(5)).any()
