"""The Euler loop of a rectified flow: from noise to an image's latents.

A step reads the time and all patches of the latents at once, after the prompt, and the language
model's output gives the velocity of the latents. Source: ``README.md`` of JanusFlow.

Unusual:

- The prompt's last token is not read: the embedded time stands in its place.
- Attention is causal for patches too. So keys and values of the prompt do not depend on the
  latents: the prompt is read once, and its cache is cut back after every step.
- The unconditional row has bos, then pads that nothing attends to. Positions count these pads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..limits import MAX_CFG_WEIGHT, MAX_STEPS, check_int, check_number, set_checked
from ..models.backbone import Cache, take_rows, trim_cache
from ..models.flow_parts import flow_config
from ..models.flow_uvit import time_features
from ..models.janus import JanusModel
from .prefill import prefill_all
from .sampling import guide

_TIMES = 1000  # the time of a complete image; 0 is noise
_PREFILL_STEP = 512  # positions of a prompt read at once


@dataclass(frozen=True)
class FlowOptions:
    """Options of generating images by a rectified flow.

    At ``cfg_weight`` 1 there is no guidance, so no unconditional row is computed.

    Raises:
        OptionError: an option is out of its range.
    """

    cfg_weight: float = 2.0
    steps: int = 30

    def __post_init__(self) -> None:
        set_checked(
            self,
            cfg_weight=check_number("cfg_weight", self.cfg_weight, 0, MAX_CFG_WEIGHT),
            steps=check_int("steps", self.steps, 1, MAX_STEPS),
        )

    @property
    def exact(self) -> bool:
        """Whether images are generated one by one: never."""
        return False

    @property
    def rows(self) -> int:
        """Rows of the batch for one image: 1 without guidance, else 2."""
        return 1 if self.cfg_weight == 1 else 2

    def metadata(self) -> dict[str, str]:
        """Return the options as text, for an image file's metadata."""
        return {"cfg_weight": f"{self.cfg_weight:.15g}", "steps": str(self.steps)}


def seed_noise(seed: int, shape: tuple[int, int, int]) -> mx.array:
    """Return the noise from which an image of this seed begins: float32, of the given shape.

    It does not depend on the other images of a batch.
    """
    return mx.random.normal(shape, key=mx.random.key(seed))


def step_times(steps: int, dtype: mx.Dtype) -> list[float]:
    """Return the time of each step, from 0 to just below 1000.

    If ``dtype`` is bfloat16, the times are rounded to bfloat16: 333.3 becomes 334. The reference
    rounds them, too, and without the rounding an image looks different.
    """
    times = [step / steps * _TIMES for step in range(steps)]
    if dtype != mx.bfloat16:
        return times
    rounded = mx.array(times).astype(dtype).astype(mx.float32)
    return [float(time) for time in rounded.tolist()]  # type: ignore[union-attr,arg-type]


class FlowDrawing:
    """Images that move from noise to latents together, step by step.

    Args:
        model: the weights.
        prompts: for each of n images, the ids of its prompt but the last id; all of one length.
        pad: the id that fills the unconditional row.
        noise: where the images begin, (n, h, w, z_channels).
        options: guidance and number of steps.
    """

    def __init__(
        self,
        model: JanusModel,
        prompts: Sequence[Sequence[int]],
        pad: int,
        noise: mx.array,
        options: FlowOptions,
    ):
        self.options = options
        self.steps_done = 0
        self.latents = noise.astype(mx.float32)
        self.predicted = self.latents
        """The latents that the images would reach at the velocity of the last step.

        Before the first step, they are the noise.
        """
        self._model = model
        self._prompt_length = len(prompts[0])
        self._cache = self._read_prompts(prompts, pad)
        self._times = time_features(
            step_times(options.steps, model.dtype), flow_config(model.config).uvit.channels
        ).astype(model.dtype)

    def _read_prompts(self, prompts: Sequence[Sequence[int]], pad: int) -> Cache:
        """Read the prompts, and return their KV cache. Equal rows are read only once.

        The cache has the conditional rows of all images first, then their unconditional rows.
        """
        model = self._model
        rows = [tuple(prompt) for prompt in prompts]
        if self.options.rows == 2:
            rows += [(prompt[0], *[pad] * (len(prompt) - 1)) for prompt in prompts]  # bos and pads
        distinct = list(dict.fromkeys(rows))
        positions = self._prompt_length + 1 + flow_config(model.config).positions
        cache = model.make_cache(positions)
        prefill_all(model, model.embed_text(mx.array(distinct)), cache, _PREFILL_STEP)
        return take_rows(cache, [distinct.index(row) for row in rows])

    @property
    def complete(self) -> bool:
        """Whether all steps are done."""
        return self.steps_done == self.options.steps

    def step(self) -> None:
        """Advance every image by a step, and evaluate the latents."""
        velocity = self._guided_velocity()
        done = self.steps_done / self.options.steps  # share of the way, 0 to 1
        self.predicted = self.latents + (1 - done) * velocity
        self.latents = self.latents + velocity / self.options.steps
        mx.eval(self.latents, self.predicted)
        self.steps_done += 1

    def _guided_velocity(self) -> mx.array:
        """Return the velocity of all images, with guidance: (n, h, w, z_channels), float32."""
        rows = self.options.rows
        time = self._times[self.steps_done][None]
        mask = _pass_mask(self._prompt_length, self._positions, len(self.latents), rows)
        latents = mx.concatenate([self.latents] * rows)
        velocity = flow_velocity(self._model, latents, time, self._cache, mask)
        trim_cache(self._cache, self._positions)  # back to the prompt
        if rows == 1:
            return velocity
        conditional, unconditional = mx.split(velocity, 2)
        return guide(conditional, unconditional, self.options.cfg_weight)

    @property
    def _positions(self) -> int:
        """Positions that a step reads: that of the time, and those of the patches."""
        return 1 + flow_config(self._model.config).positions

    def keep(self, indices: Sequence[int]) -> None:
        """Keep the images at these indices, and drop the others."""
        count = len(self.latents)
        # The conditional rows of the kept images, then their unconditional rows.
        rows = [index + count * row for row in range(self.options.rows) for index in indices]
        self._cache = take_rows(self._cache, rows)
        kept = mx.array(list(indices))
        self.latents = self.latents[kept]
        self.predicted = self.predicted[kept]


def flow_velocity(
    model: JanusModel,
    latents: mx.array,
    features: mx.array,
    cache: Cache,
    mask: mx.array | None = None,
) -> mx.array:
    """Return the velocity of latents: (B, h, w, z_channels) -> the same, float32.

    Args:
        model: the weights.
        latents: the latents of each row.
        features: ``time_features`` of the rows, (B, size), or (1, size) if they have one time.
        cache: the prompt of each row; it grows by the positions of the pass.
        mask: of the pass, as for ``JanusModel.hidden_states``.
    """
    encoder = model.vision_gen_enc_model
    time = encoder.time_embed(features.astype(model.dtype))
    encoded = encoder(latents.astype(model.dtype), time)
    rows, height, width, _ = encoded.shape  # height and width in patches
    patches = model.vision_gen_enc_aligner(encoded.reshape(rows, height * width, -1))
    times = mx.broadcast_to(time[:, None], (rows, 1, time.shape[-1]))
    sequence = mx.concatenate([times, patches], axis=1)
    hidden = model.hidden_states(sequence, cache, mask)[:, 1:]  # without the time's position
    hidden = model.vision_gen_dec_aligner_norm(hidden)
    decoded = model.vision_gen_dec_aligner(hidden).reshape(rows, height, width, -1)
    return model.vision_gen_dec_model(decoded, encoded, time).astype(mx.float32)


def _pass_mask(prompt_length: int, positions: int, images: int, rows: int) -> mx.array | None:
    """Return the mask of a pass, bool; None if every row is causal.

    Conditional rows are causal. Unconditional rows are causal, too, but of the prompt they attend
    to the first position only, bos.

    Args:
        prompt_length: P, positions of each row in the cache.
        positions: L, positions that the pass reads.
        images: n, the number of images.
        rows: rows of each image, 1 or 2.

    Returns:
        (rows * n, 1, L, P + L), the conditional rows first.
    """
    if rows == 1:
        return None
    keys = mx.arange(prompt_length + positions)
    queries = mx.arange(positions)[:, None] + prompt_length
    causal = keys <= queries
    is_pad = (keys > 0) & (keys < prompt_length)
    unpadded = causal & ~is_pad
    return mx.stack([causal] * images + [unpadded] * images)[:, None]
