"""From the ids of prompts to pictures, position by position, and from image tokens to pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np
from PIL import Image

from ..decode.image import DrawOptions, draw_tokens
from ..memory import available_memory
from ..models.backbone import cache_bytes
from ..processing.images import to_image
from ..version import __version__
from ..weights.footprint import SAFE_SHARE, decoding_memory
from .results import GeneratedImage, ImageStep
from .window_timing import find_window

if TYPE_CHECKING:
    from ..pipeline import JanusPipeline

_BACKGROUND = (127, 127, 127)  # of what a preview does not show yet


@dataclass(frozen=True)
class Job:
    """A picture to draw: of a prompt, whose ids are those of ``JanusPipeline.drawing_ids``."""

    prompt: str
    ids: list[int]
    seed: int


def stream_pictures(
    janus: JanusPipeline, jobs: Sequence[Job], options: DrawOptions, *, exact: bool = False, window: int | None = None
) -> Iterator[ImageStep]:
    """Draw, position by position, in groups that fit into memory, those with the shortest prompts first; closing stops.

    Args:
        janus: the model.
        jobs: the pictures.
        options: guidance and choice.
        exact: one by one and token by token.
        window: positions read in one pass; None: what is quickest.
    """
    with janus.turn:
        yield from _stream(janus, jobs, options, exact, window)


def _stream(
    janus: JanusPipeline, jobs: Sequence[Job], options: DrawOptions, exact: bool, window: int | None
) -> Iterator[ImageStep]:
    mx.reset_peak_memory()
    janus.prepare("draw")
    groups = _groups(janus, jobs, options, exact)
    total, done = janus.config.image_tokens * len(groups), 0
    finished: list[GeneratedImage] = []
    for group in groups:
        drawn: list[mx.array] = []
        passes = 0
        janus.prepare("draw")
        stream = _start(janus, group, options, 1 if exact else window)
        try:
            for block in stream:
                passes += 1
                for tokens in mx.split(block, block.shape[1], axis=1):
                    drawn.append(tokens[:, 0])
                    done += 1
                    yield ImageStep(done, total, (), _previewer(janus, drawn, finished))
                janus.prepare("draw")  # a preview may have been made
        finally:
            stream.close()  # type: ignore[attr-defined]
        grid = np.array(mx.stack(drawn, axis=1)).astype(np.int32)
        mx.clear_cache()
        for job, row in zip(group, grid, strict=True):
            finished.append(finish(janus, row, job, options, passes))
            yield ImageStep(done, total, (finished[-1],), _previewer(janus, [], finished))


def _groups(janus: JanusPipeline, jobs: Sequence[Job], options: DrawOptions, exact: bool) -> list[list[Job]]:
    """Pictures to draw together: their prompts have one length, and memory is enough."""
    groups = []
    for length in sorted({len(job.ids) for job in jobs}):
        alike = [job for job in jobs if len(job.ids) == length]
        size = 1 if exact else max(pictures_that_fit(janus, length, options), 1)
        groups += [alike[i : i + size] for i in range(0, len(alike), size)]
    return groups


def _start(janus: JanusPipeline, group: Sequence[Job], options: DrawOptions, window: int | None) -> Iterator[mx.array]:
    if window is None:  # several rows already make a pass wide
        window = 1 if len(group) > 1 else find_window(janus.model, options.rows)
    prompts = list(dict.fromkeys(tuple(job.ids) for job in group))
    pictures = [(prompts.index(tuple(job.ids)), job.seed) for job in group]
    unconditional = janus.prompts.unconditional(group[0].ids)
    return draw_tokens(janus.model, prompts, unconditional, pictures, options, window)


def pictures_that_fit(janus: JanusPipeline, prompt_tokens: int, options: DrawOptions, reserved: int = 0) -> int:
    """How many pictures can be drawn at once in the memory that is free, but for ``reserved`` bytes of it."""
    room = SAFE_SHARE * available_memory() - reserved - (0 if janus.low_memory else decoding_memory(janus.config))
    return max(int(room / picture_bytes(janus, prompt_tokens, options)), 0)


def picture_bytes(janus: JanusPipeline, prompt_tokens: int, options: DrawOptions) -> int:
    """Memory that a picture takes while it is drawn: its KV cache and its logits."""
    config, itemsize = janus.config, janus.model.gen_embed.weight.dtype.size
    logits = 4 * 4 * options.rows * config.generation.codebook_size
    return cache_bytes(config.language, options.rows, prompt_tokens + config.image_tokens, itemsize) + logits


def finish(janus: JanusPipeline, tokens: np.ndarray, job: Job, options: DrawOptions, passes: int) -> GeneratedImage:
    """The picture of (image_tokens,) int32 tokens, with what it takes to draw it again."""
    metadata = {
        "prompt": job.prompt,
        "seed": str(job.seed),
        "cfg_weight": f"{options.cfg_weight:.15g}",  # all that was typed, so that it can be drawn again
        "temperature": f"{options.temperature:.15g}",
        "top_p": f"{options.top_p:.15g}",
        "model": janus.name,
        **janus.precision,
        "version": f"mlx_janus {__version__}",
    }
    grid = janus.config.grid
    return GeneratedImage(_decode(janus, tokens[None], (grid, grid)), tokens, job.seed, job.prompt, metadata, passes)


def _decode(janus: JanusPipeline, tokens: np.ndarray, grid: tuple[int, int]) -> Image.Image:
    """(1, rows * columns) tokens -> a picture; one at a time, its activations are the largest of all."""
    janus.prepare("decode")
    pixels = janus.model.decode_image_tokens(mx.array(tokens), grid)
    picture = to_image(np.array(pixels[0]))
    del pixels
    mx.clear_cache()
    return picture


def _previewer(
    janus: JanusPipeline, drawn: list[mx.array], finished: list[GeneratedImage]
) -> Callable[[], list[Image.Image]]:
    count, ready = len(drawn), [image.image for image in finished]

    def preview() -> list[Image.Image]:
        if not count:
            return ready
        rows = np.array(mx.stack(drawn[:count], axis=1))
        return ready + [partial_picture(janus, row) for row in rows]

    return preview


def partial_picture(janus: JanusPipeline, tokens: np.ndarray) -> Image.Image:
    """The picture that (n,) first tokens begin: its rows decoded by themselves, on grey."""
    columns, side = janus.config.grid, janus.config.generation.downsampling
    rows = -(-len(tokens) // columns)
    filled = np.concatenate([tokens, np.repeat(tokens[-1:], rows * columns - len(tokens))])
    canvas = Image.new("RGB", (janus.config.image_size,) * 2, _BACKGROUND)
    canvas.paste(_decode(janus, filled[None], (rows, columns)), (0, 0))
    if last := len(tokens) % columns:
        canvas.paste(_BACKGROUND, (last * side, (rows - 1) * side, columns * side, rows * side))
    return canvas
