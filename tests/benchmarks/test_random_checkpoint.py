"""The random checkpoints have the published names, shapes and forms, and are readable."""

from __future__ import annotations

import io
import json
import pickletools
import re
import zipfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors import safe_open
from tokenizers import Tokenizer

from benchmarks import photos, published_files
from benchmarks import random_checkpoint as rc
from benchmarks.published_shapes import MODELS, Tensor
from mlx_janus.weights.torch_files import read_torch_file
from tests.support.golden import FIXTURES


def published_keys(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a keys file, ``{i}   i = 0..23`` written out."""
    keys = {}
    for line in (FIXTURES / name).read_text().splitlines():
        if line.startswith("#"):
            continue
        match = re.fullmatch(r"(\S+)(?:\s+i = (\d+)\.\.(\d+))?\s+(\[.*\])", line)
        assert match, line
        key, first, last, shape = match.groups()
        numbers = range(int(first), int(last) + 1) if first else [None]
        for i in numbers:
            written = key if i is None else key.replace("{i}", str(i))
            assert written not in keys
            keys[written] = tuple(json.loads(shape))
    return keys


@pytest.mark.parametrize(
    ("model", "layout", "file", "tensors", "parameters"),
    [
        ("1b", "deepseek", "keys_1.3b_deepseek.txt", 882, 2_089_232_011),
        ("1.3b", "deepseek", "keys_1.3b_deepseek.txt", 882, 2_089_232_011),
        ("1b", "transformers", "keys_1.3b_hf.txt", 964, 2_076_636_811),
        ("7b", "deepseek", "keys_pro-7b_deepseek.txt", 936, 7_420_368_523),
    ],
)
def test_names_and_shapes_are_the_published_ones(
    model: str, layout: str, file: str, tensors: int, parameters: int
) -> None:
    ours = rc.checkpoint_tensors(model, layout)
    assert {t.name: t.shape for t in ours} == published_keys(file)
    assert len(ours) == tensors
    assert sum(t.count for t in ours if not t.name.endswith("codebook_used")) == parameters


def test_7b_is_split_where_the_published_one_is() -> None:
    first, second = rc._shards(rc.checkpoint_tensors("7b"))
    assert [round(sum(t.bytes for t in shard) / 1e9, 2) for shard in (first, second)] == [
        9.99,
        4.85,
    ]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rc.write_checkpoint(tmp_path_factory.mktemp("tiny") / "deepseek")


@pytest.fixture(scope="module")
def tiny_transformers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rc.write_checkpoint(
        tmp_path_factory.mktemp("tiny") / "transformers", layout="transformers"
    )


def test_bin_is_a_zip_as_torch_writes_it(tiny: Path) -> None:
    tensors = rc.checkpoint_tensors("tiny")
    with (
        zipfile.ZipFile(tiny / "pytorch_model.bin") as archive,
        (tiny / "pytorch_model.bin").open("rb") as file,
    ):
        assert archive.testzip() is None
        infos = archive.infolist()
        names = [info.filename.removeprefix("pytorch_model/") for info in infos]
        assert names == [
            "data.pkl",
            "byteorder",
            *(f"data/{i}" for i in range(len(tensors))),
            "version",
        ]
        for info in infos:
            assert info.compress_type == zipfile.ZIP_STORED
            file.seek(info.header_offset + 26)
            lengths = np.frombuffer(file.read(4), "<u2")
            assert (info.header_offset + 30 + int(lengths.sum())) % 64 == 0
        for info, tensor in zip(infos[2:-1], tensors, strict=True):
            assert archive.read(info) == rc.tensor_bits(tensor).tobytes()
        pickled = archive.read("pytorch_model/data.pkl")
    pickletools.dis(pickled, out=io.StringIO())  # checks stack and memo
    instructions = list(pickletools.genops(pickled))
    globals_ = {argument for opcode, argument, _ in instructions if opcode.name == "GLOBAL"}
    assert globals_ == {
        "torch._utils _rebuild_tensor_v2",
        "torch BFloat16Storage",
        "collections OrderedDict",
    }
    assert instructions[0][1] == 2


def test_bin_is_readable_by_our_reader(tiny: Path) -> None:
    stored = read_torch_file(tiny / "pytorch_model.bin")
    tensors = rc.checkpoint_tensors("tiny")
    assert list(stored) == [t.name for t in tensors]
    for tensor in tensors:
        assert tuple(stored[tensor.name].shape) == tensor.shape
        assert "bfloat16" in str(stored[tensor.name].dtype)
    for tensor in (tensors[0], tensors[1], tensors[-1]):
        bits = np.array(mx.array(stored[tensor.name].read()).view(mx.uint16))
        np.testing.assert_array_equal(bits, rc.tensor_bits(tensor))


def test_safetensors_holds_the_same_numbers(tiny_transformers: Path) -> None:
    ours = {t.name: t for t in rc.checkpoint_tensors("tiny", "transformers")}
    qkv = next(
        t for t in rc.checkpoint_tensors("tiny") if t.name.endswith("blocks.1.attn.qkv.weight")
    )
    with safe_open(tiny_transformers / "model.safetensors", "np") as file:
        assert set(file.keys()) == set(ours)
        assert file.metadata() == {"format": "pt"}
        for name, tensor in ours.items():
            assert tuple(file.get_slice(name).get_shape()) == tensor.shape
            assert file.get_slice(name).get_dtype() == "BF16"
    arrays = mx.load(str(tiny_transformers / "model.safetensors"))
    layer = "model.vision_model.encoder.layers.1.self_attn"
    parts = [np.array(arrays[f"{layer}.{p}_proj.weight"].view(mx.uint16)) for p in "qkv"]
    np.testing.assert_array_equal(np.concatenate(parts), rc.tensor_bits(qkv))


def test_values_are_seeded_by_name_and_well_behaved() -> None:
    large = Tensor("large", (3, rc.BLOCK // 2), std=0.5)
    bits = rc.tensor_bits(large)
    np.testing.assert_array_equal(bits, rc.tensor_bits(large))
    assert (
        rc.tensor_bits(Tensor("other", (3, 5))) != rc.tensor_bits(Tensor("other", (3, 5)), seed=1)
    ).any()
    values = (bits.astype(np.uint32) << 16).view(np.float32)
    assert abs(values.std() - 0.5) < 1e-3
    assert abs(np.corrcoef(values[0], values[2])[0, 1]) < 0.01  # rows from the repeated block
    norm = rc.tensor_bits(
        next(t for t in rc.checkpoint_tensors("tiny") if t.name.endswith("norm1.weight"))
    )
    assert abs((norm.astype(np.uint32) << 16).view(np.float32).mean() - 1) < 0.1


@pytest.mark.parametrize(
    ("model", "ids"),
    [
        (
            "1b",
            {
                "BOS": 100000,
                "EOS": 100001,
                "PAD": 100002,
                "IMAGE_START": 100003,
                "IMAGE_END": 100580,
                "IMAGE": 100581,
            },
        ),
        (
            "1.3b",
            {
                "BOS": 100000,
                "EOS": 100001,
                "PAD": 100015,
                "IMAGE_START": 100016,
                "IMAGE_END": 100593,
                "IMAGE": None,
            },
        ),
        (
            "tiny",
            {
                "BOS": 768,
                "EOS": 769,
                "PAD": 770,
                "IMAGE_START": 771,
                "IMAGE_END": 788,
                "IMAGE": 789,
            },
        ),
    ],
)
@pytest.mark.parametrize("layout", ["deepseek", "transformers"])
def test_tokenizer_has_the_published_ids(
    tmp_path: Path, model: str, layout: str, ids: dict[str, int | None]
) -> None:
    path = tmp_path / "tokenizer.json"
    published_files.write_tokenizer(path, MODELS[model], layout)
    tokenizer = Tokenizer.from_file(str(path))
    assert {name: tokenizer.token_to_id(getattr(published_files, name)) for name in ids} == ids
    assert tokenizer.get_vocab_size() <= MODELS[model].sizes.vocab
    text = "A naïve test, 写真 123:  two  spaces\n\n<|User|>: a red glass of wine\n"
    encoded = tokenizer.encode(text).ids
    assert (encoded[0] == ids["BOS"]) == (layout == "transformers")
    assert (
        tokenizer.decode(encoded, skip_special_tokens=False).removeprefix(published_files.BOS)
        == text
    )
    assert len(encoded) < len(text.encode())
    published_files.write_tokenizer(tmp_path / "again.json", MODELS[model], layout)
    assert path.read_bytes() == (tmp_path / "again.json").read_bytes()


def test_configs_have_the_published_form(tiny: Path) -> None:
    small = json.loads((tiny / "config.json").read_text())
    assert small["vision_config"]["params"]["layers"] == 2
    assert small["gen_vision_config"]["params"]["ch_mult"] == [1, 1, 1, 1, 2]
    seven = published_files.deepseek_config(MODELS["7b"])
    assert seven["vision_config"]["params"] == {
        "image_size": 384,
        "model_name": "siglip_large_patch16_384",
        "select_feature": "same",
        "select_layer": -1,
    }
    assert seven["gen_vision_config"]["params"] == {"image_token_size": 16384, "n_embed": 8}
    assert set(seven["language_config"]) == {
        "max_position_embeddings",
        "model_type",
        "num_hidden_layers",
        "torch_dtype",
        "vocab_size",
    }
    old = published_files.deepseek_config(MODELS["1.3b"])["language_config"]
    assert old["_attn_implementation"] == "flash_attention_2"
    assert (old["hidden_size"], old["num_hidden_layers"]) == (2048, 24)


def test_files_beside_the_weights(tiny: Path, tiny_transformers: Path) -> None:
    common = {"config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert {p.name for p in tiny.iterdir()} == common | {
        "pytorch_model.bin",
        "preprocessor_config.json",
        "special_tokens_map.json",
    }
    assert {p.name for p in tiny_transformers.iterdir()} == common | {
        "model.safetensors",
        "chat_template.jinja",
        "generation_config.json",
    }
    assert "<|User|>" in (tiny_transformers / "chat_template.jinja").read_text()
    assert list(tiny.parent.iterdir()) == [tiny]  # nothing half-made is left


def test_sharded_writing_names_every_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rc, "MAX_SHARD", 1_500_000)
    folder = rc.write_checkpoint(tmp_path / "sharded")
    index = json.loads((folder / "pytorch_model.bin.index.json").read_text())
    tensors = rc.checkpoint_tensors("tiny")
    assert list(index["weight_map"]) == [t.name for t in tensors]
    assert index["metadata"]["total_size"] == sum(t.bytes for t in tensors)
    files = sorted(p.name for p in folder.glob("*.bin"))
    assert (
        files
        == sorted(set(index["weight_map"].values()))
        == [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    )


def test_wrong_use_is_one_line(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="exists"):
        rc.write_checkpoint(tiny)
    with pytest.raises(ValueError, match="layout of 7b must be deepseek, got 'transformers'"):
        rc.write_checkpoint(tmp_path / "x", "7b", layout="transformers")
    with pytest.raises(ValueError, match="model must be one of"):
        rc.write_checkpoint(tmp_path / "x", "2b")
    result = CliRunner().invoke(rc.main, [str(tiny)])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert CliRunner().invoke(rc.main, ["x", "--model", "2b"]).exit_code == 2


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(rc, "_write_weights", fail)
    with pytest.raises(KeyboardInterrupt):
        rc.write_checkpoint(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_photographs_come_from_the_wheel(tmp_path: Path) -> None:
    pytest.importorskip("skimage")
    pictures = photos.photographs()
    assert {p.mode for p in pictures.values()} == {"RGB"}
    assert pictures["chelsea"].size == (451, 300)
    result = CliRunner().invoke(photos.main, [str(tmp_path)])
    assert result.exit_code == 0
    assert {p.name for p in tmp_path.iterdir()} == set(photos.FILES.values())


def test_photographs_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photos.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install scikit-image"):
        photos.photographs()
    result = CliRunner().invoke(photos.main, [str(tmp_path)])
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
