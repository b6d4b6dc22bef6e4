"""Generated images as clients of DALL-E ask for them: sizes, URLs, formats and model names."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import mlx_janus

# isort: split
import httpx
import pytest
from PIL import Image

from mlx_janus.processing.saved_images import read_metadata
from mlx_janus.server.image_store import ImageStore
from mlx_janus.weights.published import read_published_sizes
from tests.support.fake_engine import FakeEngine
from tests.support.golden import FIXTURES
from tests.support.serving import CHAT, DRAW, EDIT, HELLO, refusal, served, to

OWN = "64x64"


def draw(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    reply = client.post(DRAW, json={"prompt": "a fox", "seed": 3} | fields)
    assert reply.status_code == 200, reply.text
    return reply.json()


def decoded(data: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data["b64_json"])))


@pytest.mark.parametrize("size", [None, "auto", OWN, "256x256", "1024x1024", "1792x1024"])
def test_sizes_of_openai_give_the_models_own_size(client: httpx.Client, size: str | None) -> None:
    reply = draw(client, size=size)
    assert (reply["size"], reply["quality"], reply["output_format"]) == (OWN, "auto", "png")
    assert decoded(reply["data"][0]).size == (64, 64)


@pytest.mark.parametrize("size", ["64x65", "large", "384x384", "0x0"])
def test_other_sizes_are_refused(client: httpx.Client, size: str) -> None:
    error = refusal(client.post(DRAW, json={"prompt": "a fox", "size": size}), 400)
    assert error["param"] == "size"
    assert OWN in error["message"]


def test_images_are_enlarged_to_the_size_if_the_server_is_set_so(engine: FakeEngine) -> None:
    with served(engine, upscale_to_size=True) as url, to(url) as client:
        reply = draw(client, size="1792x1024")
        assert reply["size"] == "1024x1024"
        image = decoded(reply["data"][0])
        assert image.size == (1024, 1024)
        assert image.text["enlarged_to"] == "1024 (Lanczos)"
        assert draw(client)["size"] == OWN
        body = {"prompt": "a fox", "size": "256x256", "stream": True, "partial_images": 1}
        text = client.post(DRAW, json=body).text
        assert text.count('"size":"256x256"') == 2


@pytest.mark.parametrize(("name", "kind"), [("jpeg", "JPEG"), ("webp", "WEBP"), ("png", "PNG")])
def test_formats(client: httpx.Client, tmp_path: Any, name: str, kind: str) -> None:
    reply = draw(client, output_format=name, output_compression=30)
    assert reply["output_format"] == name
    data = base64.b64decode(reply["data"][0]["b64_json"])
    path = tmp_path / f"a.{name}"
    path.write_bytes(data)
    with Image.open(path) as image:
        assert image.format == kind
    assert read_metadata(path)["seed"] == "3"
    body = {"prompt": "a fox", "output_format": name, "stream": True, "partial_images": 1}
    assert client.post(DRAW, json=body).text.count(f'"output_format":"{name}"') == 2


def test_the_url_of_an_image_needs_no_key_and_cannot_be_guessed(engine: FakeEngine) -> None:
    with served(engine, api_key="s3cret") as url, to(url) as client:
        key = {"Authorization": "Bearer s3cret"}
        body = {"prompt": "a fox", "n": 2, "response_format": "url", "output_format": "webp"}
        reply = client.post(DRAW, json=body, headers=key)
        data = reply.json()["data"]
        assert all("b64_json" not in one for one in data)
        addresses = [one["url"] for one in data]
        assert len(set(addresses)) == 2
        for address in addresses:
            assert address.startswith(f"{url}/images/")
            page = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}
            shown = client.get(urlsplit(address).path, headers=page)
            assert shown.status_code == 200
            assert shown.headers["content-type"] == "image/webp"
            assert shown.headers["cross-origin-resource-policy"] == "cross-origin"
            assert shown.headers["x-content-type-options"] == "nosniff"
            assert Image.open(io.BytesIO(shown.content)).size == (64, 64)
        wrong = client.get(urlsplit(addresses[0]).path[:-6] + "A.webp")
        assert refusal(wrong, 404)["code"] == "not_found"


def test_images_are_kept_for_an_hour_and_in_bounded_memory() -> None:
    now = 0.0
    store = ImageStore(max_bytes=100, seconds=3600, clock=lambda: now)
    first = store.add(b"a" * 60, ".png", "image/png")
    assert store.get(first).data == b"a" * 60
    second = store.add(b"b" * 60, ".png", "image/png")
    assert store.get(first) is None
    now = 3599
    third = store.add(b"c" * 30, ".webp", "image/webp")
    assert store.get(second) is not None
    now = 3601
    assert store.get(second) is None
    assert store.get(third).media_type == "image/webp"
    assert store._bytes == 30
    assert len({store.add(b"", "", "") for _ in range(100)}) == 100


def test_dall_e_gives_urls_by_default_as_at_openai() -> None:
    """Clients made for DALL-E, such as LangChain's, read ``url`` without asking for it."""
    engine = FakeEngine(mlx_janus.load().config)
    with served(engine, model_aliases=("dall-e-3", "gpt-image-1")) as url, to(url) as client:
        assert set(draw(client, model="dall-e-3")["data"][0]) == {"url", "seed"}
        for fields in (
            {"model": "gpt-image-1"},
            {"model": "dall-e-3", "response_format": "b64_json"},
            {},
        ):
            assert set(draw(client, **fields)["data"][0]) == {"b64_json", "seed"}


@pytest.mark.parametrize(
    "field",
    [
        {"negative_prompt": "red"},
        {"image": "data:image/png;base64,AAAA"},
        {"steps": 4},
        {"width": 512},
        {"loras": ["x"]},
    ],
)
def test_fields_that_would_change_the_image_are_refused(
    client: httpx.Client, engine: FakeEngine, field: dict[str, Any]
) -> None:
    error = refusal(client.post(DRAW, json={"prompt": "a fox"} | field), 400)
    assert error["param"] == next(iter(field))
    assert not engine.asked


def test_fields_that_change_nothing_are_accepted(client: httpx.Client) -> None:
    draw(client, negative_prompt="", images=[], style="vivid", quality="hd", user="u", unknown=1)


def test_the_model_tells_its_defaults(client: httpx.Client, engine: FakeEngine) -> None:
    model = client.get("/v1/models").json()["data"][0]
    own = engine.config.generation
    assert model["defaults"] == {
        "answers": {"temperature": 0, "top_p": 1, "max_tokens": 512},
        "images": {"cfg_weight": own.cfg_weight, "temperature": own.temperature, "top_p": 1},
        "edits": {"cfg_weight": 5, "cfg_weight2": 5, "temperature": own.temperature, "top_p": 1},
    }
    client.post(CHAT, json=HELLO)
    draw(client)
    answer, images = engine.asked
    assert answer.options.max_tokens == model["defaults"]["answers"]["max_tokens"]
    assert images.options.cfg_weight == model["defaults"]["images"]["cfg_weight"]


def test_other_names_of_the_model() -> None:
    engine = FakeEngine(mlx_janus.load().config)
    names = {"served_names": ("janus", "painter"), "model_aliases": ("dall-e-3", "gpt-4o")}
    with served(engine, **names) as url, to(url) as client:
        listed = [model["id"] for model in client.get("/v1/models").json()["data"]]
        assert listed == ["janus", "painter"]
        for name in ("janus", "painter", "dall-e-3", "gpt-4o", "default", engine.name):
            assert client.post(CHAT, json=HELLO | {"model": name}).json()["model"] == "janus"
            assert draw(client, model=name)["data"]
            found = client.get(f"/v1/models/{name}").json()["id"]
            assert found == (name if name in listed else "janus")
        other = refusal(client.post(CHAT, json=HELLO | {"model": "gpt-5"}), 404)
        assert "use 'janus'" in other["message"]
        assert client.get("/health").json()["model"] == "janus"


# A model that draws by a rectified flow


@pytest.fixture(scope="module")
def flow_server() -> Iterator[tuple[FakeEngine, str]]:
    """An engine with JanusFlow's config, and the address of its server."""
    config, _ = read_published_sizes(FIXTURES / "config_janusflow_1.3b.json")
    engine = FakeEngine(config)
    with served(engine) as url:
        yield engine, url


def test_a_flow_takes_steps(flow_server: tuple[FakeEngine, str]) -> None:
    engine, url = flow_server
    engine.reset()
    with to(url) as client:
        defaults = client.get("/v1/models").json()["data"][0]["defaults"]
        assert defaults["images"] == {"cfg_weight": 2, "steps": 30}
        assert defaults["edits"] is None
        draw(client)
        draw(client, steps=4.0, cfg_weight=3, top_p=1.0)
        few = {"prompt": "a fox", "steps": 3, "stream": True, "partial_images": 8}
        assert client.post(DRAW, json=few).status_code == 200
    own, chosen, streamed = engine.asked
    assert (own.options.steps, own.options.cfg_weight) == (30, 2)
    assert (chosen.options.steps, chosen.options.cfg_weight) == (4, 3)
    assert streamed.partial_images == 3  # at most one a step


def test_a_flow_takes_steps_in_the_tool_of_responses(flow_server: tuple[FakeEngine, str]) -> None:
    engine, url = flow_server
    engine.reset()
    tool = {"type": "image_generation", "steps": 4}
    body = {"input": "a fox", "tools": [tool], "tool_choice": "required"}
    with to(url) as client:
        assert client.post("/v1/responses", json=body).status_code == 200
        tool["steps"] = 1001
        error = refusal(client.post("/v1/responses", json=body), 400)
        assert "less than or equal to 1000" in error["message"]
    (request,) = engine.asked
    assert request.options.steps == 4


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ({"temperature": 0.5}, "temperature is no option of a model that draws by a rectified"),
        ({"top_p": 0.5}, "top_p is no option of a model that draws by a rectified"),
        ({"steps": 0}, "greater than or equal to 1"),
        ({"steps": 1001}, "less than or equal to 1000"),
        ({"steps": 2.5}, "valid integer"),
        ({"size": "512x384"}, "the model's own '384x384'"),
        ({"mask": "data:"}, "mask is not supported"),
        ({"image": "data:"}, "image is not supported"),
    ],
)
def test_fields_that_a_flow_has_not_are_refused_by_name(
    flow_server: tuple[FakeEngine, str], field: dict[str, Any], words: str
) -> None:
    engine, url = flow_server
    engine.reset()
    with to(url) as client:
        error = refusal(client.post(DRAW, json={"prompt": "a fox"} | field), 400)
    assert words in error["message"]
    assert error["param"] == next(iter(field))
    assert not engine.asked


def test_a_flow_says_that_it_changes_no_images(flow_server: tuple[FakeEngine, str]) -> None:
    """A mask is no reason then: without it, the request would be refused too."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    files = {name: ("a.png", file.getvalue()) for name in ("image", "mask")}
    with to(flow_server[1]) as client:
        error = refusal(client.post(EDIT, data={"prompt": "a fox"}, files=files), 400)
    assert error["message"] == (
        "this model cannot change images: it generates them from prompts only"
    )


def test_steps_are_refused_by_name_where_image_tokens_are_drawn(
    client: httpx.Client, engine: FakeEngine
) -> None:
    error = refusal(client.post(DRAW, json={"prompt": "a fox", "steps": 4}), 400)
    assert (error["param"], engine.asked) == ("steps", [])
    assert "steps is no option of a model that draws image tokens" in error["message"]
