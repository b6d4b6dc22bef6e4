"""Finding JanusFlow's autoencoder, which the Hub has in a repository of its own."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from ..config import FlowGenerationConfig, JanusConfig, VAEConfig
from ..errors import CheckpointError, OptionError
from . import hub
from .names import understand_name
from .published_flow import VAE_ADVICE, VAE_FILE, read_vae
from .vae_files import VAESource

DEFAULT_VAE = "stabilityai/sdxl-vae"
"""The autoencoder that JanusFlow was trained with."""


@dataclass(frozen=True)
class VAEPlace:
    """An autoencoder in a folder of this machine, or on the Hub.

    Exactly one of ``folder`` and ``model`` is not None.
    """

    name: str
    folder: Path | None = None
    model: hub.HubModel | None = None

    def read(self) -> VAEConfig:
        """Read the autoencoder's sizes. On the Hub, only ``config.json`` is downloaded.

        Raises:
            CheckpointError, ConfigError, UnsupportedModelError: it is not SDXL's autoencoder.
            HubError, OutputError: the config cannot be downloaded.
        """
        if self.folder is not None:
            return read_vae(self.folder)
        assert self.model is not None
        return read_vae(hub.fetch_config(self.model).parent)

    def facts(self) -> list[object]:
        """Return JSON values that change whenever the autoencoder's files may have changed.

        Raises:
            CheckpointError: the config or the weights are missing.
        """
        if self.model is not None:
            return [self.model.repo_id, self.model.revision]
        assert self.folder is not None
        facts: list[object] = []
        for name in ("config.json", VAE_FILE):
            path = self.folder / name
            if not path.is_file():
                raise CheckpointError(f"{self.folder} lacks {name}: {VAE_ADVICE}")
            status = path.stat()
            facts += [status.st_size, status.st_mtime_ns]
        return facts

    def fetch(self) -> VAESource:
        """Return the folder of the autoencoder's files; on the Hub, download missing ones.

        Raises:
            HubError: the Hub is out of reach, or the download broke off.
            OutputError: the download cannot be written.
        """
        if self.folder is not None:
            return VAESource(self.folder, self.name)
        assert self.model is not None
        folder = hub.fetch_named(self.model, ["config.json", VAE_FILE])
        return VAESource(folder, self.name, self.model.revision)


def find_vae(name: str | os.PathLike[str] | None = None) -> VAEPlace:
    """Find an autoencoder. Nothing is downloaded, and a folder is not checked.

    Args:
        name: a folder, or a Hub id with or without ``@revision``; None: SDXL's.

    Raises:
        HubError: the Hub has no such repository, or is out of reach.
        CheckpointError: the name is no folder and no Hub id, or the repository lacks the config or
            the weights of an autoencoder.
    """
    found = understand_name(DEFAULT_VAE if name is None else name)
    if found.folder is not None:
        return VAEPlace(found.shown, folder=found.folder)
    model = hub.find(found.repo_id or found.shown, found.revision)
    if "config.json" not in model.files or VAE_FILE not in model.files:
        raise CheckpointError(
            f"{model.repo_id} lacks config.json or {VAE_FILE} at its top: {VAE_ADVICE}"
        )
    return VAEPlace(model.repo_id, model=model)


def find_vae_of(config: JanusConfig | None, name: str | os.PathLike[str] | None) -> VAEPlace | None:
    """Find the autoencoder of a PyTorch model; return None if the model needs no separate one.

    Args:
        config: the model's config; None: the model is converted already.
        name: the name of the autoencoder; None: SDXL's, if the model needs one.

    Raises:
        OptionError: a name is given, and the model needs no autoencoder.
        JanusError: as for ``find_vae``.
    """
    if config is not None and isinstance(config.generation, FlowGenerationConfig):
        return find_vae(name)
    if name is not None:
        reason = "is converted already" if config is None else "needs no other autoencoder"
        raise OptionError(f"this model {reason}: leave vae=... out")
    return None


def with_vae(config: JanusConfig, place: VAEPlace | None) -> JanusConfig:
    """Return a config with the sizes of an autoencoder; without one, return the config itself.

    Raises:
        CheckpointError: the autoencoder's latents have another number of channels.
        JanusError: as for ``VAEPlace.read``.
    """
    if place is None or not isinstance(config.generation, FlowGenerationConfig):
        return config
    vae = place.read()
    expected = config.generation.vae.z_channels
    if vae.z_channels != expected:
        raise CheckpointError(
            f"{place.name} has latents of {vae.z_channels} channels, not {expected}: {VAE_ADVICE}"
        )
    return replace(config, generation=replace(config.generation, vae=vae))
