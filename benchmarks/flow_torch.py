"""JanusFlow's loop on torch: transformers' Llama, and the U-ViT as the paper describes it.

``benchmarks/flow.py`` runs this file in the environment of ``--torch``, so it imports nothing of
this repository. It writes the latents to a file, and prints the times of its steps as JSON.
"""

from __future__ import annotations

import argparse
import inspect
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import safe_open
from torch.nn import functional as F
from transformers import DynamicCache, LlamaConfig, LlamaModel

Weights = dict[str, torch.Tensor]
PARTS = ("vision_gen_enc", "vision_gen_dec")
BODY = "language_model.model."


def load(folder: Path) -> tuple[LlamaModel, Weights]:
    """Return the body of the language model, and the weights of the U-ViT; all float32."""
    sizes = json.loads((folder / "config.json").read_text(encoding="utf-8"))["language_config"]
    llama: Weights = {}
    uvit: Weights = {}
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names = file.keys()
        for name in names:
            if name.startswith(BODY):
                llama[name.removeprefix(BODY)] = file.get_tensor(name).float()
            elif name.startswith(PARTS):
                uvit[name] = file.get_tensor(name).float()
    with torch.device("meta"):
        body = LlamaModel(LlamaConfig(**sizes))
    body.load_state_dict(llama, assign=True)
    body.rotary_emb = type(body.rotary_emb)(config=body.config)  # its buffers are no weights
    return body.eval(), uvit


def linear(w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    """Apply a linear layer."""
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def rms_norm(w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    """Normalize the last axis."""
    return F.rms_norm(x, x.shape[-1:], w[f"{name}.weight"], 1e-6)


def block(w: Weights, name: str, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    """Apply a block of ConvNeXt V2 and the modulation by the time: (B, C, H, W) -> the same."""
    weight = w[f"{name}.depthwise.weight"]
    h = F.conv2d(x, weight, w[f"{name}.depthwise.bias"], padding=3, groups=x.shape[1])
    h = rms_norm(w, f"{name}.norm", h.permute(0, 2, 3, 1))
    h = F.gelu(linear(w, f"{name}.channelwise_linear_1", h))
    norms = h.norm(dim=(1, 2), keepdim=True)
    relative = norms / (norms.mean(-1, keepdim=True) + 1e-6)
    norm = f"{name}.channelwise_norm"
    h = w[f"{norm}.bias"] + (w[f"{norm}.weight"] * relative + 1) * h
    h = linear(w, f"{name}.channelwise_linear_2", h).permute(0, 3, 1, 2) + x
    modulation = linear(w, f"{name}.cond_embeds_mapper", F.silu(time))[..., None, None]
    scale, shift = modulation.chunk(2, dim=1)
    return h * (1 + scale) + shift


def embed_time(w: Weights, t: float, rows: int) -> torch.Tensor:
    """Embed a time from 0 to 1000: (rows, hidden)."""
    name = "vision_gen_enc_model.time_embed"
    half = w[f"{name}.linear_1.weight"].shape[1] // 2
    exponents = -np.float32(np.log(10_000)) * np.arange(half, dtype=np.float32)
    angles = np.float32(t) * np.exp(exponents / np.float32(half))
    features = torch.tensor(np.concatenate([np.cos(angles), np.sin(angles)]))
    hidden = F.silu(linear(w, f"{name}.linear_1", features.expand(rows, -1)))
    return linear(w, f"{name}.linear_2", hidden)


def encode(w: Weights, z: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    """Encode latents: (B, 4, h, w) -> (B, C, h / 2, w / 2)."""
    name = "vision_gen_enc_model"
    x = F.conv2d(z, w[f"{name}.in_conv.weight"], w[f"{name}.in_conv.bias"], stride=2)
    for i in range(2):
        x = block(w, f"{name}.mid_block.res_blocks.{i}", x, time)
    return x


def decode(
    w: Weights, hidden: torch.Tensor, skip: torch.Tensor, time: torch.Tensor
) -> torch.Tensor:
    """Return velocities: (B, positions, hidden) -> (B, 4, h, w)."""
    name = "vision_gen_dec_model"
    x = rms_norm(w, "vision_gen_dec_aligner_norm", hidden)
    x = linear(w, "vision_gen_dec_aligner", x)
    x = rms_norm(w, f"{name}.input_norm", x)
    x = torch.cat([x.transpose(1, 2).reshape(skip.shape), skip], dim=1)
    for i in range(2):
        x = block(w, f"{name}.mid_block.res_blocks.{i}", x, time)
    last = f"{name}.out_convs.0"
    x = rms_norm(w, f"{last}.norm", x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    x = F.conv2d(x, w[f"{last}.unpatch_conv.weight"], w[f"{last}.unpatch_conv.bias"])
    return F.pixel_shuffle(x, 2)


class Loop:
    """The flow of images of one prompt.

    Args:
        body: the language model.
        w: the weights of the U-ViT.
        prompt: the ids of the prompt without the last.
        images: number of images.
        weight: guidance.
    """

    def __init__(self, body: LlamaModel, w: Weights, prompt: list[int], images: int, weight: float):
        self.body = body
        self.w = w
        self.weight = weight
        empty = [prompt[0]] * len(prompt)  # what stands in its places but the first is masked
        rows = torch.tensor([prompt] * images + [empty] * images)
        self.text = body.embed_tokens(rows)
        self.mask = torch.ones(rows.shape, dtype=torch.long)
        self.mask[images:, 1:] = 0
        known = inspect.signature(body.forward).parameters
        self.cache_name = "cache" if "cache" in known else "past_key_values"
        self.cache: DynamicCache | None = None

    def keep_prompt(self) -> None:
        """Read the prompt once, for ``velocity`` with ``kept``."""
        self.cache = DynamicCache()
        self._read(self.text, 0, self.mask, self.cache)

    def velocity(self, z: torch.Tensor, t: float, kept: bool) -> torch.Tensor:
        """Return the guided velocity of latents: (n, 4, h, w) -> the same.

        Args:
            z: the latents.
            t: the time, from 0 to 1000.
            kept: whether the kept prompt is used; otherwise, the prompt is read again.
        """
        z = torch.cat([z, z])
        time = embed_time(self.w, t, len(z))
        x = encode(self.w, z, time)
        patches = linear(self.w, "vision_gen_enc_aligner", x.flatten(2).transpose(1, 2))
        sequence = torch.cat([time[:, None], patches], dim=1)
        ones = torch.ones(sequence.shape[:2], dtype=torch.long)
        mask = torch.cat([self.mask, ones], dim=1)
        if kept:
            assert self.cache is not None
            hidden = self._read(sequence, self.text.shape[1], mask, self.cache)
            self.cache.crop(-sequence.shape[1])
        else:
            hidden = self._read(torch.cat([self.text, sequence], dim=1), 0, mask, None)
        hidden = hidden[:, -patches.shape[1] :]
        conditional, unconditional = decode(self.w, hidden, x, time).chunk(2)
        return self.weight * conditional - (self.weight - 1) * unconditional

    def _read(
        self, x: torch.Tensor, first: int, mask: torch.Tensor, cache: DynamicCache | None
    ) -> torch.Tensor:
        """Run the language model on positions from ``first`` on."""
        positions = torch.arange(first, first + x.shape[1])[None].expand(len(x), -1)
        caching: dict[str, Any] = {} if cache is None else {self.cache_name: cache}
        return self.body(
            inputs_embeds=x,
            attention_mask=mask,
            position_ids=positions,
            use_cache=cache is not None,
            **caching,
        ).last_hidden_state


def clock() -> tuple[float, float]:
    """Return wall time and the CPU time of this process, in seconds."""
    return time.perf_counter(), time.process_time()


def since(started: tuple[float, float]) -> list[float]:
    """Return the seconds since a reading of ``clock``: wall time and CPU time."""
    return [now - then for now, then in zip(clock(), started, strict=True)]


def main() -> None:
    """Run some steps of each prompt, and print their times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a JanusFlow as published")
    parser.add_argument("work", type=Path, help="a folder with the task and the noise")
    parser.add_argument("prompt", help="the name of the task")
    arguments = parser.parse_args()
    work: Path = arguments.work
    task = json.loads((work / f"task-{arguments.prompt}.json").read_text(encoding="utf-8"))
    if task["threads"]:
        torch.set_num_threads(task["threads"])
    noise = torch.tensor(np.load(work / f"noise-{arguments.prompt}.npy")).permute(0, 3, 1, 2)
    body, w = load(arguments.folder)
    facts: dict[str, Any] = {"torch": torch.__version__, "transformers": transformers.__version__}
    loop = Loop(body, w, task["ids"][:-1], len(noise), task["cfg_weight"])
    started = clock()
    loop.keep_prompt()
    facts |= {"prompt": since(started), "kept": [], "whole": []}
    z = noise
    for step in range(task["done"]):
        t = step / task["steps"] * 1000
        started = clock()
        loop.velocity(z, t, kept=False)
        facts["whole"].append(since(started))
        started = clock()
        velocity = loop.velocity(z, t, kept=True)
        facts["kept"].append(since(started))
        print(facts, file=sys.stderr, flush=True)
        z = z + velocity / task["steps"]
    np.save(work / f"torch-{arguments.prompt}.npy", z.permute(0, 2, 3, 1).numpy())
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss
    facts["peak_rss"] = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps(facts))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
