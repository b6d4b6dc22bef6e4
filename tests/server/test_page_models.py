"""The page in a real browser, before a server of several models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import mlx_janus

pytest.importorskip("playwright", reason="the page's tests need playwright")

# isort: split
from playwright.sync_api import Page, expect

from mlx_janus.engine.engine import Engine
from mlx_janus.engine.pool import EnginePool, ModelSource, PooledModel
from mlx_janus.pipeline import JanusPipeline
from tests.support.browser import Visits, find_browser
from tests.support.fake_engine import FakeEngine
from tests.support.serving import served

expect.set_options(timeout=20_000)
pytestmark = pytest.mark.skipif(
    find_browser() is None, reason="the page's tests need Chromium or Chrome"
)


class FakePool(EnginePool):
    """Models that pretend; the first one is loaded."""

    def __init__(self, *engines: FakeEngine):
        super().__init__([])
        self._fakes: dict[PooledModel, Any] = {}
        for engine in engines:
            self._fakes[PooledModel(ModelSource(_not_needed, engine.name))] = engine
        self.models = tuple(self._fakes)
        self.models[0].engine = self._fakes[self.models[0]]

    async def acquire(self, model: PooledModel) -> Engine:
        model.engine = self._fakes[model]
        return await super().acquire(model)


def _not_needed() -> JanusPipeline:
    raise AssertionError("an engine that pretends is not loaded")


@pytest.fixture
def engines() -> list[FakeEngine]:
    config = mlx_janus.load().config
    other = replace(config, generation=replace(config.generation, cfg_weight=7.0))
    return [FakeEngine(config, "one"), FakeEngine(other, "two")]


def ask(page: Page, text: str, number: int) -> None:
    page.get_by_role("textbox", name="Question").fill(text)
    page.keyboard.press("Enter")
    expect(page.locator("article").nth(number)).to_have_attribute("aria-busy", "false")


def guidance(page: Page) -> str:
    return page.locator("[name=cfg_weight]").get_attribute("placeholder") or ""


def test_the_model_can_be_chosen(engines: list[FakeEngine], visits: Visits) -> None:
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="needs axe-playwright-python"
    ).Axe()
    with served(FakePool(*engines)) as address:
        page = visits.open(address, reduced_motion="reduce", viewport={"width": 320, "height": 700})
        choice = page.get_by_role("combobox", name="Model")
        expect(choice).to_have_value("one")
        expect(choice.get_by_role("option")).to_have_text(["one", "two"])
        expect(page.locator("#model")).to_be_hidden()
        assert page.evaluate("document.documentElement.scrollWidth") == 320
        first = guidance(page)
        assert first
        ask(page, "hello", 0)
        assert [len(engine.asked) for engine in engines] == [1, 0]
        choice.select_option("two")
        assert guidance(page) == ""  # not known before the model is loaded
        expect(page.locator("#notice")).to_contain_text("one replied here so far")
        ask(page, "hello again", 1)
        ask(page, "/draw a star", 2)
        assert [len(engine.asked) for engine in engines] == [1, 2]
        expect(page.locator("[name=cfg_weight]")).to_have_attribute("placeholder", "7")
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
            found = axe.run(page)
            assert found.violations_count == 0, found.generate_report()
        page.reload()
        expect(choice).to_have_value("two")
        expect(page).to_have_title("Janus · two")
        choice.select_option("one")
        assert guidance(page) == first


def test_one_model_leaves_no_choice(engines: list[FakeEngine], visits: Visits) -> None:
    sent = []
    with served(engines[0], served_names=("janus", "also")) as address:
        page = visits.open(address)
        page.on("request", lambda request: sent.append(request.post_data_json))
        expect(page.locator("#model")).to_have_text("janus")
        expect(page.get_by_role("combobox", name="Model")).to_have_count(0)
        ask(page, "hello", 0)
    assert [body["stream"] for body in sent if body] == [True]
    assert not any("model" in body for body in sent if body)
