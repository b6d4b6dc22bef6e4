"""The part "model": a model that the user names, on the device that it runs on.

For Janus-Pro-1B there is a known result: the first image tokens of a prompt of 17 ids, which
transformers' own test has. They depend on the float type, so only the first must be equal.
"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from ..decode.image import DrawOptions, draw_tokens
from ..inference.loaded import TASKS
from ..models.vq_parts import token_config
from ..pipeline import JanusPipeline, load
from .findings import Check, Status, judge, on_device
from .numbers import float_bound
from .reference import relative_rms
from .speed import measure, speed_checks

PART = "model"
SMOKE_PROMPT = "A portrait of young girl. masterpiece, film grained, best quality."
SMOKE_IDS = 17
SMOKE_TOKENS = (4484, 4015, 15750, 506, 3758, 11651, 8597, 5739)
_LAYERS = 24  # of Janus-Pro-1B's language model
_WIDTH = 2048  # of its hidden states


def check_model(name: str, device: str) -> Iterator[Check]:
    """Yield checks of a model: finite numbers, cached steps, the smoke test, and its speed.

    Args:
        name: a name that ``load`` knows. A published model is downloaded and converted if needed.
        device: "cpu" or "gpu".
    """
    with on_device(device), load(name) as janus:
        for task in TASKS:
            janus.load_weights_for(task)
        precision = ", ".join(janus.precision.values())
        yield _check_cache(janus, device, precision)
        yield _check_pixels(janus, device, precision)
        if is_pro_1b(janus):
            yield check_smoke(janus, device, precision)
        else:
            text = "skipped: only Janus-Pro-1B has known tokens"
            yield Check(PART, "smoke test", device, precision, "ok", text)
        yield from speed_checks(measure(janus.model, device), janus.name)


def is_pro_1b(janus: JanusPipeline) -> bool:
    """Return whether a model has the sizes and the roles of Janus-Pro-1B."""
    language = janus.config.language
    sizes = (language.num_hidden_layers, language.hidden_size)
    return sizes == (_LAYERS, _WIDTH) and janus.config.prompt.roles == "pro"


def _check_cache(janus: JanusPipeline, device: str, precision: str) -> Check:
    """Compare hidden states of a text read at once with those of single steps with a cache."""
    model = janus.model
    embeddings = model.embed_text(mx.array([janus.prompts.drawing(SMOKE_PROMPT)]))
    whole = model.hidden_states(embeddings)
    cache = model.make_cache()
    steps = [
        model.hidden_states(embeddings[:, i : i + 1], cache) for i in range(embeddings.shape[1])
    ]
    deviation = relative_rms(mx.concatenate(steps, axis=1), whole)
    dtype = str(model.dtype).removeprefix("mlx.core.")
    bound = float_bound(dtype, "gpu")  # type: ignore[arg-type]
    return judge(PART, "steps with a cache", device, precision, deviation, bound)


def _check_pixels(janus: JanusPipeline, device: str, precision: str) -> Check:
    """Check that the codec and the vision encoder give finite numbers."""
    model = janus.model
    tokens = mx.zeros((1, token_config(model.config).tokens), mx.int32)
    pixels = model.decode_image_tokens(tokens)
    side = model.config.understanding.image_size
    features = model.understand(mx.zeros((1, side, side, 3)))
    finite = bool(mx.isfinite(pixels).all()) and bool(mx.isfinite(features).all())
    status: Status = "ok" if finite else "fail"
    text = "pixels and features are finite" if finite else "pixels or features are not finite"
    return Check(PART, "codec and encoder", device, precision, status, text)


def check_smoke(janus: JanusPipeline, device: str, precision: str) -> Check:
    """Compare the first image tokens of Janus-Pro-1B with those of transformers' test.

    The prompt has no roles: bos, the text and begin-of-image.
    """
    drawing = janus.prompts.drawing(SMOKE_PROMPT)
    text_ids = janus.tokenizer.encode(SMOKE_PROMPT, add_special_tokens=False).ids
    ids = [drawing[0], *text_ids, drawing[-1]]
    if len(ids) != SMOKE_IDS:
        text = f"the prompt has {len(ids)} ids, not {SMOKE_IDS}: tokenizer.json is another model's"
        return Check(PART, "smoke test", device, precision, "fail", text)
    options = DrawOptions(temperature=0)
    stream = draw_tokens(janus.model, [ids], janus.prompts.unconditional(ids), [(0, 0)], options)
    found = [int(np.array(next(stream))[0, 0]) for _ in SMOKE_TOKENS]
    stream.close()  # type: ignore[attr-defined]
    equal = next((i for i, t in enumerate(found) if t != SMOKE_TOKENS[i]), len(found))
    status: Status = "ok" if equal == len(found) else "warn" if equal else "fail"
    text = f"the first {equal} of {len(found)} tokens equal transformers': {found}"
    return Check(PART, "smoke test", device, precision, status, text)
