"""``/v1/images/edits`` before an engine that pretends: forms, JSON, streams and refusals."""

from __future__ import annotations

import base64
import io
import json
import time
from typing import Any

import mlx_janus

# isort: split
import httpx
import numpy as np
import pytest
from PIL import Image

from mlx_janus.engine.messages import DrawingRequest
from mlx_janus.server.image_edits import default_edit_sampling
from mlx_janus.server.images import ReplyFormat
from tests.support.fake_engine import FakeEngine
from tests.support.serving import EDIT, connect, read_all, refusal, served, still_works, to

PROMPT = {"prompt": "make it blue"}


def png(colour: str = "red", side: int = 32) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(file, "PNG")
    return file.getvalue()


def noise(side: int) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def part(data: bytes, name: str = "image") -> tuple[str, tuple[str, bytes, str]]:
    return name, ("a.png", data, "image/png")


def edit(client: httpx.Client, *files: Any, **fields: Any) -> httpx.Response:
    return client.post(EDIT, data=PROMPT | fields, files=list(files) or [part(png())])


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def colours(request: Any) -> list[Any]:
    assert isinstance(request, DrawingRequest)
    return [image.getpixel((32, 32)) for image in request.images]


def test_a_form_is_read_as_openai_has_it(client: httpx.Client, engine: FakeEngine) -> None:
    fields = {"n": "2", "seed": "7", "cfg_weight": "3", "cfg_weight2": "1.5", "temperature": "0"}
    others = {"user": "u", "quality": "high", "input_fidelity": "high", "size": "1024x1024"}
    reply = edit(client, **fields, **others, background="", model="fake")
    assert reply.status_code == 200, reply.text
    body = reply.json()
    assert [data["seed"] for data in body["data"]] == [7, 8]
    for data in body["data"]:
        assert Image.open(io.BytesIO(base64.b64decode(data["b64_json"]))).size == (64, 64)
    assert body["size"] == "64x64"
    assert body["usage"] == {
        "input_tokens": 137,
        "input_tokens_details": {"image_tokens": 132, "text_tokens": 5},
        "output_tokens": 128,
        "output_tokens_details": {"image_tokens": 128, "text_tokens": 0},
        "total_tokens": 265,
    }
    (request,) = engine.asked
    assert isinstance(request, DrawingRequest)
    assert (request.prompt, request.n, request.seed) == ("make it blue", 2, 7)
    assert request.options == engine.pathway.edit_options(  # type: ignore[attr-defined]
        {"cfg_weight": 3, "cfg_weight2": 1.5, "temperature": 0}
    )
    assert colours(request) == [(255, 0, 0)]


@pytest.mark.parametrize("name", ["image", "image[]", "images", "image[{}]"])
def test_several_images(client: httpx.Client, engine: FakeEngine, name: str) -> None:
    three = [png("red"), png("lime"), png("blue")]
    files = [part(data, name.format(index)) for index, data in enumerate(three)]
    assert edit(client, *files).status_code == 200
    assert colours(engine.asked[0]) == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


def test_images_as_data_urls(client: httpx.Client, engine: FakeEngine) -> None:
    urls = [data_url(png("red")), {"image_url": data_url(png("lime"))}]
    body = PROMPT | {"images": urls, "n": 2, "seed": 3, "cfg_weight2": 2}
    assert client.post(EDIT, json=body).status_code == 200
    assert colours(engine.asked[0]) == [(255, 0, 0), (0, 255, 0)]
    fields = PROMPT | {"image": data_url(png("blue"))}
    form = client.post(EDIT, files={name: (None, text) for name, text in fields.items()})
    assert form.status_code == 200, form.text
    assert colours(engine.asked[1]) == [(0, 0, 255)]


@pytest.mark.parametrize("path", ["/images/edits", "/v1/images/edits/", "/v1/v1/images/edits"])
def test_other_spellings_of_the_path(client: httpx.Client, path: str) -> None:
    reply = client.post(path, data=PROMPT, files=[part(png())])
    assert reply.status_code == 200


def test_a_stream_shows_previews(client: httpx.Client) -> None:
    reply = edit(client, stream="true", partial_images="2", n="2", output_format="webp")
    assert reply.headers["content-type"].startswith("text/event-stream")
    blocks = [block.split("\n") for block in reply.text.strip().split("\n\n")]
    events = [json.loads(data.removeprefix("data: ")) for _, data in blocks]
    assert [name.removeprefix("event: ") for name, _ in blocks] == [e["type"] for e in events]
    kinds = [event["type"] for event in events]
    assert kinds.count("image_edit.partial_image") == 4
    assert kinds.count("image_edit.completed") == 2
    assert events[-1]["usage"]["input_tokens_details"]["image_tokens"] == 132
    assert {event["output_format"] for event in events} == {"webp"}


def test_urls_and_formats(client: httpx.Client) -> None:
    data = edit(client, response_format="url", output_format="jpeg").json()["data"][0]
    assert data["url"].endswith(".jpeg")
    with Image.open(io.BytesIO(client.get(data["url"]).content)) as image:
        assert image.format == "JPEG"


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt": ""}, "prompt", "Field required"),
        ({"n": "17"}, "n", "less than or equal to 16"),
        ({"n": "two"}, "n", "valid integer"),
        ({"stream": "perhaps"}, "stream", "valid boolean"),
        ({"size": "100x100"}, "size", "auto"),
        ({"cfg_weight2": "-1"}, "cfg_weight2", "greater than or equal to 0"),
        ({"cfg_weight": "nan"}, "cfg_weight", "finite"),
        ({"strength": "0.5"}, "strength", "not supported"),
        ({"mask": "data:"}, "mask", "changes an image as a whole"),
        ({"seed": str(2**63 - 1), "n": "2"}, "seed", "smaller"),
        ({"response_format": "file"}, "response_format", "b64_json"),
        ({"output_format": "gif"}, "output_format", "png"),
        ({"background": "transparent"}, "background", "opaque"),
    ],
)
def test_fields_that_are_refused(
    client: httpx.Client, engine: FakeEngine, fields: dict[str, str], param: str, words: str
) -> None:
    error = refusal(edit(client, **fields), 400)
    assert error["param"] == param
    assert words in error["message"]
    assert not engine.asked
    still_works(client, engine)


def test_a_field_that_is_given_twice_is_refused_by_name(
    client: httpx.Client, engine: FakeEngine
) -> None:
    for twice in ({"prompt": ["make it blue", "make it red"]}, {"seed": ["1", "1"]}):
        error = refusal(edit(client, **twice), 400)
        (name,) = twice
        assert (error["param"], error["message"]) == (name, f"{name} is given twice: send it once")
    assert not engine.asked
    assert edit(client, unknown=["a", "b"]).status_code == 200  # it is ignored


def test_several_images_as_text_of_a_form(client: httpx.Client, engine: FakeEngine) -> None:
    urls = [("image[]", (None, data_url(png(colour)))) for colour in ("red", "blue")]
    reply = client.post(EDIT, files=[*urls, ("prompt", (None, "make it blue"))])
    assert reply.status_code == 200, reply.text
    assert colours(engine.asked[0]) == [(255, 0, 0), (0, 0, 255)]


def test_a_result_in_the_shape_of_the_first_image(client: httpx.Client, engine: FakeEngine) -> None:
    """64 x 64 pixels are those of the model."""
    wide = io.BytesIO()
    Image.new("RGB", (80, 50)).save(wide, "PNG")
    files = (part(wide.getvalue()), part(png()))
    sizes = [
        edit(client, *files, **fields).json()["size"]
        for fields in ({}, {"crop": "false"}, {"crop": "true"})
    ]
    body = PROMPT | {"images": [data_url(wide.getvalue())], "crop": True, "stream": True}
    event = client.post(EDIT, json=body).text.partition("data: ")[2].partition("\n")[0]
    assert [*sizes, json.loads(event)["size"]] == ["64x64", "64x64", "64x40", "64x40"]
    crops = [request.crop for request in engine.asked]  # type: ignore[union-attr]
    assert crops == [None, None, (0, 12, 64, 52), (0, 12, 64, 52)]
    assert refusal(edit(client, crop="perhaps"), 400)["param"] == "crop"


def test_a_cropped_result_is_enlarged_in_its_shape() -> None:
    wide = ReplyFormat(side=1024)
    assert wide.enlarged((64, 40)) == (1024, 640)
    assert wide.enlarged((64, 64)) == (1024, 1024)
    assert ReplyFormat().enlarged((64, 40)) == (64, 40)
    data = wide._encode(Image.new("RGB", (64, 40)), {"prompt": "x"})
    assert Image.open(io.BytesIO(data)).size == (1024, 640)


def test_masks_and_files_in_other_places_are_refused(
    client: httpx.Client, engine: FakeEngine
) -> None:
    error = refusal(edit(client, part(png()), part(png(), "mask")), 400)
    assert error["param"] == "mask"
    assert "leave it out" in error["message"]
    as_json = PROMPT | {"images": [data_url(png())], "mask": {"image_url": data_url(png())}}
    assert refusal(client.post(EDIT, json=as_json), 400)["param"] == "mask"
    files = [part(png()), part(png(), "prompt")]
    assert refusal(client.post(EDIT, files=files), 400)["param"] == "prompt"
    assert not engine.asked


@pytest.mark.parametrize(
    ("files", "param", "words"),
    [
        ([part(noise(200))], "image", "larger than 0.05 MB"),
        ([part(png()), part(b"GIF89a, and no more")], "image[1]", "damaged"),
        ([part(b"%PDF-1.7")], "image", "PDF"),
        ([part(b"")], "image", "empty"),
        ([part(png())] * 17, "image", "17 images are too many: send at most 16"),
        ([part(png())] * 65, None, "too many files"),
        ([("image", ("", b""))], "image", "there is no image"),
        ([part(png(), "picture")], "image", "there is no image"),
    ],
)
def test_images_that_are_refused(
    client: httpx.Client, engine: FakeEngine, files: list[Any], param: str | None, words: str
) -> None:
    error = refusal(edit(client, *files), 400)
    assert error["param"] == param
    assert words in error["message"]
    assert not engine.asked
    still_works(client, engine)


def test_a_large_image_is_refused_by_its_header(client: httpx.Client) -> None:
    file = io.BytesIO()
    Image.new("1", (12_000, 9_000)).save(file, "PNG")
    error = refusal(edit(client, part(file.getvalue()[:40_000])), 400)
    assert "more than 400 MB" in error["message"]


@pytest.mark.parametrize(
    ("kind", "body", "words"),
    [
        ("multipart/form-data", b"--x--", "no boundary"),
        ("multipart/form-data; boundary=", b"--x--", "no boundary"),
        ("multipart/form-data; boundary=" + "x" * 300, b"--x--", "no boundary"),
        ("multipart/form-data; boundary=x", b"", "cut short"),
        ("multipart/form-data; boundary=x", b"nothing", "cannot be read"),
        ("multipart/form-data; boundary=y", b"--x--", "cannot be read"),
        ("multipart/form-data; boundary=x", b"--x\r\n\r\nhello\r\n--x--", "must be provided"),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nblue',
            "cut short",
        ),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\nblue\r\n--x',
            "cut short",
        ),
        (
            "multipart/form-data; boundary=x",
            b"--x\r\nContent-Disposition: " + b"a" * 100_000 + b"\r\n\r\n\r\n--x--",
            "cannot be read",
        ),
        (
            "multipart/form-data; boundary=x",
            b"--x\r\n" + b"A: b\r\n" * 1000 + b"\r\n\r\n--x--",
            "cannot be read",
        ),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nb\r\n' * 65 + b"--x--",
            "too many fields",
        ),
        (
            "multipart/form-data; boundary=x; charset=idna",
            b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n\xff..\r\n--x--\r\n',
            "prompt: Field required",
        ),
        ("application/json", b'{"prompt": "x"', "not JSON"),
        ("application/json", b'{"prompt": "x"}', "images: Field required"),
        ("application/json", b'{"prompt": "x", "images": []}', "images: "),
        ("application/json", b'{"prompt": "x", "images": [{"file_id": "a"}]}', "Field required"),
        ("application/json", b'{"prompt": "x", "images": ["a.png"]}', "must be given as data:"),
    ],
)
def test_bodies_that_are_refused(
    client: httpx.Client,
    engine: FakeEngine,
    kind: str,
    body: bytes,
    words: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    reply = client.post(EDIT, content=body, headers={"Content-Type": kind})
    assert words in refusal(reply, 400)["message"]
    assert not engine.asked
    assert "python_multipart" not in {record.name.partition(".")[0] for record in caplog.records}
    still_works(client, engine)


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded"])
def test_other_types_are_refused(client: httpx.Client, kind: str) -> None:
    reply = client.post(EDIT, content=b"prompt=x", headers={"Content-Type": kind})
    assert "multipart/form-data" in refusal(reply, 415)["message"]


def test_a_form_that_is_too_large_is_refused(client: httpx.Client, engine: FakeEngine) -> None:
    refusal(edit(client, part(bytes(250_000))), 413)
    lines = b"Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 999999999\r\n\r\n"
    with connect(client, f"POST {EDIT}", lines) as connection:
        assert b" 413 " in read_all(connection).splitlines()[0]
    still_works(client, engine)


def test_a_field_may_have_a_megabyte_and_a_file_any_bytes() -> None:
    """Commas in a file are no values of JSON, and a file that looks like a boundary is no part."""
    engine = FakeEngine(mlx_janus.load().config)
    with served(engine) as url, to(url) as client:
        error = refusal(edit(client, prompt="x" * 1_100_000), 400)
        assert "exceeded maximum size" in error["message"]
        started = time.perf_counter()
        for filler in (b",", b"\r\n--", b"\r"):
            content = png() + filler * (20_000_000 // len(filler))
            assert edit(client, part(content)).status_code == 200
        assert time.perf_counter() - started < 10
        assert len(engine.asked) == 3


def test_a_form_of_another_sites_page_is_refused(client: httpx.Client, engine: FakeEngine) -> None:
    """Browsers send forms to other sites without asking first."""
    for headers in (
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
    ):
        reply = client.post(EDIT, data=PROMPT, files=[part(png())], headers=headers)
        assert refusal(reply, 403)["code"] == "wrong_origin"
    assert not engine.asked


def test_a_model_that_cannot_edit_says_so() -> None:
    class DrawingOnly:
        """A pathway of plain drawings."""

        def __init__(self, pathway: Any):
            self.options = pathway.options
            self.steps = pathway.steps

    class Engine(FakeEngine):
        @property
        def pathway(self) -> Any:
            return DrawingOnly(super().pathway)

    engine = Engine(mlx_janus.load().config)
    with served(engine) as url, to(url) as client:
        error = refusal(edit(client), 400)
        assert "cannot change images" in error["message"]
        assert client.get("/v1/models").json()["data"][0]["defaults"]["edits"] is None
    assert not engine.asked


def test_the_model_tells_the_defaults_of_edits(client: httpx.Client, engine: FakeEngine) -> None:
    defaults = client.get("/v1/models").json()["data"][0]["defaults"]["edits"]
    assert defaults == default_edit_sampling(engine)  # type: ignore[arg-type]
    assert (defaults["cfg_weight"], defaults["cfg_weight2"]) == (5, 5)
    edit(client)
    (request,) = engine.asked
    assert request.options.cfg_weight2 == 5  # type: ignore[union-attr]
