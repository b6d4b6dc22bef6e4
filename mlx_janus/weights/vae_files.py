"""The files of JanusFlow's autoencoder, which is a repository of its own in diffusers' layout."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError
from .checkpoint import SourceTensor
from .published_flow import VAE_ADVICE, VAE_FILE
from .safetensors_files import read_safetensors_header

VAE_PREFIX = "vae."
"""Begins the names of the autoencoder's parameters, by its name in ``models/flow_parts.py``."""

# Rules from diffusers' names to this package's, applied in order. The older names of attention are
# accepted too.
_RENAMES = [
    (r"^decoder\.up_blocks\.(\d+)\.resnets\.", r"decoder.conv_blocks.\1.res."),
    (r"^decoder\.up_blocks\.(\d+)\.upsamplers\.0\.", r"decoder.conv_blocks.\1.upsample."),
    (r"^decoder\.mid_block\.resnets\.0\.", "decoder.mid.0."),
    (r"^decoder\.mid_block\.resnets\.1\.", "decoder.mid.2."),
    (r"^decoder\.mid_block\.attentions\.0\.", "decoder.mid.1."),
    (r"^(decoder\.mid\.1\.)group_norm\.", r"\1norm."),
    (r"^(decoder\.mid\.1\.)(?:to_q|query)\.", r"\1q."),
    (r"^(decoder\.mid\.1\.)(?:to_k|key)\.", r"\1k."),
    (r"^(decoder\.mid\.1\.)(?:to_v|value)\.", r"\1v."),
    (r"^(decoder\.mid\.1\.)(?:to_out\.0|proj_attn)\.", r"\1proj_out."),
    (r"^(decoder\..+\.)conv_shortcut\.", r"\1nin_shortcut."),
    (r"^decoder\.conv_norm_out\.", "decoder.norm_out."),
]
_RENAME_RULES = [(re.compile(pattern), replacement) for pattern, replacement in _RENAMES]
_UNUSED = ("encoder.", "quant_conv.")  # the other half, from images to latents


@dataclass(frozen=True)
class VAESource:
    """The folder of an autoencoder, with its name and revision."""

    folder: Path
    name: str
    revision: str = ""  # commit on the Hub; "": a local folder

    @property
    def shown(self) -> str:
        """The name, and the revision if there is one, as valid text."""
        name = self.name.encode(errors="replace").decode()
        return f"{name}@{self.revision}" if self.revision else name

    @property
    def files(self) -> list[Path]:
        """The files that a conversion reads."""
        return [self.folder / "config.json", self.folder / VAE_FILE]


def vae_tensors(folder: Path) -> dict[str, SourceTensor]:
    """Return the tensors of an autoencoder's decoder, by their names in this package's model.

    Only the header of the file is read.

    Raises:
        CheckpointError: the file is missing or damaged, or has the names of another layout.
    """
    path = folder / VAE_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} lacks {VAE_FILE}: {VAE_ADVICE}")
    entries: Mapping[str, SourceTensor]
    entries, _ = read_safetensors_header(path)
    tensors: dict[str, SourceTensor] = {}
    for stored_name, tensor in entries.items():
        if stored_name.startswith(("decoder.up.", "decoder.mid.", "first_stage_model.")):
            raise CheckpointError(
                f"{path} has the names of the original autoencoder ({stored_name[:60]!r}), not of "
                f"diffusers: {VAE_ADVICE}"
            )
        if stored_name.startswith(_UNUSED):
            continue
        name = stored_name
        for pattern, replacement in _RENAME_RULES:
            name = pattern.sub(replacement, name)
        tensors[VAE_PREFIX + name] = tensor
    return tensors
