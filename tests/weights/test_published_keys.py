"""Options that this package does not know are reported; those of every published file are known."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks.published_files import (
    deepseek_config,
    write_deepseek_files,
    write_json,
    write_transformers_files,
)
from benchmarks.published_shapes import MODELS
from mlx_janus.weights.published import read_published
from mlx_janus.weights.published_keys import option_notes
from tests.support.golden import FIXTURES, FOLDERS

DEEPSEEK = "deepseek-pro-bin"


def copy_small_files(name: str, folder: Path) -> None:
    for file in (FIXTURES / name).iterdir():
        if file.suffix in (".json", ".jinja") and not file.name.endswith(".index.json"):
            shutil.copy(file, folder)


@pytest.fixture(params=[DEEPSEEK, "transformers"])
def small_files(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of the small files of a model, in each layout."""
    copy_small_files(request.param, tmp_path)
    return tmp_path


def notes_with(folder: Path, file: str, *path: str, **options: Any) -> tuple[str, ...]:
    """The notes about a folder, one of whose files has further options in the object at a path."""
    content = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    place = content
    for key in path:
        place = place[key]
    place.update(options)
    (folder / file).write_text(json.dumps(content), encoding="utf-8")
    return read_published(folder).notes


@pytest.mark.parametrize("name", FOLDERS)
def test_the_reference_files_have_no_unknown_option(name: str) -> None:
    published = read_published(FIXTURES / name)
    assert published.notes == tuple(published.roles.notes())


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("layout", ["deepseek", "transformers"])
def test_the_published_files_have_no_unknown_option(
    tmp_path: Path, model: Any, layout: Any
) -> None:
    if layout == "deepseek":
        write_deepseek_files(tmp_path, model)
        write_json(tmp_path / "config.json", deepseek_config(model))
    else:
        write_transformers_files(tmp_path, model, lambda token: 3)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert option_notes(tmp_path, layout, config) == []


def test_options_of_fine_tunes_are_known(tmp_path: Path) -> None:
    """Some copy the language model's options to the top, and name how they were trained."""
    config = deepseek_config(next(iter(MODELS.values())))
    copied = {
        "_name_or_path": "x",
        "hidden_size": 4096,
        "head_dim": 128,
        "rope_scaling": None,
        "use_cache": False,
        "bf16": True,
        "torch_dtype": "bfloat16",
        "_attn_implementation_autoset": True,
        "auto_map": {},
    }
    config["language_config"] |= copied
    assert option_notes(tmp_path, "deepseek", config | copied) == []


PLACES = [
    (DEEPSEEK, "config.json", ()),
    (DEEPSEEK, "config.json", ("language_config",)),
    (DEEPSEEK, "config.json", ("vision_config", "params")),
    (DEEPSEEK, "config.json", ("gen_head_config",)),
    (DEEPSEEK, "processor_config.json", ()),
    (DEEPSEEK, "preprocessor_config.json", ()),
    (DEEPSEEK, "tokenizer_config.json", ()),
    ("transformers", "config.json", ()),
    ("transformers", "config.json", ("text_config",)),
    ("transformers", "config.json", ("vision_config",)),
    ("transformers", "config.json", ("vq_config",)),
    ("transformers", "processor_config.json", ()),
    ("transformers", "processor_config.json", ("image_processor",)),
    ("transformers", "tokenizer_config.json", ()),
    ("transformers", "generation_config.json", ()),
]


@pytest.mark.parametrize(("layout", "file", "path"), PLACES)
def test_unknown_options_are_named_with_their_place(
    tmp_path: Path, layout: str, file: str, path: tuple[str, ...]
) -> None:
    copy_small_files(layout, tmp_path)
    notes = notes_with(tmp_path, file, *path, new_norm=1, _private=2, old_norm=None)
    prefix = ".".join(("", *path, ""))[1:] if file == "config.json" else ""
    names = f"{prefix}new_norm, {prefix}old_norm"
    assert notes == (f"{file}: unknown options have no effect: {names}",)


def test_a_note_is_one_short_line_whatever_the_names(small_files: Path) -> None:
    names = ["line\nbreak", "x" * 5000, "\x1b[2J", *map(str, range(1000))]
    (note,) = notes_with(small_files, "config.json", **dict.fromkeys(names))
    assert note.isprintable()
    assert len(note) < 300
    assert note.endswith(" and 995 more")


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.2},
        {"no_repeat_ngram_size": 3},
        {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.9},
        {"suppress_tokens": [3]},
    ],
)
@pytest.mark.parametrize(
    ("layout", "file", "path"),
    [
        ("transformers", "generation_config.json", ()),
        (DEEPSEEK, "config.json", ("language_config",)),
    ],
)
def test_options_of_generation_that_are_not_followed(
    tmp_path: Path, layout: str, file: str, path: tuple[str, ...], options: dict[str, Any]
) -> None:
    copy_small_files(layout, tmp_path)
    (note,) = notes_with(tmp_path, file, *path, **options)
    assert note.startswith(f"{file}: options that are not followed: ")
    for name, value in options.items():
        assert f"{name} {value}" in note


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1, "top_k": 50, "top_p": 1.0, "do_sample": False, "num_beams": 1},
        {"repetition_penalty": 1.0, "suppress_tokens": [], "sequence_bias": {}, "min_length": 0},
    ],
)
def test_options_that_change_nothing_are_not_noted(tmp_path: Path, options: dict[str, Any]) -> None:
    copy_small_files("transformers", tmp_path)
    assert notes_with(tmp_path, "generation_config.json", **options) == ()


def test_deepseeks_code_reads_no_generation_config(tmp_path: Path) -> None:
    """transformers writes one into every fine-tune, with the defaults of LlamaConfig."""
    copy_small_files(DEEPSEEK, tmp_path)
    ids = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "new": 3}
    assert notes_with(tmp_path, "generation_config.json", **ids) == ()
    assert read_published(tmp_path).config.prompt.stop_ids is None


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("add_bos_token", False),
        ("add_prefix_space", True),
        ("clean_up_tokenization_spaces", True),
        ("split_special_tokens", True),
    ],
)
def test_options_of_the_tokenizer_that_are_not_followed(
    small_files: Path, option: str, value: bool
) -> None:
    (note,) = notes_with(small_files, "tokenizer_config.json", **{option: value})
    assert note == f"tokenizer_config.json: options that are not followed: {option} {value}"
