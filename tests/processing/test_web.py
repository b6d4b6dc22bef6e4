"""Images whose address a stranger names: from public hosts only, whatever name and host say.

Nothing here leaves the machine: a table resolves names, and public addresses lead to a local site.
"""

from __future__ import annotations

import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_janus import errors
from mlx_janus.processing import web
from tests.support.picture_site import PICTURE, Handler, make_certificate, running

PUBLIC, ALSO_PUBLIC, PUBLIC_6 = "93.184.215.14", "8.8.4.4", "2606:4700::6810:84e5"
SITE = "pictures.test"
needs_openssl = pytest.mark.skipif(
    shutil.which("openssl") is None, reason="openssl makes the certificate"
)


class Internet:
    """A resolver with a list of answers per name and a route to a site."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, port: int = 0):
        self.names: dict[str, list[list[str]]] = {SITE: [[PUBLIC]]}
        self.looked_up: list[str] = []
        self.connected: list[str] = []
        self.reachable = {PUBLIC, ALSO_PUBLIC}
        look_up, connect = socket.getaddrinfo, socket.socket.connect

        def fake_look_up(host: str, port: int, **words: Any) -> list[Any]:
            self.looked_up.append(host)
            answers = self.names.get(host)
            if answers is None:  # a number, however it is spelled, or a name that does not exist
                return look_up(host, port, flags=socket.AI_NUMERICHOST, **words)
            found = answers.pop(0) if len(answers) > 1 else answers[0]
            return [
                one
                for text in found
                for one in look_up(text, port, flags=socket.AI_NUMERICHOST, **words)
            ]

        def fake_connect(wire: socket.socket, address: tuple[str, int]) -> None:
            assert address[1] == 443
            self.connected.append(address[0])
            if address[0] not in self.reachable:
                raise OSError(101, "Network is unreachable")
            connect(wire, ("127.0.0.1", port))

        monkeypatch.setattr(socket, "getaddrinfo", fake_look_up)
        monkeypatch.setattr(socket.socket, "connect", fake_connect)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_certificate(tmp_path_factory.mktemp("tls"), f"DNS:{SITE}", "DNS:xn--bcher-kva.test")


@pytest.fixture(scope="module")
def port(certificate: tuple[Path, Path]) -> Iterator[int]:
    with running(certificate) as number:
        yield number


@pytest.fixture
def internet(
    port: int, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> Internet:
    """One in which the site is trusted."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    return Internet(monkeypatch, port)


def refusal(url: str, **words: Any) -> str:
    """Why an address is not fetched: one line that names it."""
    with pytest.raises(errors.ImageError) as refused:
        web.fetch_public(url, **words)
    line = str(refused.value)
    assert line.isprintable()
    return line


# What is given


@needs_openssl
def test_a_picture_of_a_public_host_is_given(internet: Internet) -> None:
    assert web.fetch_public(f"https://{SITE}/picture#middle") == PICTURE.read_bytes()
    assert internet.connected == [PUBLIC]


@needs_openssl
def test_three_redirects_are_followed_and_no_fourth(internet: Internet) -> None:
    assert web.fetch_public(f"https://{SITE}/hop/2") == PICTURE.read_bytes()  # hops 2, 1 and 0
    assert "hop/3 redirects more than 3 times" in refusal(f"https://{SITE}/hop/3")


@needs_openssl
def test_the_port_may_be_written_and_a_name_may_have_umlauts(internet: Internet) -> None:
    internet.names["xn--bcher-kva.test"] = [[PUBLIC]]
    assert web.fetch_public(f"https://{SITE}:443/picture") == PICTURE.read_bytes()
    assert web.fetch_public("https://BÜCHER.test/picture") == PICTURE.read_bytes()
    assert "HTTP 404" in refusal(f"https://{SITE}/Ä ä.png")  # asked for, and not there


@needs_openssl
def test_an_address_that_is_out_of_reach_gives_way_to_the_next(internet: Internet) -> None:
    internet.names[SITE] = [[PUBLIC_6, ALSO_PUBLIC, PUBLIC]]
    assert web.fetch_public(f"https://{SITE}/picture") == PICTURE.read_bytes()
    assert internet.connected == [PUBLIC_6, ALSO_PUBLIC]


@needs_openssl
def test_no_proxy_of_the_environment_is_used(
    internet: Internet, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert web.fetch_public(f"https://{SITE}/picture") == PICTURE.read_bytes()


# Hosts that are not public

INWARD = [
    *(
        "127.0.0.1",
        "127.9.9.9",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
    ),
    *(
        "192.0.0.9",
        "192.0.2.1",
        "192.88.99.1",
        "198.18.0.1",
        "224.0.0.1",
        "239.1.1.1",
        "240.0.0.1",
        "255.255.255.255",
    ),
    *(
        "::",
        "::1",
        "::7f00:1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "fc00::1",
        "fd12:3456::1",
        "fe80::1",
        "fec0::1",
    ),
    *(
        "64:ff9b::7f00:1",
        "64:ff9b::a9fe:a9fe",
        "64:ff9b:1::1",
        "2002:7f00:1::",
        "2001:0:7f00:1::",
        "2001:db8::1",
    ),
    *("2001:1::1", "2001:20::1", "3fff::1", "5f00::1", "ff02::1", "ff0e::1"),
]


@pytest.mark.parametrize("address", INWARD)
def test_addresses_that_are_not_public(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    internet = Internet(monkeypatch)
    internet.names["inward.test"] = [[address]]
    internet.names["both.test"] = [[PUBLIC, address]]
    host = f"[{address}]" if ":" in address else address
    for url in (f"https://{host}/", "https://inward.test/", "https://both.test/"):
        assert refusal(url) == f"{url} is not a public address: send the image itself"
    assert internet.connected == []


@pytest.mark.parametrize(
    "address", [PUBLIC, ALSO_PUBLIC, PUBLIC_6, "2001:4860:4860::8888", "64:ff9b::808:808"]
)
def test_addresses_that_are_public(address: str) -> None:
    assert web.is_public(address)


@pytest.mark.parametrize(
    "host",
    ["2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "127.1", "127.0.0.1.", "①②⑦.0.0.1", "0"],
)
def test_other_spellings_of_this_machine(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    internet = Internet(monkeypatch)
    assert "is not a public address" in refusal(f"https://{host}/")
    assert internet.connected == []


def test_a_name_that_does_not_exist_is_refused_like_one_that_is_not_public(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    internet = Internet(monkeypatch)
    internet.names["inward.test"] = [["10.0.0.7"]]
    internet.names["nothing.test"] = [[]]
    lines = {
        refusal(f"https://{name}/").replace(name, "X")
        for name in ("inward.test", "nothing.test", "absent.test")
    }
    assert lines == {"https://X/ is not a public address: send the image itself"}


@needs_openssl
def test_a_name_is_looked_up_once_and_what_was_checked_is_connected_to(internet: Internet) -> None:
    internet.names[SITE] = [[PUBLIC], ["127.0.0.1"]]  # DNS rebinding
    assert web.fetch_public(f"https://{SITE}/picture") == PICTURE.read_bytes()
    assert (internet.looked_up, internet.connected) == ([SITE], [PUBLIC])
    assert "is not a public address" in refusal(f"https://{SITE}/picture")


@needs_openssl
def test_a_redirect_is_looked_up_and_checked_anew(internet: Internet) -> None:
    internet.names[SITE] = [[PUBLIC], ["127.0.0.1"]]
    assert "/picture is not a public address" in refusal(f"https://{SITE}/hop/0")
    assert internet.connected == [PUBLIC]


@needs_openssl
@pytest.mark.parametrize(
    ("target", "what"),
    [
        ("https://10.0.0.1/picture", "https://10.0.0.1/picture is not a public address"),
        (
            "//169.254.169.254/latest/meta-data",
            "https://169.254.169.254/latest/meta-data is not a public address",
        ),
        ("https://[::1]/", "https://[::1]/ is not a public address"),
        (f"http://{SITE}/picture", f"http://{SITE}/picture is not fetched: only https"),
        (f"https://{SITE}:8443/picture", f"https://{SITE}:8443/picture is not fetched: only https"),
        ("file:///etc/passwd", "file:///etc/passwd is not fetched: only https"),
    ],
)
def test_redirects_that_are_not_followed(internet: Internet, target: str, what: str) -> None:
    assert refusal(f"https://{SITE}/to/{target}").startswith(what)
    assert internet.connected == [PUBLIC]


# What is no plain address


def test_a_long_address_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    internet = Internet(monkeypatch)
    started = time.process_time()
    for url in (f"https://pictures.test/{'a' * 5000}", f"https://{'ä.' * 400_000}x/"):
        assert "is not fetched: an address may have at most 4096 characters" in refusal(url)
    assert time.process_time() - started < 0.5  # to put the second in ASCII takes seconds
    assert internet.looked_up == []


@pytest.mark.parametrize(
    "url",
    [
        *(
            "http://pictures.test/",
            "ftp://pictures.test/",
            "file:///etc/passwd",
            "pictures.test/",
            "",
            "https://",
        ),
        *(
            "https:///a.png",
            "https://pictures.test:80/",
            "https://pictures.test:0/",
            "https://pictures.test:x/",
        ),
        *(
            "https://me@pictures.test/",
            "https://me:word@pictures.test/",
            "https://pictures.test\\@127.0.0.1/",
        ),
        *(
            "https://[fe80::1%25lo]/",
            "https://[::1",
            "https://pictures..test/",
            "https://pictures.test/\r\nX: y",
        ),
        *(
            "ht\ttps://pictures.test/",
            "https://pictures.test/\0",
            "https://pictures.test/\ud800",
            "\x01https://a.test/",
        ),
    ],
)
def test_addresses_that_are_not_looked_up(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    internet = Internet(monkeypatch)
    line = refusal(url)
    assert "is not fetched: only https addresses are, on port 443, without a user name" in line
    assert len(line) < 400
    assert internet.looked_up == []


# What a public host may do


@needs_openssl
def test_the_certificate_must_be_for_the_name(internet: Internet) -> None:
    internet.names["other.test"] = [[PUBLIC]]
    line = refusal("https://other.test/picture")
    assert "https://other.test/picture is not trusted" in line
    assert "SSL_CERT_FILE" not in line  # which is not the stranger's to set


@needs_openssl
@pytest.mark.parametrize("page", ["large", "endless"])
def test_the_length_is_limited_whether_it_is_said_or_not(internet: Internet, page: str) -> None:
    assert f"{page} is larger than 0.05 MB" in refusal(f"https://{SITE}/{page}", max_bytes=50_000)


@needs_openssl
def test_a_host_that_breaks_off_or_has_nothing_or_speaks_no_http(internet: Internet) -> None:
    assert "broken broke off after 100 bytes" in refusal(f"https://{SITE}/broken")
    assert "absent cannot be downloaded: HTTP 404" in refusal(f"https://{SITE}/absent")
    line = refusal(f"https://{SITE}/no-http")
    assert "no-http cannot be fetched" in line
    assert len(line) < 1500


@needs_openssl
@pytest.mark.parametrize("page", ["slow", "slow-headers"])
def test_the_time_is_limited_and_nothing_goes_on_after_it(internet: Internet, page: str) -> None:
    before = set(threading.enumerate())
    started = time.monotonic()
    assert f"{page} took longer than 0.5 seconds: send the image itself" in refusal(
        f"https://{SITE}/{page}", seconds=0.5
    )
    assert time.monotonic() - started < 3
    ours = [
        thread for thread in set(threading.enumerate()) - before if thread.name.endswith("(run)")
    ]
    for thread in ours:
        thread.join(3)
    assert not any(thread.is_alive() for thread in ours)
    assert not Handler.let_go.is_set()


@needs_openssl
def test_what_is_given_need_not_be_a_picture(internet: Internet) -> None:
    """Its bytes are looked at where they are decoded; no header is believed."""
    assert web.fetch_public(f"https://{SITE}/words") == b"<html>no picture</html>"
