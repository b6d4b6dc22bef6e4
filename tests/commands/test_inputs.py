"""Inputs from elsewhere than a file: the web, over https only and within limits, and stdin."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mlx_janus import JanusPipeline, errors
from mlx_janus.commands import generate, inputs
from mlx_janus.processing import web
from mlx_janus.processing.images import open_image
from tests.support.picture_site import PICTURE, Handler, make_certificate, running
from tests.support.programs import call, error_line

QUESTION = "What is in this image?"
needs_openssl = pytest.mark.skipif(
    shutil.which("openssl") is None, reason="openssl makes the certificate"
)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_certificate(tmp_path_factory.mktemp("tls"), "IP:127.0.0.1")


@pytest.fixture(scope="module")
def server(certificate: tuple[Path, Path]) -> Iterator[str]:
    """The address of a server over https whose certificate nobody knows."""
    with running(certificate) as port:
        yield f"https://127.0.0.1:{port}"


@pytest.fixture
def site(server: str, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> str:
    """The server, trusted, and reached directly."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return server


def answer(model: Path, *arguments: object, stdin: str | bytes = "") -> str:
    done = call(generate.main, "-m", model, "--max-tokens", 6, *arguments, stdin=stdin)
    assert done.code == 0, done.stderr
    return done.stdout


# The web


@needs_openssl
def test_a_picture_from_the_web_is_the_same_picture(site: str) -> None:
    expected = np.array(open_image(PICTURE))
    for page in ("picture", "hop/0", "hop/3"):
        assert np.array_equal(np.array(inputs.read_image(f"{site}/{page}")), expected)


@needs_openssl
def test_the_command_asks_about_pictures_from_several_places_in_order(
    site: str, converted: dict[str, Path], pro: JanusPipeline
) -> None:
    given = ("-i", f"{site}/picture", "-i", PICTURE, "-p", QUESTION)
    expected = pro.generate_text(QUESTION, [PICTURE, PICTURE], max_tokens=6).text
    assert answer(converted["deepseek-pro-bin"], *given) == f"{expected}\n"


@needs_openssl
@pytest.mark.parametrize(
    ("page", "what"),
    [
        ("absent", "absent cannot be downloaded: HTTP 404 Not Found"),
        ("hop/9", "cannot be downloaded: HTTP 302"),
        ("downgrade", "downgrade redirects to http://127.0.0.1:1/picture, which is not https"),
        ("to-a-file", "cannot be downloaded: HTTP 302"),
        ("words", "words is not an image that can be read"),
        ("large", "large is larger than 50 MB"),
        ("broken", "broken broke off after 100 bytes"),
    ],
)
def test_pages_that_are_refused(site: str, page: str, what: str) -> None:
    line = error_line(call(generate.main, "-m", "no/such/model", "-p", "x", "-i", f"{site}/{page}"))
    assert line.startswith(f"Error: {site}/")
    assert what in line


@needs_openssl
def test_length_and_time_are_limited_whatever_the_server_says(
    site: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "MAX_BYTES", 50_000)
    with pytest.raises(errors.ImageError, match="endless is larger than"):
        inputs.fetch(f"{site}/endless")
    monkeypatch.setattr(web, "MAX_SECONDS", 0.5)
    started = time.monotonic()
    with pytest.raises(errors.ImageError, match=r"slow took longer than 0\.5 seconds"):
        inputs.fetch(f"{site}/slow")
    assert time.monotonic() - started < 5
    Handler.let_go.set()


@needs_openssl
def test_certificates_are_checked(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(errors.ImageError, match=r"is not trusted .*certificate"):
        inputs.fetch(f"{server}/picture")


def test_addresses_that_lead_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for address in ("https://127.0.0.1:1/a.png", "https://", "https://127.0.0.1:port/a.png"):
        with pytest.raises(errors.ImageError, match="cannot be fetched"):
            inputs.fetch(address)


# Stdin


def test_a_picture_and_a_prompt_from_stdin(converted: dict[str, Path]) -> None:
    model = converted["deepseek-pro-bin"]
    expected = answer(model, "-i", PICTURE, "-p", QUESTION)
    assert answer(model, "-i", "-", "-p", QUESTION, stdin=PICTURE.read_bytes()) == expected
    assert answer(model, "-i", PICTURE, "-p", "-", stdin=f"{QUESTION}\n".encode()) == expected


@pytest.mark.parametrize(
    ("words", "stdin", "what"),
    [
        ("-i - -p x", b"", "the image on stdin is empty"),
        ("-i - -p x", b"hello", "the image on stdin is not an image"),
        ("-p -", b" \n", "there is no prompt on stdin"),
        ("-p - --text", "Schloß".encode("latin-1"), "is not UTF-8 text"),
    ],
)
def test_stdin_without_what_is_asked_of_it(words: str, stdin: bytes, what: str) -> None:
    assert what in error_line(
        call(generate.main, "-m", "no/such/model", *words.split(), stdin=stdin)
    )
