"""Write the screenshots of the server's page, docs/page-*.png: ``python docs/write_page.py``.

A browser asks Janus-Tiny about an image and generates two. The script needs the extra "test", and
Chromium or Chrome.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for a run as a bare script

from playwright.sync_api import Page

from tests.support.browser import Visits, launched
from tests.support.serving import started

TARGETS: dict[str, dict[str, Any]] = {
    "page-light.png": {
        "color_scheme": "light",
        "viewport": {"width": 960, "height": 1200},
        "device_scale_factor": 1.5,
    },
    "page-dark.png": {
        "color_scheme": "dark",
        "viewport": {"width": 960, "height": 1200},
        "device_scale_factor": 1.5,
    },
    "page-phone.png": {
        "color_scheme": "light",
        "viewport": {"width": 390, "height": 844},
        "device_scale_factor": 2,
        "is_mobile": True,
        "has_touch": True,
    },
}
PROMPT = "a green circle above a purple star"
SEED = 4


def talk(page: Page) -> None:
    """Ask about the example's image, and generate two."""
    done = "article:nth-of-type({})[aria-busy=false]"
    page.get_by_role("button", name="What do you see?").click()
    page.locator(done.format(1)).wait_for()
    page.get_by_role("form", name="Message").get_by_text("Generate", exact=True).click()
    page.get_by_label("Images", exact=True).fill("2")
    page.get_by_label("Seed", exact=True).fill(str(SEED))
    prompt = page.get_by_role("textbox", name="Prompt")
    prompt.fill(PROMPT)
    prompt.press("Enter")
    page.locator(done.format(2)).wait_for()
    page.evaluate("scrollTo(0, document.documentElement.scrollHeight)")
    page.mouse.move(0, 0)


def small(png: bytes) -> Image.Image:
    """Reduce to 256 colours: a third of the bytes, without a visible difference."""
    return Image.open(io.BytesIO(png)).convert("RGB").quantize(256, dither=Image.Dither.NONE)


def main() -> None:
    """Write all screenshots."""
    with started() as server, launched() as browser:
        visits = Visits(browser)
        for name, options in TARGETS.items():
            page = visits.open(server.url, **options)
            talk(page)
            small(page.screenshot()).save(Path(__file__).with_name(name), optimize=True)
        visits.close()


if __name__ == "__main__":
    main()
