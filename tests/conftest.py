"""Fixtures that several test files share."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Tests run side by side, and OpenBLAS's threads wait by spinning.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# isort: split
import mlx_janus  # OpenBLAS before MLX

# isort: split
import mlx.core as mx
import pytest

from mlx_janus.weights.convert import Source, convert_checkpoint
from tests.support.fake_hub import FakeHub
from tests.support.golden import FIXTURES, FOLDERS

if TYPE_CHECKING:
    import httpx

    from tests.support.fake_engine import FakeEngine

mx.set_default_device(mx.cpu)  # the reference's numbers are held in float32 on a CPU, on a Mac too


class _Hurried:
    """``time`` for huggingface_hub's retries: the same, but no sleep takes longer than a moment."""

    def __getattr__(self, name: str) -> object:
        return getattr(time, name)

    @staticmethod
    def sleep(seconds: float) -> None:
        time.sleep(min(seconds, 0.01))


@pytest.fixture(autouse=True, scope="session")
def _private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What ``load`` converts goes to a folder of this run, never to the user's cache.

    The user's other models are not looked for.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_JANUS_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("MLX_JANUS_MODELS", "")
        yield


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every fixture folder, converted as it is."""
    root = tmp_path_factory.mktemp("converted")
    for name in FOLDERS:
        convert_checkpoint(Source(FIXTURES / name, name), root / name)
    return {name: root / name for name in FOLDERS}


@pytest.fixture(scope="session")
def pipelines(converted: dict[str, Path]) -> dict[str, mlx_janus.JanusPipeline]:
    return {name: mlx_janus.load(path, dtype="float32") for name, path in converted.items()}


@pytest.fixture(params=FOLDERS)
def folder(request: pytest.FixtureRequest) -> str:
    """The name of a fixture folder: each in turn."""
    return str(request.param)


@pytest.fixture
def janus(folder: str, pipelines: dict[str, mlx_janus.JanusPipeline]) -> mlx_janus.JanusPipeline:
    """A pipeline in float32: each fixture folder in turn."""
    return pipelines[folder]


@pytest.fixture
def pro(pipelines: dict[str, mlx_janus.JanusPipeline]) -> mlx_janus.JanusPipeline:
    """One pipeline, for what does not depend on the folder."""
    return pipelines["deepseek-pro-bin"]


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Yield an empty fake Hub for huggingface_hub; subprocesses need ``os.environ | hub.env``.

    The cache is a fresh folder; Xet, telemetry, tokens and proxies are off.
    """
    import huggingface_hub
    from huggingface_hub import constants, file_download, hf_api
    from huggingface_hub.utils import _http

    home = tmp_path / "hf-home"
    with FakeHub() as hub:
        hub.env = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
        }
        for name, value in hub.env.items():
            monkeypatch.setenv(name, value)
        for name in (
            "HF_TOKEN",
            "HUGGING_FACE_HUB_TOKEN",
            "HUGGINGFACE_HUB_CACHE",
            "TRANSFORMERS_OFFLINE",
        ):
            monkeypatch.delenv(name, raising=False)
        known = {  # huggingface_hub read its environment when it was imported
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HUGGINGFACE_HUB_CACHE": str(home / "hub"),
            "HF_ASSETS_CACHE": str(home / "assets"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
            "AGENT_HARNESSES_PATH": str(home / ".agent_harnesses.json"),
            "HF_URL_HOSTS": frozenset({"127.0.0.1"}),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_TELEMETRY": True,
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": True,
            "HF_HUB_OFFLINE": False,
        }
        for name, value in known.items():
            if hasattr(constants, name):  # some came with huggingface_hub 2
                monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
        monkeypatch.setattr(file_download, "time", _Hurried())
        monkeypatch.setattr(_http, "time", _Hurried())
        huggingface_hub.close_session()  # a client made before may go through a proxy
        yield hub
        huggingface_hub.close_session()


# A server before an engine that pretends. The imports are here since other tests need none of them.


@pytest.fixture(scope="module")
def small_server() -> Iterator[tuple[FakeEngine, str]]:
    """An engine, and the address of a server with small limits."""
    from tests.support.fake_engine import FakeEngine
    from tests.support.serving import served

    limits: dict[str, Any] = {"body_limit": 200_000, "bodies_limit": 300_000, "image_limit": 50_000}
    engine = FakeEngine(mlx_janus.load().config)
    with served(engine, body_seconds=0.5, most_requests=8, heartbeat_seconds=0.2, **limits) as url:
        yield engine, url


@pytest.fixture
def engine(small_server: tuple[FakeEngine, str]) -> FakeEngine:
    """The engine as new."""
    from tests.support.serving import wait_until

    wait_until(lambda: small_server[0].open == 0)
    small_server[0].reset()
    return small_server[0]


@pytest.fixture
def client(engine: FakeEngine, small_server: tuple[FakeEngine, str]) -> Iterator[httpx.Client]:
    """A client of the server with small limits."""
    from tests.support.serving import to

    with to(small_server[1]) as client:
        yield client
