"""A site over https, for tests: it gives a picture in good and in bad ways."""

from __future__ import annotations

import contextlib
import http.server
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

from tests.support.golden import FIXTURES

PICTURE = FIXTURES / "picture.png"


class Handler(http.server.BaseHTTPRequestHandler):
    """A server with good and bad ways to give a picture."""

    protocol_version = "HTTP/1.1"
    let_go = threading.Event()  # set: what is slow ends

    def do_GET(self) -> None:
        hop = self.path.removeprefix("/hop/")
        if self.path == "/picture":
            self.give(PICTURE.read_bytes())
        elif hop.isdigit():
            self.send(302, Location=f"/hop/{int(hop) - 1}" if int(hop) else "/picture")
        elif self.path.startswith("/to/"):
            self.send(302, Location=self.path.removeprefix("/to/"))
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
        elif self.path == "/no-http":
            self.close_connection = True
            self.wfile.write(b"\x1b[31mred" + bytes(1000) + b"\r\n")
        elif self.path == "/slow-headers":
            self.wfile.write(b"HTTP/1.1 200 OK\r\n")
            while not self.let_go.wait(0.05):
                self.wfile.write(b"A: b\r\n")
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


def make_certificate(folder: Path, *names: str) -> tuple[Path, Path]:
    """Make a self-signed certificate for these names ("IP:127.0.0.1", "DNS:host"), and its key."""
    head = "[req]\ndistinguished_name=n\nx509_extensions=x\n[n]\n[x]\n"
    words = f"{head}subjectAltName={','.join(names)}\n"
    (folder / "names").write_text(words)
    key, made = folder / "key", folder / "certificate"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=test",
    ]
    command += ["-config", str(folder / "names"), "-keyout", str(key), "-out", str(made)]
    subprocess.run(command, check=True, capture_output=True)
    return made, key


@contextlib.contextmanager
def running(certificate: tuple[Path, Path]) -> Iterator[int]:
    """The port of the site on 127.0.0.1, while it runs."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    Handler.let_go.clear()
    with Server(("127.0.0.1", 0), Handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield server.server_port
        finally:
            Handler.let_go.set()
            server.shutdown()
