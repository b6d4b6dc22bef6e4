"""A browser, pages that are open in it, and what it complains of."""

from __future__ import annotations

import base64
import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_MAC = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")


def find_browser() -> str | None:
    """Return the path of Chromium or Chrome, or of Playwright's own, if one is installed."""
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    if found:
        return found
    if _MAC.exists():
        return str(_MAC)
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
    return own if Path(own).exists() else None


@contextlib.contextmanager
def launched() -> Iterator[Browser]:
    """A browser without a window."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser())
        yield browser
        browser.close()


class Visits:
    """Open pages and their complaints: errors on the console, requests to other hosts.

    Args:
        browser: to open them in.
    """

    def __init__(self, browser: Browser):
        self._browser = browser
        self._contexts: list[BrowserContext] = []
        self.complaints: list[str] = []

    def open(self, address: str, *, forgiven: Sequence[str] = (), **options: Any) -> Page:
        """The page at an address, when it knows its model or asks for a key.

        Args:
            address: of the server.
            forgiven: parts of messages on the console that are meant to come.
            options: of Playwright's context.
        """
        context = self._browser.new_context(**options)
        self._contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.set_default_navigation_timeout(40_000)  # a new browser context on a busy machine

        def complain(message: str) -> None:
            if not any(part in message for part in forgiven):
                self.complaints.append(message)

        page.on(
            "console",
            lambda message: (
                complain(message.text) if message.type in ("error", "warning") else None
            ),
        )
        page.on("pageerror", lambda error: complain(str(error)))
        own = (f"{address}/", "data:", f"blob:{address}/")
        page.on(
            "request",
            lambda asked: None if asked.url.startswith(own) else complain(f"asked {asked.url}"),
        )
        page.goto(f"{address}/")
        page.locator("#examples button, dialog[open]").first.wait_for()
        return page

    def close(self) -> None:
        """All of them."""
        for context in self._contexts:
            context.close()


def hand_over(page: Page, way: str, files: Sequence[tuple[str, str, bytes]]) -> None:
    """Drop or paste files onto a page.

    Args:
        page: the page.
        way: "drop" or "paste".
        files: of each its name, its type and its bytes.
    """
    encoded = [[name, kind, base64.b64encode(data).decode()] for name, kind, data in files]
    script = """([way, files]) => {
      const data = new DataTransfer();
      for (const [name, type, text] of files) {
        const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
        data.items.add(new File([bytes], name, {type}));
      }
      document.activeElement.dispatchEvent(way === "drop"
        ? new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true})
        : new ClipboardEvent("paste", {clipboardData: data, bubbles: true, cancelable: true}));
    }"""
    page.evaluate(script, [way, encoded])
