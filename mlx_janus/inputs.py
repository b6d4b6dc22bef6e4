"""What commands take from elsewhere than a file: pictures from the web and from stdin, a prompt from stdin.

The library does none of this: a path is all that it opens.
"""

from __future__ import annotations

import ssl
import sys
import threading
import time
import urllib.request
from http.client import HTTPException
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

from . import __version__
from .errors import ImageError, PromptError

if TYPE_CHECKING:
    from PIL import Image

STDIN = "-"
MAX_BYTES = 50_000_000
MAX_SECONDS = 30.0
_MAX_REDIRECTS = 5
_BLOCK = 1 << 16


def read_image(source: str) -> Image.Image:
    """A picture from a file, from an https address, or from stdin ("-"), as ``images.open_image`` gives it.

    Raises:
        ImageError: it cannot be had or read.
    """
    from .images import decode_image, open_image

    if source == STDIN:
        return decode_image(_stdin(), "the picture on stdin")
    if source.startswith("https://"):
        return decode_image(fetch(source), source)
    return open_image(source)


def read_prompt() -> str:
    """All of stdin as a prompt.

    Raises:
        PromptError: nothing is there, or no text.
    """
    try:
        text = _stdin().decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise PromptError("the prompt on stdin is no text in UTF-8") from None
    if not text:
        raise PromptError("there is no prompt on stdin: pipe one in, or write it after --prompt")
    return text


def _stdin() -> bytes:
    return b"" if sys.stdin is None else sys.stdin.buffer.read()  # None: <&-


def fetch(url: str) -> bytes:
    """The content of an https address: at most 50 MB, in at most 30 seconds, redirects to https included.

    Raises:
        ImageError: why not, in one line.
    """
    outcome: list[bytes | Exception] = []

    def work() -> None:
        try:
            outcome.append(_download(url, time.monotonic() + MAX_SECONDS))
        except Exception as error:  # raised again below, where somebody sees it
            outcome.append(error)

    # In a thread, since the looking up of a name and the headers of a slow server know no limit in all.
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(MAX_SECONDS)
    result = outcome[0] if outcome else TimeoutError()
    if isinstance(result, bytes):
        return result
    raise _explained(result, url) from None


def _download(url: str, deadline: float) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": f"mlx_janus/{__version__}", "Accept": "image/*"})
    with _opener().open(request, timeout=MAX_SECONDS) as response:
        if int(response.headers.get("Content-Length") or 0) > MAX_BYTES:
            raise _too_large(url)
        data = bytearray()
        while block := response.read1(_BLOCK):
            data += block
            if len(data) > MAX_BYTES:
                raise _too_large(url)
            if time.monotonic() > deadline:
                raise TimeoutError
        if response.length:  # what the server promised beyond what came
            raise ImageError(f"{url} broke off after {len(data)} bytes: try again")
        return bytes(data)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """A few, and none that leaves https."""

    max_redirections = _MAX_REDIRECTS

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if urlsplit(newurl).scheme != "https":
            fp.close()
            raise ImageError(f"{req.full_url} leads to {newurl}, which is not https: download the picture yourself")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> urllib.request.OpenerDirector:
    """Knows https and nothing else: no http, ftp or file."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _Redirects(),
    ):
        opener.add_handler(handler)
    return opener


def _too_large(url: str) -> ImageError:
    return ImageError(f"{url} is larger than {MAX_BYTES // 10**6} MB: download it and make it smaller")


def _explained(error: Exception, url: str) -> Exception:
    """One line for what the network does; anything else is a bug and stays what it is."""
    if isinstance(error, ImageError):
        return error
    if isinstance(error, HTTPError):
        error.close()
        return ImageError(f"{url} is not given: HTTP {error.code} {error.reason}")
    reason = error.reason if isinstance(error, URLError) else error
    if isinstance(reason, TimeoutError):
        return ImageError(f"{url} took longer than {MAX_SECONDS:g} seconds: download the picture and give its file")
    if isinstance(reason, ssl.SSLCertVerificationError):
        why = reason.verify_message.rstrip(".")
        return ImageError(f"{url} is not trusted ({why}): SSL_CERT_FILE names a file of the certificates that are")
    if isinstance(error, OSError | HTTPException | ValueError):  # ValueError: an address that is none
        return ImageError(f"{url} cannot be fetched ({reason}): check the address and the connection")
    return error
