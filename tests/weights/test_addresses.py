"""Pasted addresses and revisions in a model's name."""

from __future__ import annotations

import pytest

from mlx_janus.errors import CheckpointError
from mlx_janus.weights.addresses import path_in_address, split_revision

ID = "deepseek-ai/Janus-Pro-1B"


@pytest.mark.parametrize(
    ("text", "revision"),
    [
        (ID, None),
        (f"{ID}/", None),
        (f"{ID}@main", "main"),
        (f"{ID}@refs/pr/3", "refs/pr/3"),
        (f"{ID}/tree/v1", "v1"),
        (f"https://huggingface.co/{ID}", None),
        (f"HTTPS://HuggingFace.co/{ID}/", None),
        (f"http://www.huggingface.co/{ID}?library=transformers#usage", None),
        (f"huggingface.co/{ID}", None),
        (f"hf.co/{ID}/discussions/3", None),
        (f"https://hf-mirror.com/{ID}/tree/main", "main"),
        (f"https://huggingface.co/{ID}/blob/v1.5/config.json", "v1.5"),
        (f"https://huggingface.co/{ID}/resolve/main/model.safetensors?download=true", "main"),
        (f"https://huggingface.co/{ID}/commit/0123abcd", "0123abcd"),
        (f"https://huggingface.co/{ID}/tree/refs%2Fpr%2F1", "refs/pr/1"),
        (f"https://huggingface.co/{ID}/tree/refs/pr/1/folder", "refs/pr/1"),
        (f"https://huggingface.co/api/models/{ID}", None),
        (f"https://user:secret@huggingface.co/{ID}.git", None),
        (f"git@hf.co:{ID}.git", None),
        (f"ssh://git@hf.co/{ID}", None),
        (f"hf://{ID}", None),
        (f"hf://models/{ID}@v1/config.json", "v1"),
        ("models--deepseek-ai--Janus-Pro-1B", None),
    ],
)
def test_ids_and_addresses_of_models(text: str, revision: str | None) -> None:
    assert split_revision(text) == (ID, revision)


@pytest.mark.parametrize("text", ["janus-pro-1b", "a b", "", "a/b/c", "~/x", "@x", "models--gpt2"])
def test_other_names_are_left_as_they_are(text: str) -> None:
    base, _, revision = text.partition("@")
    assert split_revision(text) == (base, revision or None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("https://huggingface.co/spaces/deepseek-ai/Janus", "is of a space"),
        ("huggingface.co/datasets/a/b", "is of a data set"),
        ("https://huggingface.co/deepseek-ai", "names no owner and model"),
        ("https://hf.co", "names no owner and model"),
        ("hf://deepseek-ai", "names no owner and model"),
        ("https://github.com/deepseek-ai/Janus", "github.com is not a model's"),
        ("https://user:secret@evil.example/a/b", "evil.example is not a model's"),
        ("https://[::1", "no host is not a model's"),
        (f"{ID}@", "names no revision after the @"),
    ],
)
def test_other_addresses_are_refused_by_name_and_without_passwords(text: str, words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        split_revision(text)
    assert words in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_address_of_a_mirror(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://models.example:8443/hub")
    assert split_revision(f"https://models.example:8443/{ID}/tree/v1") == (ID, "v1")


def test_the_address_of_a_file() -> None:
    assert path_in_address("file:///models/a%20b") == "/models/a b"
    assert path_in_address("File://localhost/models/100%25") == "/models/100%"
    assert path_in_address("models/a%20b") == "models/a%20b"
    with pytest.raises(CheckpointError, match="is no file of this machine"):
        path_in_address("file://elsewhere.example/models")
