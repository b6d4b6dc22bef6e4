"""The same steps in other packages, if installed: transformers' Janus on torch, mlx-vlm's Janus."""

from __future__ import annotations

import importlib.util
import inspect
import time
from collections.abc import Iterator
from typing import Any

import mlx_janus  # noqa: F401  OpenBLAS before MLX

# isort: split
import mlx.core as mx

from benchmarks.parts import PROMPT, Row, Setup, answer, compare, draw, step_row
from mlx_janus.config import JanusConfig
from mlx_janus.memory import materialize


class PeerMissingError(Exception):
    """A package to compare with is not installed; the message says how to install it."""


def transformers(setup: Setup) -> Iterator[Row]:
    """Compare with transformers' Janus on torch: a guided, sampled image step and a text step."""
    _need("torch", "torch==2.13.0 transformers")
    _need("transformers", "torch==2.13.0 transformers")
    import torch

    device = "cpu"
    if mx.default_device().type == mx.DeviceType.gpu:
        if torch.cuda.is_available():
            device = "cuda"
        elif torch.backends.mps.is_available():
            device = "mps"
    materialize((setup.model.drawing_arrays() | setup.model.answering_arrays()).values())
    theirs = _torch_model(setup.model.config, torch, device)
    about = (
        f"transformers' Janus on torch {torch.__version__}, {device}, {setup.model.config.dtype}"
    )
    with torch.inference_mode():
        times = compare(
            lambda: draw(setup.model, 1, setup.steps),
            lambda: _torch_drawing(theirs, torch, setup.steps),
        )
        yield step_row("drawing step", times, about)
        times = compare(lambda: answer(setup), lambda: _torch_answering(theirs, torch, setup.steps))
        yield step_row("answering step", times, about)


def mlx_vlm(setup: Setup) -> Iterator[Row]:
    """Compare with mlx-vlm's language model of Janus (``multi_modality``), with our weights.

    mlx-vlm answers with Janus and does not generate images.
    """
    _need("mlx_vlm", "mlx-vlm")
    from mlx_vlm.models.multi_modality.language import LanguageModel, TextConfig

    materialize(setup.model.answering_arrays().values())
    llama = setup.model.config.language.to_dict()
    known = inspect.signature(TextConfig).parameters
    theirs = LanguageModel(
        TextConfig(model_type="llama", **{k: v for k, v in llama.items() if k in known})
    )
    theirs.update_modules(setup.model.language_model.leaf_modules(), strict=False)
    cache = setup.model.make_cache()

    def steps() -> Iterator[float]:
        """Yield the seconds of each of mlx-vlm's answering steps."""
        token = mx.argmax(theirs(mx.arange(PROMPT)[None], cache=cache).logits[:, -1:], axis=-1)
        mx.eval(token)
        for _ in range(setup.steps):
            started = time.perf_counter()
            token = mx.argmax(theirs(token, cache=cache).logits, axis=-1)
            mx.eval(token)
            yield time.perf_counter() - started

    yield step_row(
        "answering step",
        compare(lambda: answer(setup), steps),
        "mlx-vlm's Janus, one token at a time",
    )


def _need(package: str, install: str) -> None:
    """Check that a package is installed.

    Args:
        package: its name in imports.
        install: the arguments of ``pip install``, for the message.

    Raises:
        PeerMissingError: the package is not installed.
    """
    if importlib.util.find_spec(package) is None:
        raise PeerMissingError(f"{package} is not installed: pip install {install}")


def _torch_model(config: JanusConfig, torch: Any, device: str) -> Any:
    """Return transformers' Janus; the unused vision encoder and codec are as small as possible."""
    from transformers import JanusConfig as TheirConfig
    from transformers import JanusForConditionalGeneration

    llama = config.language.to_dict()
    codec = config.generation.codec
    width = llama["hidden_size"]
    sizes = TheirConfig(
        text_config=llama | {"model_type": llama.pop("kind"), "tie_word_embeddings": False},
        vision_config={
            "num_hidden_layers": 1,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "projection_dim": width,
        },
        vq_config={
            "embed_dim": codec.codebook_dim,
            "num_embeddings": codec.codebook_size,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "latent_channels": 32,
            "projection_dim": width,
            "image_token_embed_dim": width,
        },
        tie_word_embeddings=False,
    )
    with torch.device(device):
        return JanusForConditionalGeneration(sizes).to(getattr(torch, config.dtype)).eval()


def _torch_body(theirs: Any) -> Any:
    """Return a function that reads with a cache: (B, L, hidden) -> (B, 1, hidden), the last."""
    from transformers import DynamicCache

    body = theirs.model.language_model
    known = inspect.signature(body.forward).parameters
    # The name of the argument depends on the release of transformers.
    name = next(name for name in ("cache", "past_key_values") if name in known)
    keywords = {name: DynamicCache(), "use_cache": True}

    def read(x: Any) -> Any:
        return body(inputs_embeds=x, **keywords).last_hidden_state[:, -1:]

    return read


def _torch_drawing(theirs: Any, torch: Any, steps: int) -> Iterator[float]:
    """Yield the seconds of each of transformers' image steps, guided and sampled."""
    read = _torch_body(theirs)
    embed = theirs.get_input_embeddings()
    hidden = read(embed(torch.ones((2, PROMPT), dtype=torch.long, device=theirs.device)))
    for _ in range(steps):
        started = time.perf_counter()
        conditional, unconditional = theirs.model.generation_head(hidden).float().chunk(2)
        logits = unconditional + 5.0 * (conditional - unconditional)
        token = torch.multinomial(logits[:, -1].softmax(-1), 1)
        hidden = read(theirs.prepare_embeddings_for_image_generation(token.repeat(2, 1)))
        hidden.sum().item()  # waits for the device
        yield time.perf_counter() - started


def _torch_answering(theirs: Any, torch: Any, steps: int) -> Iterator[float]:
    """Yield the seconds of each of transformers' answering steps."""
    read = _torch_body(theirs)
    embed = theirs.get_input_embeddings()
    hidden = read(embed(torch.ones((1, PROMPT), dtype=torch.long, device=theirs.device)))
    for _ in range(steps):
        started = time.perf_counter()
        token = theirs.lm_head(hidden).argmax(-1)
        hidden = read(embed(token))
        hidden.sum().item()  # waits for the device
        yield time.perf_counter() - started
