"""Models in the folders of other programs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mlx_janus.weights.convert import Source, convert_checkpoint
from mlx_janus.weights.elsewhere import find_elsewhere, list_elsewhere, model_folders
from tests.support.golden import FIXTURES

SOURCE = FIXTURES / "transformers"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder, where models are looked for."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MLX_JANUS_MODELS")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "moved"))
    return tmp_path


def test_the_default_folders_are_those_of_lm_studio_the_hub_and_models(home: Path) -> None:
    assert model_folders() == []
    names = [".lmstudio/models", ".cache/lm-studio/models", "models", ".cache/huggingface/hub"]
    for name in names:
        (home / name).mkdir(parents=True)
    assert model_folders() == [home / name for name in names]


def test_the_hubs_cache_that_is_in_use_is_left_to_huggingface_hub(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = home / ".cache" / "huggingface" / "hub"
    shutil.copytree(SOURCE, cache / "models--a--janus" / "snapshots" / "abc")
    assert [entry.name for entry in list_elsewhere()] == ["a/janus"]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    assert list_elsewhere() == []


def test_which_folders_are_listed(home: Path) -> None:
    models = home / ".lmstudio" / "models"
    convert_checkpoint(Source(SOURCE, "x"), home / "converted")
    shutil.copytree(home / "converted", models / "mlx-community" / "A")
    shutil.copytree(SOURCE, models / "deepseek-ai" / "B")
    shutil.copytree(SOURCE, models / "C")
    (models / "deepseek-ai" / "Janus-Pro-1B-GGUF").mkdir()
    (models / "deepseek-ai" / "llama").mkdir()
    (models / "deepseek-ai" / "llama" / "config.json").write_text('{"model_type": "llama"}')
    (models / "deepseek-ai" / ".hidden-janus").mkdir()
    (models / "janus.txt").write_text("x")
    assert [entry.name for entry in list_elsewhere()] == [
        "C",
        "deepseek-ai/B",
        "deepseek-ai/Janus-Pro-1B-GGUF",
        "mlx-community/A",
    ]
    assert find_elsewhere("mlx-community/A") == models / "mlx-community" / "A"
    assert find_elsewhere("deepseek-ai/B") == models / "deepseek-ai" / "B"
    for unusable in ("deepseek-ai/Janus-Pro-1B-GGUF", "deepseek-ai/llama", "a/b/c", "", "A"):
        assert find_elsewhere(unusable) is None


def test_a_folder_that_is_a_model_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_JANUS_MODELS", str(SOURCE))
    assert [(entry.name, entry.folder) for entry in list_elsewhere()] == [(SOURCE.name, SOURCE)]


def test_weights_that_another_program_quantized_are_not_taken(home: Path) -> None:
    folder = Path(shutil.copytree(SOURCE, home / "models" / "mlx-community" / "Janus-4bit"))
    path = folder / "config.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "quantization": {"group_size": 64, "bits": 4}}))
    assert [entry.name for entry in list_elsewhere()] == ["mlx-community/Janus-4bit"]
    assert find_elsewhere("mlx-community/Janus-4bit") is None
