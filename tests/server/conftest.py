"""What the tests of the page share: a browser, and pages that are watched."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser

from tests.support.browser import Visits, launched


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launched() as browser:
        yield browser


@pytest.fixture
def visits(browser: Browser) -> Iterator[Visits]:
    """Pages, none of which may complain or ask another server."""
    visits = Visits(browser)
    yield visits
    visits.close()
    assert visits.complaints == []
