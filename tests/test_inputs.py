"""What commands read from elsewhere than a file: the web, over https alone and within limits, and stdin."""

from __future__ import annotations

import http.server
import shutil
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from golden import FIXTURES
from programs import call, error_line

from mlx_janus import JanusPipeline, errors, generate, inputs
from mlx_janus.images import open_image

PICTURE = FIXTURES / "picture.png"
QUESTION = "What is in this image?"
needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")


class Handler(http.server.BaseHTTPRequestHandler):
    """A server with good and bad ways to give a picture."""

    protocol_version = "HTTP/1.1"
    let_go = threading.Event()

    def do_GET(self) -> None:
        hop = self.path.removeprefix("/hop/")
        if self.path == "/picture":
            self.give(PICTURE.read_bytes())
        elif hop.isdigit():
            self.send(302, Location=f"/hop/{int(hop) - 1}" if int(hop) else "/picture")
        elif self.path == "/downgrade":
            self.send(302, Location="http://127.0.0.1:1/picture")
        elif self.path == "/to-a-file":
            self.send(302, Location=f"file://{PICTURE}")
        elif self.path == "/words":
            self.give(b"<html>no picture</html>")
        elif self.path == "/large":
            self.send(200, Content_Length=str(10**12))
        elif self.path == "/endless":  # of unknown length
            self.send(200, Connection="close")
            for _ in range(100):
                self.wfile.write(bytes(1000))
        elif self.path == "/broken":
            self.send(200, Content_Length="9999", Connection="close")
            self.wfile.write(PICTURE.read_bytes()[:100])
        elif self.path == "/slow":
            self.send(200, Content_Length="9999")
            while not self.let_go.wait(0.05):
                self.wfile.write(b"x")
        else:
            self.send(404, Content_Length="0")

    def give(self, data: bytes) -> None:
        self.send(200, Content_Length=str(len(data)))
        self.wfile.write(data)

    def send(self, code: int, **headers: str) -> None:
        self.send_response(code)
        if code == 302:
            headers["Content_Length"] = "0"
        self.close_connection = True
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        pass  # a client that leaves


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    names = "[req]\ndistinguished_name=n\nx509_extensions=x\n[n]\n[x]\nsubjectAltName=IP:127.0.0.1\n"
    (folder / "names").write_text(names)
    key, made = folder / "key", folder / "certificate"
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=test"]
    words += ["-config", str(folder / "names"), "-keyout", str(key), "-out", str(made)]
    subprocess.run(words, check=True, capture_output=True)
    return made, key


@pytest.fixture(scope="module")
def server(certificate: tuple[Path, Path]) -> Iterator[str]:
    """The address of a server over https whose certificate nobody knows."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    with Server(("127.0.0.1", 0), Handler) as running:
        running.socket = context.wrap_socket(running.socket, server_side=True)
        threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        yield f"https://127.0.0.1:{running.server_port}"
        running.shutdown()


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
        ("absent", "absent is not given: HTTP 404 Not Found"),
        ("hop/9", "is not given: HTTP 302"),
        ("downgrade", "downgrade leads to http://127.0.0.1:1/picture, which is not https"),
        ("to-a-file", "is not given: HTTP 302"),
        ("words", "words is no picture that can be read"),
        ("large", "large is larger than 50 MB"),
        ("broken", "broken broke off after 100 bytes"),
    ],
)
def test_pages_that_are_refused(site: str, page: str, what: str) -> None:
    line = error_line(call(generate.main, "-m", "no/such/model", "-p", "x", "-i", f"{site}/{page}"))
    assert line.startswith(f"Error: {site}/")
    assert what in line


@needs_openssl
def test_length_and_time_are_limited_whatever_the_server_says(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "MAX_BYTES", 50_000)
    with pytest.raises(errors.ImageError, match="endless is larger than"):
        inputs.fetch(f"{site}/endless")
    monkeypatch.setattr(inputs, "MAX_SECONDS", 0.5)
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
        ("-i - -p x", b"", "the picture on stdin is empty"),
        ("-i - -p x", b"hello", "the picture on stdin is no picture"),
        ("-p -", b" \n", "there is no prompt on stdin"),
        ("-p - --text", "Schloß".encode("latin-1"), "no text in UTF-8"),
    ],
)
def test_stdin_without_what_is_asked_of_it(words: str, stdin: bytes, what: str) -> None:
    assert what in error_line(call(generate.main, "-m", "no/such/model", *words.split(), stdin=stdin))
