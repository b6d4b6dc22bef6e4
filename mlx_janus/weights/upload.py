"""Uploading a converted folder to the Hub, with a model card."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from ..config import JanusConfig
from ..errors import HubError, OptionError
from ..version import __version__
from .convert import Source
from .folder import RECORD_NAME, open_converted
from .hub import HUB_ID, fetch_card

_LICENCE = ("license", "license_name", "license_link")  # keys in the metadata of a card
_OLD_WEIGHTS = ["*.safetensors", "model.safetensors.index.json"]
"""Files of an earlier upload to delete, so that none of its weights stay next to the new ones."""


def check_upload(repo_id: str) -> None:
    """Refuse an upload that cannot succeed, before the conversion starts.

    Raises:
        OptionError: ``repo_id`` is no Hub id.
        HubError: no access token for the Hub is found, or HF_HUB_OFFLINE is set.
    """
    from huggingface_hub import constants, get_token

    if not HUB_ID.fullmatch(repo_id):
        raise OptionError(f"{repo_id[:200]!r} is no Hub id: repo_id=... takes owner/name")
    if constants.HF_HUB_OFFLINE:
        raise HubError(f"{repo_id} cannot be uploaded while HF_HUB_OFFLINE is set: unset it")
    if not get_token():
        raise HubError(
            f"uploading {repo_id} needs a token: "
            "run `hf auth login` with one that may write, or set HF_TOKEN"
        )


def upload_converted(
    folder: Path, source: Source, repo_id: str, *, private: bool = False, again: str = "try again"
) -> str:
    """Upload a converted folder and its model card in one commit; return the repository's URL.

    The repository is created if it does not exist. Weights of an earlier upload are replaced; other
    files are kept.

    Args:
        folder: a converted folder.
        source: the model that it was converted from.
        repo_id: owner/name of the repository.
        private: whether a new repository is private; if False, the owner's default applies.
        again: advice at the end of the error message about an interrupted upload.

    Raises:
        OptionError: ``repo_id`` is no Hub id.
        HubError: no access token for the Hub is found, HF_HUB_OFFLINE is set, the Hub refuses, the
            upload is interrupted, or ``private`` is set but the repository is already public.
    """
    check_upload(repo_id)
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]

    card = model_card(folder, source, repo_id)
    try:
        # The card must not be written into the converted folder. So a temporary folder gets the
        # card, and links to the converted files.
        with tempfile.TemporaryDirectory() as name:
            staged = Path(name)
            for file in folder.iterdir():
                if not RECORD_NAME.fullmatch(file.name):  # it names folders of this machine
                    (staged / file.name).symlink_to(file.resolve())
            (staged / "README.md").write_text(card, encoding="utf-8")
            message = f"Convert {source.name} with mlx_janus {__version__}"
            return _commit(staged, repo_id, message, private=private)
    except HfHubHTTPError as error:
        status = error.response.status_code
        login = "log in with `hf auth login` and a token that may write there"
        # 404: the Hub also hides a private repository from a token without access.
        fix = login if status in (401, 403, 404) else again
        raise HubError(f"the Hub did not take {repo_id} (HTTP {status}): {fix}") from error
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        # The message's first line, or the error's type if the message is empty.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise HubError(f"the upload of {repo_id} broke off ({reason}): {again}") from error


def _commit(folder: Path, repo_id: str, message: str, *, private: bool) -> str:
    """Create a repository unless it exists, and upload a folder in one commit; return its URL.

    Raises:
        HubError: ``private`` is set, but the repository exists and is public.
    """
    from huggingface_hub import HfApi, get_token

    api = HfApi(token=get_token(), library_name="mlx_janus", library_version=__version__)
    # private=None leaves the visibility of a new repository to the owner's default.
    address = api.create_repo(repo_id, repo_type="model", private=private or None, exist_ok=True)
    if private and not api.model_info(repo_id).private:
        raise HubError(
            f"{repo_id} is public: make it private in its settings, or leave private=True out"
        )
    api.upload_folder(
        repo_id=repo_id,
        repo_type="model",
        folder_path=folder,
        commit_message=message,
        ignore_patterns=[".DS_Store"],
        delete_patterns=_OLD_WEIGHTS,
    )
    return str(address)


def model_card(folder: Path, source: Source, repo_id: str) -> str:
    """Return the model card, a README.md, of a converted folder.

    It states the origin, the quantization, the licence and the usage. The licence is the one that
    the source's card names, if any.
    """
    config = JanusConfig.load(folder / "config.json")
    base = source.name if source.revision else None  # Hub id; a local folder has no revision
    licence = _read_licence(source, base)
    origin = f"`{source.name}`"
    if base:
        origin = f"[{base}](https://huggingface.co/{base}), commit {source.revision}"
    return f"""---
{_metadata(config, base, licence)}
---

# {repo_id.split("/")[1]}

{origin}, converted for [MLX](https://github.com/ml-explore/mlx) with mlx_janus {__version__}.

{_precision_text(folder, config)}

Licence of the weights: {_licence_text(licence)}. Converting a model does not change its licence.

## Use

With mlx_janus installed:

```bash
mlx-janus generate -m {repo_id} -p "a lighthouse in a storm"
mlx-janus generate -m {repo_id} -i photo.jpg -p "What is in this picture?"
```

```python
import mlx_janus

janus = mlx_janus.load("{repo_id}")
print(janus.generate_text("What is in this picture?", "photo.jpg").text)
janus.generate_images("a lighthouse in a storm")[0].save("lighthouse.png")
```
"""


def _metadata(config: JanusConfig, base: str | None, licence: dict[str, str]) -> str:
    """Return the metadata of a model card, as YAML.

    Args:
        config: config of the converted model.
        base: Hub id of the source; None for a local folder.
        licence: entries of the source's card by key, from ``_LICENCE``.
    """
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        base_model=base,
        base_model_relation="quantized" if base and config.quantization else None,
        library_name="mlx_janus",
        pipeline_tag="any-to-any",
        tags=["mlx", "janus"],
        license=licence.get("license"),
        license_name=licence.get("license_name"),
        license_link=licence.get("license_link"),
    )
    return str(data.to_yaml())


def _precision_text(folder: Path, config: JanusConfig) -> str:
    """Return the card's paragraph about the quantization and the float type of the weights."""
    _, stamp = open_converted(folder)
    float_types = "Float weights are in the source's types."
    if stamp.get("dtype"):
        float_types = f"Float weights are {config.dtype}, the image codec's in the source's type."
    quantization = config.quantization
    if quantization is None:
        return f"Nothing is quantized. {float_types}"
    too_narrow = ", ".join(f"`{name}`" for name in quantization.kept_float or ()) or "none"
    if quantization.recipe:
        return (
            f"Quantized by the recipe `{quantization.recipe}` of mlx_janus: `config.json` lists "
            "the layers and their bits. The vision encoder, the embeddings, the norms and the "
            "image codec are not quantized. "
            f"Layers too narrow to be quantized: {too_narrow}. {float_types}"
        )
    return (
        f"The language model's linear layers have {quantization.bits} bits, in groups of at most "
        f"{quantization.group_size}; the adaptors and the image head 8 bits. The vision encoder, "
        "the embeddings, the norms and the image codec are not quantized. "
        f"Layers too narrow to be quantized: {too_narrow}. {float_types}"
    )


def _read_licence(source: Source, base: str | None) -> dict[str, str]:
    """Return the entries about the licence in the source's model card, by their keys.

    A relative link is made absolute. The dict is empty if the card is missing or unreadable.
    ``base`` is the source's Hub id, or None for a local folder.
    """
    from huggingface_hub import metadata_load

    card = fetch_card(base, source.revision) if base else source.folder / "README.md"
    try:
        metadata: Any = metadata_load(card) if card and card.is_file() else None
        entries: dict[str, Any] = metadata or {}
    except Exception:  # a card written by others may be malformed, which must not stop an upload
        entries = {}
    licence = {key: str(entries[key]) for key in _LICENCE if entries.get(key)}
    link = licence.get("license_link", "")
    if link and "://" not in link:
        if base is None:
            del licence["license_link"]  # it links to a local file, which is not uploaded
        else:
            licence["license_link"] = f"https://huggingface.co/{base}/blob/{source.revision}/{link}"
    return licence


def _licence_text(licence: dict[str, str]) -> str:
    """Return the card's words about the licence, from the entries of ``_read_licence``."""
    names = ", ".join(licence[key] for key in ("license", "license_name") if key in licence)
    if not names:
        return "not stated by the source's card"
    link = licence.get("license_link")
    return f"{names}, as its source states" + (f" ([text]({link}))" if link else "")
