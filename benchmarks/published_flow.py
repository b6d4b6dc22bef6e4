"""A JanusFlow with random weights and the published names, shapes and types, in two folders.

``tests/fixtures`` has the published config, and the names and shapes of JanusFlow-1.3B and of its
autoencoder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.published_files import write_json, write_tokenizer
from benchmarks.published_shapes import MODELS, Tensor
from benchmarks.random_checkpoint import tensor_bits, write_safetensors

FIXTURES = Path(__file__).resolve().parent.parent / "tests" / "fixtures"
CONFIG = FIXTURES / "config_janusflow_1.3b.json"
VAE_FILE = "diffusion_pytorch_model.safetensors"
_SMALL_FILES = ("preprocessor_config", "processor_config", "special_tokens_map", "tokenizer_config")


def model_tensors() -> list[Tensor]:
    """Return the tensors of JanusFlow-1.3B, which are bf16."""
    return _tensors("keys_janusflow_1.3b.txt")


def vae_tensors() -> list[Tensor]:
    """Return the tensors of SDXL's autoencoder, which are float32."""
    return _tensors("keys_sdxl_vae.txt")


def download_bytes() -> int:
    """Return the bytes of the weights that the two repositories hold."""
    return sum(tensor.bytes for tensor in model_tensors()) + sum(
        4 * tensor.count for tensor in vae_tensors()
    )


def _tensors(file: str) -> list[Tensor]:
    """Return the tensors of a file of names and shapes."""
    lines = (FIXTURES / file).read_text(encoding="utf-8").splitlines()
    found = []
    for line in lines:
        if not line.startswith("#"):
            name, shape = line.split(maxsplit=1)
            found.append(_with_spread(name, tuple(json.loads(shape))))
    return found


def _with_spread(name: str, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor whose normals keep activations of order 1."""
    if name.endswith(".bias"):
        return Tensor(name, shape, std=0.02)
    if "channelwise_norm" in name:  # of a response norm, which adds to 1
        return Tensor(name, shape, std=0.05)
    if "norm" in name:
        return Tensor(name, shape, mean=1.0, std=0.05)
    if name.endswith("pos_embed"):
        return Tensor(name, shape, std=0.5)
    if name.endswith(("embed_tokens.weight", "beg_of_und_embed", "latent")):
        return Tensor(name, shape)
    inputs = int(np.prod(shape[1:]))
    return Tensor(name, shape, std=inputs**-0.5)


def write_flow_checkpoint(model: Path, vae: Path, progress: Callable[[int], Any]) -> None:
    """Write the folders of a model and of its autoencoder, which must not exist.

    Args:
        model: the model's folder, 4.1 GB.
        vae: the autoencoder's folder, 0.3 GB.
        progress: receives the bytes that were written.
    """
    model.mkdir(parents=True)
    vae.mkdir(parents=True)
    shutil.copyfile(CONFIG, model / "config.json")
    _write_small_files(model, vae)
    write_tokenizer(model / "tokenizer.json", MODELS["1.3b"], "deepseek")
    write_safetensors(model / "model.safetensors", model_tensors(), 0, progress)
    _write_float32(vae / VAE_FILE, vae_tensors())


def _write_small_files(model: Path, vae: Path) -> None:
    """Write the JSON files of the tiny fixtures, with the published sizes."""
    sizes = {"preprocessor_config": {"image_size": 384}}
    sizes["processor_config"] = {"num_image_tokens": 576}
    for name in _SMALL_FILES:
        data = json.loads((FIXTURES / "janusflow" / f"{name}.json").read_text(encoding="utf-8"))
        write_json(model / f"{name}.json", data | sizes.get(name, {}))
    data = json.loads((FIXTURES / "sdxl-vae" / "config.json").read_text(encoding="utf-8"))
    data |= {"block_out_channels": [128, 256, 512, 512], "norm_num_groups": 32}
    write_json(vae / "config.json", data | {"sample_size": 1024})


def _write_float32(path: Path, tensors: list[Tensor]) -> None:
    """Write a safetensors file of float32 tensors."""
    from safetensors.numpy import save_file

    arrays = {}
    for tensor in tensors:
        bits = tensor_bits(tensor).astype(np.uint32) << 16
        arrays[tensor.name] = bits.view(np.float32)
    save_file(arrays, path, {"format": "pt"})
