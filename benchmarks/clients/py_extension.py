"""Extensions of Chromium that ask the server, and a web page that may not."""

import http.server
import json
import shutil
import tempfile
import threading
from pathlib import Path

from playwright.sync_api import Error, sync_playwright
from trials import COLOR, IMAGE_URL, MODEL, URL, check_image, check_red, message, run, trial

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_PERMISSIONS = {"with": ["http://127.0.0.1/*"], "without": []}
_FETCH = """async ([url, body]) => {
    const options = {method: "POST", headers: {"Content-Type": "application/json"}, body};
    const reply = await fetch(url, body ? options : {});
    return {status: reply.status, text: await reply.text()};
}"""


def write_extension(folder: Path, permissions: list[str]) -> Path:
    """Write an extension that has a page and nothing else."""
    folder.mkdir()
    manifest = {
        "manifest_version": 3,
        "name": f"Janus {folder.name} permission",
        "version": "1",
        "host_permissions": permissions,
        "background": {"service_worker": "worker.js"},  # tells the extension's id
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "worker.js").write_text("")
    (folder / "page.html").write_text("<!doctype html><title>Janus</title>")
    return folder


def start():
    """Start Chromium with an extension for each kind of permission.

    Returns:
        What ends Chromium, a page for the web, and by name a page of each extension.
    """
    folder = Path(tempfile.mkdtemp())
    extensions = [write_extension(folder / name, wish) for name, wish in _PERMISSIONS.items()]
    paths = ",".join(map(str, extensions))
    playwright = sync_playwright().start()
    context = playwright.chromium.launch_persistent_context(
        str(folder / "profile"),
        executable_path=next(filter(None, map(shutil.which, _BROWSERS)), None),
        headless=False,  # the older headless mode has no extensions
        args=[
            "--headless=new",
            f"--disable-extensions-except={paths}",
            f"--load-extension={paths}",
        ],
    )
    pages = {}
    while len(pages) < len(extensions):
        for worker in context.service_workers:
            page = context.new_page()
            page.goto(worker.url.replace("worker.js", "page.html"))
            name = page.evaluate("chrome.runtime.getManifest().name").split()[1]
            if name in pages:
                page.close()
            pages.setdefault(name, page)
        if len(pages) < len(extensions):
            context.wait_for_event("serviceworker", timeout=30_000)

    def close():
        context.close()
        playwright.stop()
        shutil.rmtree(folder)

    return close, context.new_page(), pages


close, web_page, pages = start()


def fetch_from(page, path, body=None):
    """Return the status and the text of the server's reply to a page's request."""
    reply = page.evaluate(_FETCH, [URL + path, json.dumps(body) if body else None])
    return reply["status"], reply["text"]


def check_extension(page):
    """Raise an error unless an extension can list models, ask, stream and draw."""
    assert page.evaluate("location.origin").startswith("chrome-extension://")
    status, text = fetch_from(page, "/models")
    assert (status, MODEL in text) == (200, True), text
    question = {"model": MODEL, "messages": [message(COLOR, IMAGE_URL)]}
    status, text = fetch_from(page, "/chat/completions", question)
    assert status == 200, text
    check_red(json.loads(text)["choices"][0]["message"]["content"])
    status, text = fetch_from(page, "/chat/completions", question | {"stream": True})
    assert (status, text.strip().endswith("data: [DONE]")) == (200, True), text
    status, text = fetch_from(page, "/images/generations", {"prompt": "a red circle"})
    assert status == 200, text
    check_image(json.loads(text)["data"][0]["b64_json"])


@trial("an extension with permission for the host: models, answer, stream, image")
def _with_permission():
    check_extension(pages["with"])


@trial("an extension without permission")
def _without_permission():
    check_extension(pages["without"])


@trial("a page of another site is refused")
def _web_page():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Empty) as site:
        threading.Thread(target=site.serve_forever, daemon=True).start()
        web_page.goto(f"http://127.0.0.1:{site.server_port}/")
        try:
            fetch_from(web_page, "/models")
            refusal = "none: it was answered"
        except Error as error:
            refusal = str(error)
        finally:
            site.shutdown()
    assert "Failed to fetch" in refusal, refusal


class _Empty(http.server.BaseHTTPRequestHandler):
    """A site with one empty page."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>Another site</title>")

    def log_message(self, *_):
        pass


run(close)
