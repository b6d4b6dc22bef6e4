"""The models of ``serve``: values of --model, folders of --models-from, and options for them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from mlx_janus.commands import serve
from mlx_janus.engine.pool import ModelSource
from mlx_janus.server import run
from mlx_janus.server.settings import Settings
from mlx_janus.weights.names import TINY
from tests.support.golden import FIXTURES
from tests.support.programs import Outcome, call


def served_with(*words: object) -> tuple[Outcome, list[ModelSource], dict[str, Any], Settings]:
    """What the command gives to the server for these words, which is not run."""
    given: list[Any] = []

    def run_nothing(settings: Settings, sources: Sequence[ModelSource], **options: Any) -> int:
        given.extend([list(sources), options, settings])
        return 0

    with mock.patch.object(run, "run_server", run_nothing):
        outcome = call(serve.main, *words)
    sources, options, settings = given or ([], {}, Settings())
    return outcome, sources, options, settings


def names(*words: object) -> list[tuple[str, tuple[str, ...]]]:
    outcome, sources, _, _ = served_with(*words)
    assert outcome.code == 0, outcome
    return [(source.name, source.aliases) for source in sources]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two models, an owner's model, and what is none."""
    models = tmp_path / "models"
    for name in ("small", "other", "owner/third"):
        shutil.copytree(TINY, models / name)
    (models / "notes").mkdir()
    (models / "llama").mkdir()
    (models / "llama" / "config.json").write_text('{"model_type": "llama"}')
    shutil.copytree(TINY, models / "janus-cut")
    (models / "janus-cut" / "tokenizer.json").unlink()
    return models


def test_one_model_keeps_its_own_name() -> None:
    assert names() == [("", ())]
    assert names("-m", "tiny") == [("", ("tiny",))]


def test_several_models_and_names_for_them(tmp_path: Path) -> None:
    folder = tmp_path / "a=b"
    shutil.copytree(TINY, folder)
    assert names("-m", "big=tiny") == [("big", ())]
    same = ("--served-model-name", "big", "--model-alias", "x")  # a name may be given twice
    assert names("-m", "big=tiny", *same) == [("big", ())]
    assert names("-m", "tiny", "-m", folder, "-m", "x=janus-pro-7b", "-m", "janus-1.3b") == [
        ("janus-tiny", ("tiny",)),
        ("a=b", (str(folder),)),
        ("x", ()),
        ("deepseek-ai/Janus-1.3B", ("janus-1.3b",)),
    ]


def test_every_model_of_a_folder(folder: Path) -> None:
    outcome, sources, _, _ = served_with("--models-from", folder)
    assert [source.name for source in sources] == ["other", "owner/third", "small"]
    assert "janus-cut is left out: " in outcome.stderr
    assert "llama" not in outcome.stderr
    assert sources[0].load().name == "other"
    # --model comes first, and the folder that it names is not served twice
    assert [name for name, _ in names("-m", folder / "small", "--models-from", folder)] == [
        "small",
        "other",
        "owner/third",
    ]


def test_only_models_that_are_named_are_converted_before_the_start(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = folder / "published"
    shutil.copytree(FIXTURES / "deepseek-pro-bin", published)
    cache = tmp_path / "conversions"
    monkeypatch.setenv("MLX_JANUS_CACHE", str(cache))
    _, sources, options, _ = served_with("-m", "tiny", "--models-from", folder)
    options["prepare"]()
    assert not list(cache.glob("published*"))
    (source,) = [source for source in sources if source.name == "published"]
    source.load().close()
    assert len(list(cache.glob("published*"))) == 1


def test_the_options_reach_the_server() -> None:
    outcome, sources, options, settings = served_with(
        *("-m", "tiny", "--low-memory", "--idle-unload", "1.5", "--system", "")
    )
    assert outcome.code == 0
    assert (options["idle_seconds"], options["max_loaded"], settings.system) == (90, 1, "")
    with sources[0].load() as janus:  # type: ignore[attr-defined]
        assert janus.low_memory
    _, _, options, settings = served_with()
    assert (options["idle_seconds"], options["max_loaded"], settings.system) == (None, None, None)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("-m", "a=tiny", "-m", "a=janus-pro-1b"), 2, "have the same name, 'a': give one of them"),
        (("-m", "tiny", "-m", "tiny"), 2, "have the same name, 'janus-tiny'"),
        (("-m", "a=tiny", "-m", "b=tiny", "--model-alias", "b"), 2, "have the same name, 'b'"),
        (("-m", "default=tiny"), 2, "stands for the first model: choose another"),
        (("-m", "=tiny"), 2, "must be MODEL or NAME=MODEL"),
        (("-m", "a="), 2, "must be MODEL or NAME=MODEL"),
        (("-m", "a=no such model"), 1, "is neither a folder nor a Hub id"),
        (("-m", "tiny", "-m", "no such model"), 1, "is neither a folder nor a Hub id"),
        (
            ("-m", "janus-pro-1b", "-m", "x=janus-pro-7b", "--revision", "main"),
            2,
            "--revision does not go with several models",
        ),
        (("-m", "a=janus-pro-1b@v1", "--revision", "v2"), 2, "give one of them"),
        (("--models-from", "no/such/folder"), 2, "does not exist"),
    ],
)
def test_mistakes(words: tuple[str, ...], code: int, said: str) -> None:
    outcome, sources, _, _ = served_with(*words)
    assert (outcome.code, sources) == (code, [])
    assert said in outcome.stderr
    assert len(outcome.stderr.strip().splitlines()[-1]) < 400


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    outcome, sources, _, _ = served_with("--models-from", tmp_path)
    assert (outcome.code, sources) == (1, [])
    assert f"{tmp_path} holds no Janus model" in " ".join(outcome.stderr.split())
