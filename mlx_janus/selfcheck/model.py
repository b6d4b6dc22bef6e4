"""The part "model": a model that the user names, on the device that it runs on.

For Janus-Pro-1B there is a known result: the first image tokens of a prompt of 17 ids, which
transformers' own test has. They depend on the float type, so only the first must be equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import mlx.core as mx
import numpy as np

from ..config import VQGenerationConfig
from ..decode.image import DrawOptions, draw_tokens, text_rows
from ..inference.loaded import TASKS
from ..models.vq_parts import token_config
from ..pipeline import JanusPipeline, load
from .findings import Bound, Check, Status, judge, on_device
from .numbers import float_bound
from .reference import relative_rms
from .speed import measure, speed_checks

PART = "model"
SMOKE_PROMPT = "A portrait of young girl. masterpiece, film grained, best quality."
SMOKE_IDS = 17
SMOKE_TOKENS = (4484, 4015, 15750, 506, 3758, 11651, 8597, 5739)
_LAYERS = 24  # of Janus-Pro-1B's language model
_WIDTH = 2048  # of its hidden states
_CPU_TOKENS = 8  # positions that the CPU reads too, where half precision is slow
_CODEC_BOUND = 2e-4  # deviation of the codec's pixels between two devices


def check_model(name: str, device: str) -> Iterator[Check]:
    """Yield checks of a model: cached steps, finite numbers, the CPU's numbers, and its speed.

    If it is Janus-Pro-1B, its first image tokens are compared with the known ones. Of a model that
    draws no image tokens, only the language model and the vision encoder are checked.

    Args:
        name: a name that ``load`` knows. A published model is downloaded and converted if needed.
        device: "cpu" or "gpu".
    """
    with on_device(device), load(name) as janus:
        for task in TASKS:
            janus.load_weights_for(task)
        precision = ", ".join(janus.precision.values())
        yield _check_cache(janus, device, precision)
        if not isinstance(janus.config.generation, VQGenerationConfig):
            yield from _check_understanding(janus, device, precision)
            return
        yield _check_pixels(janus, device, precision)
        if device != "cpu":
            yield from compare_with_cpu(janus, device, precision)
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
    """Compare the hidden states of one pass over a text with those of single steps with a cache.

    On a CPU, the wider bound of a GPU holds, because one pass and single steps round differently.
    """
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


def _check_understanding(janus: JanusPipeline, device: str, precision: str) -> Iterator[Check]:
    """Yield the checks of a model that draws no image tokens.

    On a GPU, the vision encoder's features are compared with the CPU's; on a CPU, they must be
    finite. A last entry says that drawing is not checked.
    """
    model = janus.model
    side = model.config.understanding.image_size
    pixels = mx.array(np.random.default_rng(0).uniform(-1, 1, (1, side, side, 3)), mx.float32)
    with on_device(device):
        features = model.understand(pixels)
        mx.eval(features)
    if device == "cpu":
        finite = bool(mx.isfinite(features).all())
        status: Status = "ok" if finite else "fail"
        text = "features are finite" if finite else "features are not finite"
        yield Check(PART, "vision encoder", device, precision, status, text)
    else:
        with on_device("cpu"):
            deviation = relative_rms(features, model.understand(pixels))
        bound = _two_device_bound(model.dtype)
        yield judge(PART, "vision encoder and the CPU's", device, precision, deviation, bound)
    text = "skipped: only the drawing of image tokens is checked and timed"
    yield Check(PART, "drawing", device, precision, "ok", text)


def _check_pixels(janus: JanusPipeline, device: str, precision: str) -> Check:
    """Check that the codec's decoder and the vision encoder give finite numbers."""
    model = janus.model
    tokens = mx.zeros((1, token_config(model.config).tokens), mx.int32)
    pixels = model.decode_image_tokens(tokens)
    side = model.config.understanding.image_size
    features = model.understand(mx.zeros((1, side, side, 3)))
    finite = bool(mx.isfinite(pixels).all()) and bool(mx.isfinite(features).all())
    status: Status = "ok" if finite else "fail"
    text = "pixels and features are finite" if finite else "pixels or features are not finite"
    return Check(PART, "codec and encoder", device, precision, status, text)


def compare_with_cpu(janus: JanusPipeline, device: str, precision: str) -> Iterator[Check]:
    """Yield checks of the deviations of a model's networks on a device from those on the CPU.

    Both devices compute with the same weights, in the same precision.
    """
    model = janus.model
    random = np.random.default_rng(0)
    side = model.config.understanding.image_size
    pixels = mx.array(random.uniform(-1, 1, (1, side, side, 3)).astype(np.float32))
    config = token_config(model.config)
    codes = mx.array(random.integers(0, config.codec.codebook_size, (1, config.tokens)))
    ids = mx.array([janus.prompts.drawing(SMOKE_PROMPT)[:_CPU_TOKENS]])

    def image_logits() -> mx.array:
        """Return the image logits of the first positions of a prompt."""
        return model.image_logits(model.hidden_states(model.embed_text(ids)))

    network_bound = _two_device_bound(model.dtype)
    codec_bound = Bound(_CODEC_BOUND, 10 * _CODEC_BOUND, "float32; 10 times as much may be TF32")
    networks: dict[str, tuple[Callable[[], mx.array], Bound]] = {
        "vision encoder and the CPU's": (lambda: model.understand(pixels), network_bound),
        "image logits and the CPU's": (image_logits, network_bound),
        "codec decoder and the CPU's": (lambda: model.decode_image_tokens(codes), codec_bound),
    }
    for about, (compute, bound) in networks.items():
        with on_device(device):
            found = compute()
            mx.eval(found)
        with on_device("cpu"):
            expected = compute()
            deviation = relative_rms(found, expected)
        yield judge(PART, about, device, precision, deviation, bound)


def _two_device_bound(dtype: mx.Dtype) -> Bound:
    """Return the bound of a network's deviation between two devices, in a float type.

    It is wider than the bound of the part "numbers". The devices round differently in every layer,
    and the small model of that part has few layers.
    """
    name = str(dtype).removeprefix("mlx.core.")
    bound = float_bound(name, "gpu")  # type: ignore[arg-type]
    return Bound(2 * bound.ok, 4 * bound.fail, "twice a small model's: the layers are many")


def check_smoke(janus: JanusPipeline, device: str, precision: str) -> Check:
    """Compare the first image tokens of Janus-Pro-1B with those of transformers' test.

    The prompt has no roles: it is bos, the text and begin-of-image. Only the first token must be
    equal. A later difference is worth a warning, because rounding may cause it.
    """
    drawing = janus.prompts.drawing(SMOKE_PROMPT)
    text_ids = janus.tokenizer.encode(SMOKE_PROMPT, add_special_tokens=False).ids
    ids = [drawing[0], *text_ids, drawing[-1]]
    if len(ids) != SMOKE_IDS:
        text = f"the prompt has {len(ids)} ids, not {SMOKE_IDS}: tokenizer.json is another model's"
        return Check(PART, "smoke test", device, precision, "fail", text)
    options = DrawOptions(temperature=0)
    prompt = text_rows(ids, janus.prompts.unconditional(ids), options)
    image = (0, 0)  # index of its prompt, and its seed
    stream = draw_tokens(janus.model, [prompt], [image], options)
    found = [int(np.array(next(stream))[0, 0]) for _ in SMOKE_TOKENS]
    stream.close()  # type: ignore[attr-defined]
    differing = [i for i, token in enumerate(found) if token != SMOKE_TOKENS[i]]
    equal = differing[0] if differing else len(found)  # tokens before the first different one
    status: Status = "warn" if differing else "ok"
    if equal == 0:
        status = "fail"
    text = f"the first {equal} of {len(found)} tokens equal transformers': {found}"
    return Check(PART, "smoke test", device, precision, status, text)
