"""Fine-tunes of Janus-Pro as people save them: each form loads and converts as the published one.

The weights are those of one fixture. Only the files around them differ.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import mlx_janus
from mlx_janus.errors import CheckpointError, UnsupportedModelError
from mlx_janus.weights.checkpoint import source_tensors
from mlx_janus.weights.convert import convert_checkpoint
from mlx_janus.weights.sources import find_source
from mlx_janus.weights.verify import verify_conversion
from tests.support.fake_hub import FakeHub
from tests.support.golden import FIXTURES

PUBLISHED = FIXTURES / "deepseek-pro-bin"
Make = Callable[[Path], Path]
"""Make a fine-tune in an empty folder, and return the folder to name."""


def copy_published(folder: Path) -> Path:
    shutil.copytree(PUBLISHED, folder, dirs_exist_ok=True)
    return folder


def read_json(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text())
    return data


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = read_json(path)
    change(data)
    path.write_text(json.dumps(data, indent=2))


def save_as_shards(folder: Path, *, index: dict[str, Any] | None = None) -> None:
    """Replace the weights by two shards of safetensors, as ``save_pretrained`` writes them."""
    tensors = {name: tensor.read() for name, tensor in source_tensors(folder).items()}
    names = sorted(tensors)
    halves = (names[: len(names) // 2], names[len(names) // 2 :])
    weight_map = {}
    for old in folder.glob("pytorch_model*"):
        old.unlink()
    for number, half in enumerate(halves, 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        arrays = {name: tensors[name] for name in half}
        mx.save_safetensors(str(folder / file), arrays, {"format": "pt"})
        weight_map |= dict.fromkeys(half, file)
    content = {"metadata": {}, "weight_map": weight_map} if index is None else index
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def long_processor(data: dict[str, Any]) -> None:
    """Add the entries that ``processor.save_pretrained`` writes out."""
    data |= {
        "image_start_tag": "<begin_of_image>",
        "image_end_tag": "<end_of_image>",
        "pad_tag": "<｜▁pad▁｜>",
    }


def with_crlf(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))


# Forms


def janus_4o(folder: Path) -> Path:
    """Saved by ``save_pretrained`` of the model and the processor, without ``total_size``."""
    copy_published(folder)
    save_as_shards(folder)
    edit(folder / "processor_config.json", long_processor)
    edit(folder / "config.json", lambda data: data.update(_name_or_path="x", auto_map={}))
    (folder / "generation_config.json").write_text('{"_from_model_config": true}')
    (folder / "training_args.bin").write_bytes(b"not read")
    return folder


def t2i_r1(folder: Path) -> Path:
    """Every option of the language model at the top, and further ones in its section."""
    copy_published(folder)
    save_as_shards(folder)

    def flatten(data: dict[str, Any]) -> None:
        language = data["language_config"]
        # Other values than the section's: the top is ignored.
        copies = dict.fromkeys(language, 7) | {"head_dim": 128, "use_cache": False}
        copies |= {"_name_or_path": "deepseek-ai/Janus-Pro-7B", "hidden_size": 4096}
        copies |= {"rope_scaling": None, "torch_dtype": "bfloat16", "eos_token_id": 100001}
        data |= copies | {"model_type": "multi_modality", "torch_dtype": "bfloat16"}
        language |= {"use_cache": False, "bf16": True, "_attn_implementation_autoset": True}

    edit(folder / "config.json", flatten)
    return folder


def janus_pro_r1(folder: Path) -> Path:
    """Small files with the line ends of Windows."""
    copy_published(folder)
    for file in folder.glob("*.json"):
        with_crlf(file)
    return folder


def focus_diff(folder: Path) -> Path:
    """The name of a subclass, and no files of a processor."""
    copy_published(folder)
    save_as_shards(folder)
    edit(folder / "config.json", lambda data: data.update(architectures=["JanusLLamaModel"]))
    with_crlf(folder / "preprocessor_config.json")
    (folder / "processor_config.json").unlink()
    return folder


def ulm_r1(folder: Path) -> Path:
    """The folder of a training, which keeps the model in ``tfmr``."""
    inner = folder / "tfmr"
    inner.mkdir()
    copy_published(inner)
    save_as_shards(inner)
    (folder / "trainer_state.json").write_text("{}")
    return folder


def deep_checkpoint(folder: Path) -> Path:
    """The same, with a model of another family beside, such as a reward model."""
    inner = folder / "run" / "epoch-1" / "tfmr"
    inner.mkdir(parents=True)
    copy_published(inner)
    (folder / "reward").mkdir()
    (folder / "reward" / "config.json").write_text('{"model_type": "bert"}')
    return folder


def cxr(folder: Path) -> Path:
    """The long form of ``processor_config.json``, on one shard without an index."""
    copy_published(folder)
    save_as_shards(folder)
    (folder / "model.safetensors.index.json").unlink()
    edit(folder / "processor_config.json", long_processor)
    return folder


FORMS = (janus_4o, t2i_r1, janus_pro_r1, focus_diff, ulm_r1, deep_checkpoint, cxr)


@pytest.fixture(params=FORMS, ids=lambda form: form.__name__)
def fine_tune(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = tmp_path / "fine-tune"
    folder.mkdir()
    path: Path = request.param(folder)
    return path


def drawn_and_answered(janus: mlx_janus.JanusPipeline) -> tuple[list[int], tuple[int, ...]]:
    image = janus.generate_images("a fox", seed=3, window=1)[0]  # without a timing of windows
    assert image.tokens is not None
    return image.tokens.tolist(), janus.generate_text("What?", image.image, max_tokens=8).tokens


def test_a_fine_tune_converts_as_the_published_form(
    fine_tune: Path, converted: dict[str, Path], tmp_path: Path
) -> None:
    source = find_source(fine_tune)
    conversion = convert_checkpoint(source, tmp_path / "out")
    assert conversion.notes == ()  # every option is known
    wanted = converted["deepseek-pro-bin"]
    for name in ("config.json", "tokenizer.json"):
        contents = [
            json.loads((folder / name).read_text()) for folder in (tmp_path / "out", wanted)
        ]
        assert contents[0] == contents[1]
    ours = mx.load(str(tmp_path / "out" / "model.safetensors"))
    published = mx.load(str(wanted / "model.safetensors"))
    assert isinstance(ours, dict)
    assert isinstance(published, dict)
    assert ours.keys() == published.keys()
    for name, array in published.items():
        assert mx.array_equal(ours[name].view(mx.uint8), array.view(mx.uint8)), name
    assert verify_conversion(source, tmp_path / "out") == len(ours)
    assert source.name == "fine-tune"


def test_a_fine_tune_loads_as_the_published_form(
    fine_tune: Path,
    pro: mlx_janus.JanusPipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLX_JANUS_CACHE", str(tmp_path / "cache"))
    with mlx_janus.load(fine_tune, dtype="float32") as janus:
        assert drawn_and_answered(janus) == drawn_and_answered(pro)
        assert janus.name == "fine-tune"


# A model in a subfolder


def test_the_subfolder_that_is_taken_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_JANUS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "ULM-R1").mkdir()
    mlx_janus.load(ulm_r1(tmp_path / "ULM-R1")).close()
    said = [record.message for record in caplog.records if "tfmr" in record.message]
    assert said == ["ULM-R1: the model is taken from its folder tfmr"]


def test_several_models_in_a_folder_are_named(tmp_path: Path) -> None:
    for step in (100, 200):
        (tmp_path / f"checkpoint-{step}").mkdir()
        copy_published(tmp_path / f"checkpoint-{step}")
    with pytest.raises(CheckpointError, match=r"name one of them, .*point-100, .*point-200$"):
        mlx_janus.load(tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-100")
    (tmp_path / ".hidden").mkdir()
    copy_published(tmp_path / ".hidden")  # such as an unfinished download
    assert find_source(tmp_path).folder == tmp_path / "checkpoint-200"


def test_parts_of_another_model_are_refused(tmp_path: Path) -> None:
    for part in ("vae", "text_encoder"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(CheckpointError, match=r"holds no Janus model, and parts of another"):
        mlx_janus.load(tmp_path)


def test_a_subfolder_on_the_hub(
    fake_hub: FakeHub,
    tmp_path: Path,
    pro: mlx_janus.JanusPipeline,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("MLX_JANUS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "repo").mkdir()
    fake_hub.add("mm-vl/ULM-R1", ulm_r1(tmp_path / "repo"))
    with mlx_janus.load("mm-vl/ULM-R1", dtype="float32") as janus:
        assert drawn_and_answered(janus) == drawn_and_answered(pro)
        assert janus.name == "mm-vl/ULM-R1"
    assert "mm-vl/ULM-R1: the model is taken from its folder tfmr" in caplog.messages
    assert "trainer_state.json" not in fake_hub.downloads()  # only the model's own files come
    fake_hub.stop()
    assert mlx_janus.load("mm-vl/ULM-R1").name == "mm-vl/ULM-R1"  # offline, from the caches
    source = find_source("mm-vl/ULM-R1")
    assert source.folder.name == "tfmr"
    cached = source.folder.parents[2]  # the model's folder in the Hub's cache
    assert find_source(cached).folder.resolve() == source.folder.resolve()
    assert find_source(cached).revision == source.revision


def test_several_subfolders_on_the_hub(fake_hub: FakeHub, tmp_path: Path) -> None:
    for step in (100, 200):
        (tmp_path / "repo" / f"step-{step}").mkdir(parents=True)
        copy_published(tmp_path / "repo" / f"step-{step}")
    fake_hub.add("someone/steps", tmp_path / "repo")
    with pytest.raises(CheckpointError, match=r"step-100, step-200.*hf download someone/steps"):
        mlx_janus.load("someone/steps")
    assert fake_hub.downloads() == []


# Models that are no Janus

SHOW_O = [
    {"_class_name": "Showo", "_diffusers_version": "0.30.1", "num_vq_tokens": 256},
    {"llm_model_path": "microsoft/phi-1_5", "num_vq_tokens": 256, "w_clip_vit": True},
    {"model_type": "showo", "architectures": ["ShowoForConditionalGeneration"]},
    {"_class_name": "Showo2Qwen2_5"},
]


@pytest.mark.parametrize("config", SHOW_O)
@pytest.mark.parametrize("inner", ["", "unwrapped_model"])
def test_show_o_is_refused_by_name(config: dict[str, Any], inner: str, tmp_path: Path) -> None:
    (tmp_path / inner).mkdir(exist_ok=True)
    (tmp_path / inner / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=r"is of Show-o.*UniRL.*no Janus") as caught:
        mlx_janus.load(tmp_path)
    assert "deepseek-ai/Janus-Pro-1B" in str(caught.value)  # what works
    assert "\n" not in str(caught.value)


def test_show_o_is_refused_before_its_weights_come(fake_hub: FakeHub, tmp_path: Path) -> None:
    folder = tmp_path / "repo"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SHOW_O[0]))
    (folder / "pytorch_model.bin").write_bytes(b"weights")
    fake_hub.add("showlab/UniRL", folder)
    with pytest.raises(UnsupportedModelError, match="is of Show-o"):
        mlx_janus.load("showlab/UniRL")
    assert fake_hub.downloads() == ["config.json"]
