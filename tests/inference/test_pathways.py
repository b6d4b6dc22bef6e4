"""A second image pathway beside the VQ one: its own section, networks, options and previews.

The toy here has neither codebook nor head. In each step a linear layer of the prompt's last hidden
state moves the colour of the whole image, which begins as noise.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from PIL import Image

import mlx_janus
from mlx_janus.commands import generate
from mlx_janus.config import GenerationConfig, JanusConfig, LlamaConfig
from mlx_janus.decode.prefill import prefill_all
from mlx_janus.engine.engine import Engine
from mlx_janus.engine.messages import DrawingRequest, Drawn, Partial
from mlx_janus.errors import ConfigError, OptionError
from mlx_janus.inference import pathways
from mlx_janus.inference.loaded import LoadedModel
from mlx_janus.inference.pathway import Canvas, ImageJob, image_metadata
from mlx_janus.inference.results import GeneratedImage
from mlx_janus.limits import check_int
from mlx_janus.models import janus as models
from mlx_janus.models.janus import JanusModel
from mlx_janus.models.parts import GenerationParts
from mlx_janus.weights.footprint import required_memory
from mlx_janus.weights.save import save_model
from tests.support.programs import call

STEPS = 6


@dataclass(frozen=True)
class ColourConfig(GenerationConfig):
    """The section of the toy."""

    kind: Literal["colour"]
    width: int
    steps: int = STEPS

    def check_against(self, language: LlamaConfig) -> None:
        if self.width != language.hidden_size:
            raise self.error(
                "width", self.width, f"the language hidden size {language.hidden_size}"
            )


PARTS = GenerationParts(
    build=lambda config: {"colour_mover": nn.Linear(config.generation.width + 3, 3)},  # type: ignore[attr-defined]
    step_parts=("colour_mover",),
    pixel_paths=lambda _: (),
    keeps_type=(),
    sensitive=("colour_mover",),
    image_bytes=lambda config, prompt_tokens, rows, itemsize: 1000 * prompt_tokens,
    pixel_bytes=lambda config: 3 * config.image_size**2,
)


@dataclass(frozen=True)
class ColourOptions:
    """The only choice: how many steps."""

    steps: int
    exact: bool = False

    def __post_init__(self) -> None:
        check_int("steps", self.steps, 1, 50)

    def metadata(self) -> dict[str, str]:
        return {"steps": str(self.steps)}


@dataclass
class ColourCanvas:
    """A colour, of which an image is made."""

    janus: LoadedModel
    job: ImageJob
    colour: mx.array
    step: int = 0

    def preview(self) -> Image.Image:
        side = self.janus.config.image_size
        red, green, blue = ((np.array(self.colour).clip(-1, 1) + 1) * 127).astype(int).tolist()
        return Image.new("RGB", (side, side), (red, green, blue))

    def finish(self) -> GeneratedImage:
        job = self.job
        facts = image_metadata(self.janus, job)
        return GeneratedImage(
            self.preview(), None, job.seed, job.prompt, facts, self.step, self.step
        )


class ColourPathway:
    """An ``ImagePathway``."""

    preview_every = 1

    def __init__(self, janus: LoadedModel):
        self.janus = janus

    def options(self, choices: Mapping[str, Any]) -> ColourOptions:
        chosen = {name: value for name, value in choices.items() if value is not None}
        if foreign := sorted(set(chosen) - {"steps", "exact"}):
            raise OptionError(f"{foreign[0]} is no option of this model: leave it out")
        return ColourOptions(**({"steps": self.janus.config.generation.steps} | chosen))  # type: ignore[attr-defined]

    def prompt_ids(self, prompt: str) -> list[int]:
        return self.janus.prompts.drawing(prompt)

    def steps(self, options: ColourOptions) -> int:
        return options.steps

    def bytes_per_image(self, prompt_tokens: int, options: ColourOptions) -> int:
        return PARTS.image_bytes(self.janus.config, prompt_tokens, 1, 4)

    def decoding_bytes(self) -> int:
        return PARTS.pixel_bytes(self.janus.config)

    def generate(
        self, jobs: Sequence[ImageJob], options: ColourOptions
    ) -> Generator[Sequence[Canvas], None, None]:
        batch = self.batch()
        batch.add(jobs)
        for _ in range(options.steps):
            finished = batch.step()
            yield [finished[job] if job in finished else batch.canvas(job) for job in jobs]

    def batch(self) -> ColourBatch:
        return ColourBatch(self.janus)


class ColourBatch:
    """An ``ImageBatch``."""

    def __init__(self, janus: LoadedModel):
        self.janus = janus
        self.states: dict[ImageJob, tuple[mx.array, ColourCanvas]] = {}

    @property
    def jobs(self) -> Sequence[ImageJob]:
        return list(self.states)

    def add(self, jobs: Sequence[ImageJob]) -> None:
        model = self.janus.model
        embeddings = model.embed_text(mx.array([jobs[0].ids]))
        hidden = prefill_all(model, embeddings, model.make_cache(), 512)[0]
        for job in jobs:
            noise = mx.random.normal((3,), key=mx.random.key(job.seed))
            self.states[job] = (hidden, ColourCanvas(self.janus, job, noise))

    def remove(self, jobs: Sequence[ImageJob]) -> None:
        for job in jobs:
            self.states.pop(job, None)

    def step(self) -> dict[ImageJob, Canvas]:
        finished: dict[ImageJob, Canvas] = {}
        for job, (hidden, canvas) in list(self.states.items()):
            moved = self.janus.model.colour_mover(mx.concatenate([hidden, canvas.colour]))
            colour = canvas.colour + moved / job.options.steps  # type: ignore[attr-defined]
            mx.eval(colour)
            canvas = ColourCanvas(self.janus, job, colour, canvas.step + 1)
            self.states[job] = (hidden, canvas)
            if canvas.step == job.options.steps:  # type: ignore[attr-defined]
                finished[job] = canvas
                del self.states[job]
        return finished

    def steps_done(self, job: ImageJob) -> int:
        return self.states[job][1].step

    def canvas(self, job: ImageJob) -> Canvas:
        return self.states[job][1]


@pytest.fixture
def folder(tmp_path: Path, pro: mlx_janus.JanusPipeline, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A converted folder of a model with the toy's pathway, which is in the two tables of kinds."""
    monkeypatch.setitem(models.GENERATION, "colour", PARTS)
    monkeypatch.setitem(pathways.PATHWAYS, "colour", ColourPathway)
    own = ColourConfig(kind="colour", image_size=16, width=pro.config.language.hidden_size)
    config = replace(pro.config, generation=own, quantization=None)
    mx.random.seed(5)
    model = JanusModel(config)
    save_model(model, pro.tokenizer.to_str(), tmp_path / "model", dtype="float32", source="toy")
    return tmp_path / "model"


def test_its_config_is_a_section_of_its_own(folder: Path) -> None:
    data = json.loads((folder / "config.json").read_text())
    assert data["generation"] == {"kind": "colour", "image_size": 16, "width": 32, "steps": STEPS}
    config = JanusConfig.load(folder / "config.json")
    assert isinstance(config.generation, ColourConfig)
    assert config.image_size == 16
    with pytest.raises(ConfigError, match="generation: width must be the language hidden size 32"):
        replace(config, generation=replace(config.generation, width=8))


@pytest.mark.parametrize("low_memory", [False, True])
def test_it_generates_in_steps(folder: Path, low_memory: bool) -> None:
    janus = mlx_janus.load(folder, low_memory=low_memory)
    steps = list(janus.stream_images("a fox", n=2, seed=3))
    assert [step.index for step in steps] == [*range(1, STEPS + 1), STEPS, STEPS]
    assert {step.total for step in steps} == {STEPS}
    images = [image for step in steps for image in step.images]
    assert [(image.seed, image.steps, image.tokens) for image in images] == [
        (3, STEPS, None),
        (4, STEPS, None),
    ]
    assert images[0].image.size == (16, 16)
    assert images[0].metadata["steps"] == str(STEPS)
    first, last = steps[0].preview(), steps[-1].preview()
    assert len(first) == len(last) == 2
    assert first[0] != last[0]
    assert last == [image.image for image in images]
    alone = janus.generate_images("a fox", seed=4, exact=True)[0]
    assert alone.image == images[1].image
    assert janus.generate_text("a fox?", max_tokens=3).tokens  # answering goes on beside it


def test_options_of_another_pathway_are_refused(folder: Path) -> None:
    janus = mlx_janus.load(folder)
    with pytest.raises(OptionError, match="temperature is no option of this model"):
        janus.generate_images("a fox", temperature=0.5)
    with pytest.raises(OptionError, match="window is no option"):
        janus.generate_images("a fox", window=2)


def test_its_memory_is_counted(folder: Path) -> None:
    config = JanusConfig.load(folder / "config.json")
    assert required_memory(config, "float32")["drawing"] > 1000 * 256


def test_quantization_is_careful_with_its_parts(folder: Path) -> None:
    janus = mlx_janus.load(folder, bits=4)
    plan = janus.config.quantization
    assert plan is not None
    assert {layer.bits for layer in plan.layers if layer.path.startswith("language_model")} == {4}
    assert "colour_mover" in (plan.kept_float or ())  # 35 wide
    assert janus.generate_images("a fox", seed=1)[0].steps == STEPS


def test_conversations_draw_with_it(folder: Path) -> None:
    talk = mlx_janus.load(folder).conversation()
    (image,) = talk.draw("a fox", seed=1)
    assert talk.messages[-1].pictures[0].image == image.image


def test_the_engine_serves_it(folder: Path) -> None:
    alone = [image.image for image in mlx_janus.load(folder).generate_images("a fox", n=3, seed=7)]

    async def main() -> list[Any]:
        engine = Engine(lambda: mlx_janus.load(folder))
        await engine.start()
        options = engine.pathway.options({})
        request = DrawingRequest("a fox", options, 7, n=3, partial_images=2)
        told = [event async for event in engine.submit(request)]
        await engine.close(0)
        return told

    told = asyncio.run(main())
    drawn = {event.index: event.image.image for event in told if isinstance(event, Drawn)}
    assert [drawn[i] for i in range(3)] == alone
    assert any(isinstance(event, Partial) for event in told)


def test_the_command_draws_with_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = call(
        generate.main, "-m", folder, "-p", "a fox", "--seed", 1, "--preview-dir", "steps", "--json"
    )
    assert done.code == 0, done.stderr
    (made,) = json.loads(done.stdout)["images"]
    assert made["tokens"] is None
    with Image.open(made["path"]) as image:
        assert image.size == (16, 16)
    assert len(list((tmp_path / "steps").iterdir())) == STEPS
