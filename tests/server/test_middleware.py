"""Origins, keys and headers: who is answered, what a browser may do, what stays secret."""

from __future__ import annotations

import base64
import hashlib
import logging
import re
from typing import Any

import httpx
import pytest

from mlx_janus.errors import OptionError
from mlx_janus.server.settings import Settings
from tests.support.fake_engine import FakeEngine
from tests.support.serving import CHAT, DRAW, HELLO, connect, refusal, served, to


def test_a_key_is_asked_for(engine: FakeEngine) -> None:
    with served(engine, api_key="s3cret") as url, to(url) as client:
        for value in (
            "",
            "s3cret",
            "Bearer",
            "Bearer wrong",
            "Bearer s3cre",
            "Bearer s3cret2",
            "Basic s3cret",
            "Bearer é",
        ):
            headers = [("Authorization", value.encode())]
            for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere"):
                assert refusal(client.get(path, headers=headers), 401)["code"] == "invalid_api_key"
            reply = client.post(CHAT, json=HELLO, headers=headers)
            assert reply.headers["www-authenticate"] == "Bearer"
            refusal(reply, 401)
        for ask in (client.get, client.head):
            assert [ask(path).status_code for path in ("/", "/health", "/v1/models")] == [
                200,
                200,
                401,
            ]
        for path in ("/", "/health"):  # strangers have no body read
            with connect(client, f"POST {path}", b"Content-Length: 1000\r\n\r\n") as connection:
                assert connection.recv(100).startswith(b"HTTP/1.1 401 ")
        assert not engine.asked
        client.headers["Authorization"] = "Bearer s3cret"
        assert client.post(CHAT, json=HELLO).status_code == 200
        assert client.get("/openapi.json").json()["paths"]["/v1/models"]["get"]["security"] == [
            {"key": []}
        ]
        assert client.get("/health", headers={"Host": "janus.example.org"}).status_code == 200


def test_a_key_given_twice(engine: FakeEngine) -> None:
    with served(engine, api_key="s3cret") as url, to(url) as client:
        headers = [("Authorization", "Bearer s3cret"), ("Authorization", "Bearer wrong")]
        refusal(client.get("/v1/models", headers=headers), 401)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"host": "0.0.0.0"}, "set a key"),
        ({"host": "192.168.1.2"}, "set a key"),
        ({"host": "::"}, "set a key"),
        ({"host": "example.org"}, "set a key"),
        ({"host": "localhost.example.org"}, "set a key"),
        ({"api_key": ""}, "without spaces"),
        ({"api_key": "a b"}, "without spaces"),
        ({"api_key": "schlüssel"}, "without spaces"),
        ({"cors_origins": ("https://*",)}, "lets every web page use the server: set a key"),
        ({"cors_origins": ("http://*:*",)}, "lets every web page use the server: set a key"),
        ({"cors_origins": ("chrome-extension://",)}, "not an origin"),
        ({"cors_origins": ("app://a/b",)}, "not an origin"),
        ({"cors_origins": ("*://a",)}, "not an origin"),
        ({"cors_origins": ("https://a.*.org",)}, "not an origin"),
        ({"cors_origins": ("NULL",)}, "not an origin"),
        ({"cors_origins": ("https://example.org/",)}, "not an origin"),
        ({"cors_origins": ("example.org",)}, "not an origin"),
        ({"cors_origins": ("https://example.org:99999",)}, "not an origin"),
        ({"cors_origins": ("https://example.org:0",)}, "not an origin"),
        ({"cors_origins": ("https://example.org\n",)}, "not an origin"),
        ({"cors_origins": ("http://-",)}, "not an origin"),
        ({"cors_origins": ("https://..",)}, "not an origin"),
        ({"cors_origins": ("https://a..example.org",)}, "not an origin"),
        ({"cors_origins": ("http://[::1",)}, "not an origin"),
        ({"cors_origins": ("http://[1:2]",)}, "not an origin"),
        ({"host": ""}, "empty"),
        ({"host": " ", "api_key": "x"}, "empty"),
    ],
)
def test_settings_that_are_not_safe_or_make_no_sense(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        Settings(**settings)


def test_hosts_of_this_machine_alone_need_no_key() -> None:
    for host in ("localhost", "127.0.0.1", "127.1.2.3", "::1"):
        assert Settings(host=host).host == host


@pytest.mark.parametrize(
    "origin",
    [
        "https://chat.example.org",
        "http://localhost:3000",
        "http://127.0.0.1",
        "http://[::1]:8080",
        "https://my_chat:65535",
        "chrome-extension://mhjfbmdgcfjbbpaeojofohoefgiehjai",
        "moz-extension://2c127fa4-62c7-7e4f-90e5-472b45eecfdc",
        "capacitor://localhost",
        "null",
        "file://",
    ],
)
def test_sites_that_can_be_named(origin: str) -> None:
    settings = Settings(cors_origins=(origin,))
    assert settings.allows_origin(origin)
    assert not Settings().allows_origin(origin)
    assert not settings.allows_origin(f"{origin}x")


APPS = ("app://obsidian.md", "tauri://localhost", "vscode-webview://0a1b2c")
EXTENSIONS = ("chrome-extension://abc", "moz-extension://abc", "capacitor://localhost")
WEB = ("https://evil.example", "http://localhost:9", "https://[::1]")
FORGEABLE = ("null", "file://")


@pytest.mark.parametrize(
    ("patterns", "key", "allowed"),
    [
        ((), None, APPS),
        (("*",), None, (*APPS, *EXTENSIONS)),
        (("*",), "s3cret", (*APPS, *EXTENSIONS, *WEB, *FORGEABLE)),
        (("chrome-extension://*",), None, (*APPS, "chrome-extension://abc")),
        (("https://*",), "s3cret", (*APPS, "https://evil.example", "https://[::1]")),
        (("http://localhost:*",), None, (*APPS, "http://localhost:9")),
        (("null",), None, (*APPS, "null")),
    ],
)
def test_patterns_of_origins(
    patterns: tuple[str, ...], key: str | None, allowed: tuple[str, ...]
) -> None:
    settings = Settings(cors_origins=patterns, api_key=key)
    origins = (*APPS, *EXTENSIONS, *WEB, *FORGEABLE)
    assert tuple(origin for origin in origins if settings.allows_origin(origin)) == allowed


def test_a_pattern_of_subdomains() -> None:
    settings = Settings(cors_origins=("https://*.example.org",))
    assert settings.allows_origin("https://a.b.example.org")
    for other in ("https://example.org", "https://a.example.org.evil", "http://a.example.org"):
        assert not settings.allows_origin(other)


@pytest.mark.parametrize("origin", APPS)
def test_a_desktop_app_may_read_replies(client: httpx.Client, origin: str) -> None:
    site = {"Origin": origin, "Sec-Fetch-Site": "cross-site"}
    preflight = site | {"Access-Control-Request-Method": "POST"}
    for reply in (
        client.options(CHAT, headers=preflight),
        client.post(CHAT, json=HELLO, headers=site),
    ):
        assert reply.status_code == 200
        assert reply.headers["access-control-allow-origin"] == origin


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "192.168.0.7",
        "",
        "[::2]:80",
        "a:b:c",
    ],
)
def test_a_foreign_name_that_points_to_this_machine(
    client: httpx.Client, engine: FakeEngine, host: str
) -> None:
    for path in ("/", "/health", "/v1/models"):
        assert refusal(client.get(path, headers={"Host": host}), 403)["code"] == "wrong_host"
    refusal(client.post(CHAT, json=HELLO, headers={"Host": host}), 403)
    assert not engine.asked


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:80", "127.0.0.1:1", "[::1]:8080", "[::1]"]
)
def test_names_of_this_machine(client: httpx.Client, host: str) -> None:
    assert client.get("/health", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "http://localhost"},
        {"Origin": "file://"},
        {"Origin": "http://[::1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_a_page_of_another_site(
    client: httpx.Client, engine: FakeEngine, headers: dict[str, str]
) -> None:
    replies = [
        client.post(CHAT, json=HELLO, headers=headers),
        client.get("/v1/models", headers=headers),
        client.options(CHAT, headers=headers | {"Access-Control-Request-Method": "POST"}),
    ]
    for reply in replies:
        assert refusal(reply, 403)["code"] == "wrong_origin"
        assert not [name for name in reply.headers if name.startswith("access-control")]
    assert not engine.asked


def test_the_servers_own_page_and_a_link_to_it(client: httpx.Client) -> None:
    own = str(client.base_url).rstrip("/")
    assert (
        client.post(
            CHAT, json=HELLO, headers={"Origin": own, "Sec-Fetch-Site": "same-origin"}
        ).status_code
        == 200
    )
    assert (
        client.get(
            "/", headers={"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
        ).status_code
        == 200
    )
    https = {
        "Origin": "https://localhost",
        "Host": "localhost",
    }  # behind a proxy that has the certificate
    assert client.get("/v1/models", headers=https).status_code == 200


def test_a_site_that_is_named(engine: FakeEngine) -> None:
    site = {"Origin": "https://chat.example.org", "Sec-Fetch-Site": "cross-site"}
    with (
        served(engine, cors_origins=("https://chat.example.org",), api_key="s3cret") as url,
        to(url) as client,
    ):
        preflight = site | {
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
            "Access-Control-Request-Private-Network": "true",
        }
        reply = client.options(CHAT, headers=preflight)
        assert reply.status_code == 200
        assert reply.headers["access-control-allow-origin"] == site["Origin"]
        assert "authorization" in reply.headers["access-control-allow-headers"]
        assert reply.headers["access-control-allow-private-network"] == "true"
        error = refusal(
            client.options(CHAT, headers=preflight | {"Access-Control-Request-Method": "DELETE"}),
            400,
        )
        assert "Disallowed CORS method" in error["message"]
        key = {"Authorization": "Bearer s3cret"}
        for reply, status in (
            (client.post(CHAT, json=HELLO, headers=site | key), 200),
            (client.post(CHAT, json={}, headers=site | key), 400),
            (client.post(CHAT, json=HELLO, headers=site), 401),  # which the site can read
            (client.post(CHAT, content=b"x" * 65_000_000, headers=site | key), 413),
        ):
            assert reply.status_code == status
            assert reply.headers["access-control-allow-origin"] == site["Origin"]
            assert "access-control-allow-credentials" not in reply.headers
        other = {"Origin": "https://chat.example.org.evil.example"}
        assert (
            refusal(client.post(CHAT, json=HELLO, headers=other | key), 403)["code"]
            == "wrong_origin"
        )


# What is let out


def test_replies_say_how_a_browser_has_to_take_them(client: httpx.Client) -> None:
    for reply in (
        client.get("/"),
        client.get("/health"),
        client.get("/nowhere"),
        client.post(CHAT, json=HELLO),
    ):
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["x-frame-options"] == "DENY"
        assert reply.headers["referrer-policy"] == "no-referrer"
        assert "frame-ancestors 'none'" in reply.headers["content-security-policy"]
        assert "server" not in reply.headers
    assert client.get("/health").headers["cache-control"] == "no-store"


def test_only_the_pages_own_style_and_script_run(client: httpx.Client) -> None:
    reply = client.get("/")
    policy = reply.headers["content-security-policy"]
    assert "unsafe" not in policy
    assert "connect-src 'self'; img-src 'self' data: blob:;" in policy
    tags = re.findall(r"<(style|script)\b", reply.text)
    assert sorted(tags) == ["script", "style"]
    for tag in tags:
        content = re.search(rf"<{tag}>(.*?)</{tag}>", reply.text, re.DOTALL)
        assert content is not None
        digest = base64.b64encode(hashlib.sha256(content[1].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}';" in policy


@pytest.mark.parametrize("wanted", [False, True])
def test_nothing_of_a_request_is_logged(
    engine: FakeEngine,
    wanted: bool,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    secret = {"messages": [{"role": "user", "content": "my secret"}]}
    with served(engine, log_requests=wanted, api_key="s3cret-key") as url, to(url) as client:
        client.headers["Authorization"] = "Bearer s3cret-key"
        client.post(f"{CHAT}?secret=1", json=secret)
        client.get("/v1/models/secret")
        client.post(CHAT, json={"secret": "secret"})
        client.post(DRAW, json={"prompt": "secret"})
    ours = [
        record.getMessage()
        for record in caplog.records
        if not record.name.startswith(("httpx", "httpcore"))
    ]
    assert not [line for line in ours if "ecret" in line]
    assert capfd.readouterr() == ("", "")
    lines = [line for line in ours if "bytes in" in line]
    assert len(lines) == (4 if wanted else 0)
    if wanted:
        assert re.fullmatch(
            rf"POST {CHAT} 200, \d\d bytes in, \d+ out, \d\.\d{{3}} s, req_\w+", lines[0]
        )
        assert lines[1].startswith("GET /v1/models/{name:path} 404, 0 bytes in, ")
