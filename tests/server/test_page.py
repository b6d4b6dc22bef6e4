"""The page in a real browser, before an engine that says what it is told, and before Janus-Tiny."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

import mlx_janus

pytest.importorskip("playwright", reason="the page's tests need playwright")

# isort: split
from PIL import Image, ImageDraw
from playwright.sync_api import Browser, Locator, Page, expect

from mlx_janus.engine.messages import AnswerRequest, DrawingRequest, Request
from mlx_janus.errors import PromptError
from mlx_janus.processing.saved_images import read_metadata
from tests.support.browser import Visits, find_browser, hand_over, launched
from tests.support.fake_engine import FakeEngine, FakeTicket
from tests.support.serving import served, started, wait_until

expect.set_options(timeout=20_000)
pytestmark = pytest.mark.skipif(
    find_browser() is None, reason="the page's tests need Chromium or Chrome"
)
Open = Callable[..., Page]
_REPLIED = "the server responded with a status of"


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


@pytest.fixture(scope="module")
def config() -> Any:
    return mlx_janus.load().config


@pytest.fixture
def engine(config: Any) -> FakeEngine:
    return FakeEngine(config)


@pytest.fixture
def page(engine: FakeEngine, visits: Visits) -> Iterator[Page]:
    with served(engine) as address:
        yield visits.open(address)


@pytest.fixture(scope="module")
def tiny() -> Iterator[str]:
    """The address of a server of Janus-Tiny."""
    with started() as server:
        yield server.url


def picture(width: int = 40, height: int = 30, colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(buffer, "PNG")
    return buffer.getvalue()


def shapes() -> bytes:
    image = Image.new("RGB", (256, 256), "white")
    pen = ImageDraw.Draw(image)
    pen.rectangle((28, 130, 120, 222), fill=(217, 42, 42))
    pen.ellipse((134, 30, 230, 126), fill=(42, 91, 217))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def ask(page: Page, text: str) -> None:
    page.get_by_role("textbox", name="Question").fill(text)
    page.keyboard.press("Enter")


def draw(page: Page, text: str) -> None:
    ask(page, f"/draw {text}")


def settled(page: Page, number: int = 0) -> Locator:
    """An exchange, by its number, when it has come to its end."""
    exchange = page.locator("article").nth(number)
    expect(exchange).to_have_attribute("aria-busy", "false")
    return exchange


def set_up(page: Page, **values: object) -> None:
    page.get_by_role("button", name="Settings").click()
    for label, value in values.items():
        page.get_by_role("dialog").get_by_label(label.replace("_", " ")).first.fill(str(value))
    page.get_by_role("button", name="Done").click()


def watch_pictures(page: Page) -> None:
    """Note every image that replaces another: its kind, and the text below."""
    page.evaluate("""() => {
      window.looks = [];
      const talk = document.querySelector("#talk");
      new MutationObserver((changes) => changes.forEach(({target}) => {
        const caption = target.closest("figure").querySelector("figcaption span").textContent;
        const article = target.closest("article");
        const busy = article.getAttribute("aria-busy") === "true" ? "busy" : "done";
        looks.push(`${target.src.slice(0, 5)}, ${caption}, ${busy}`);
      })).observe(talk, {subtree: true, attributeFilter: ["src"]});
    }""")


def answers(engine: FakeEngine) -> list[AnswerRequest]:
    return [request for request in engine.asked if isinstance(request, AnswerRequest)]


def drawings(engine: FakeEngine) -> list[DrawingRequest]:
    return [request for request in engine.asked if isinstance(request, DrawingRequest)]


# Asking


def test_pictures_are_chosen_dropped_and_pasted_and_shown_with_the_question(
    page: Page, engine: FakeEngine
) -> None:
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Add pictures").click()
    chooser.value.set_files(
        [{"name": "a.png", "mimeType": "image/png", "buffer": picture(colour="red")}]
    )
    hand_over(
        page,
        "drop",
        [("b.png", "image/png", picture(colour="lime")), ("c.txt", "text/plain", b"words")],
    )
    expect(page.get_by_role("alert")).to_have_text(
        "c.txt is not a picture that this browser can read: use PNG or JPEG."
    )
    hand_over(page, "paste", [("c.png", "image/png", picture(colour="blue"))])
    tray = page.get_by_role("list", name="Pictures shown with the next question").get_by_role(
        "listitem"
    )
    expect(tray).to_have_count(3)
    page.get_by_role("button", name="Remove b.png").click()
    ask(page, "Which colours?")
    exchange = settled(page)
    expect(exchange.locator(".text")).to_have_text("A red circle.")
    assert [image.get_attribute("alt") for image in exchange.locator("img").all()] == [
        "a.png",
        "c.png",
    ]
    expect(tray).to_have_count(0)
    request = answers(engine)[0]
    assert [(turn.role, turn.text, turn.images) for turn in request.turns] == [
        ("user", "Which colours?", 2)
    ]
    assert [image.getpixel((32, 32)) for image in request.images] == [(255, 0, 0), (0, 0, 255)]


def test_large_pictures_are_made_smaller_before_they_are_sent(page: Page) -> None:
    files = [("large.png", "image/png", picture(3000, 1500)), ("small.png", "image/png", picture())]
    hand_over(page, "drop", files)
    expect(page.locator("#tray li")).to_have_count(2)
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "What is this?")
    settled(page)
    body = json.loads(sent.value.post_data or "")
    urls = [part["image_url"]["url"] for part in body["messages"][0]["content"][:2]]
    large, small = (base64.b64decode(url.partition(",")[2]) for url in urls)
    assert Image.open(io.BytesIO(large)).size == (1536, 768)
    assert small == picture()


def test_an_answer_appears_as_it_comes_and_is_told_once(page: Page, engine: FakeEngine) -> None:
    engine.pause = 0.2
    page.evaluate("""() => {
      window.seen = {told: [], shown: []};
      const note = (list, text) => {
        if (text && seen[list].at(-1) !== text) seen[list].push(text);
      };
      new MutationObserver(() => {
        note("told", document.querySelector("[role=status]").textContent);
        note("shown", document.querySelector("article[aria-busy=true] .text")?.textContent);
      }).observe(document, {childList: true, subtree: true});
    }""")
    ask(page, "What is this?")
    settled(page)
    seen = page.evaluate("seen")
    assert seen["told"] == ["Answering…", "Answer: A red circle."]
    assert len(seen["shown"]) > 1
    assert all("A red circle.".startswith(text) for text in seen["shown"])
    expect(page.locator("[aria-live]:not([aria-live=off])")).to_have_count(
        0
    )  # nothing else is read out
    expect(page.get_by_role("textbox", name="Question")).to_be_focused()


def test_what_was_said_before_is_sent_with_the_settings(page: Page, engine: FakeEngine) -> None:
    hand_over(page, "paste", [("a.png", "image/png", picture())])
    expect(page.locator("#tray li")).to_have_count(1)
    ask(page, "What is this?")
    settled(page)
    assert answers(engine)[0].system is None
    set_up(page, System_prompt="Be brief.", Max_tokens=7, Seed=5)
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("group", name="Answers").get_by_label("Temperature").fill("0.5")
    page.keyboard.press("Escape")
    ask(page, "And its colour?")
    settled(page, 1)
    request = answers(engine)[1]
    assert [(turn.role, turn.text, turn.images) for turn in request.turns] == [
        ("user", "What is this?", 1),
        ("assistant", "A red circle.", 0),
        ("user", "And its colour?", 0),
    ]
    options = request.options
    assert (request.system, options.max_tokens, options.seed, options.temperature) == (
        "Be brief.",
        7,
        5,
        0.5,
    )
    page.get_by_role("button", name="New chat").click()
    expect(page.locator("article")).to_have_count(0)
    expect(page.get_by_role("heading", name="Show it a picture")).to_be_visible()
    ask(page, "Hello")
    settled(page)
    assert len(answers(engine)[2].turns) == 1


def test_an_answer_is_copied_given_again_and_its_question_edited(
    engine: FakeEngine, visits: Visits
) -> None:
    with served(engine) as address:
        page = visits.open(address, permissions=["clipboard-read", "clipboard-write"])
        hand_over(page, "paste", [("a.png", "image/png", picture())])
        expect(page.locator("#tray li")).to_have_count(1)
        ask(page, "What is this?")
        settled(page).get_by_role("button", name="Copy").click()
        expect(page.get_by_role("button", name="Copied")).to_be_visible()
        assert page.evaluate("navigator.clipboard.readText()") == "A red circle."
        page.evaluate("navigator.clipboard.writeText('')")
        page.evaluate(
            "Object.defineProperty(navigator, 'clipboard', {value: undefined})"
        )  # as over plain HTTP
        page.get_by_role("button", name="Copied").click()
        box = page.get_by_role("textbox", name="Question")
        box.press("ControlOrMeta+v")
        expect(box).to_have_value("A red circle.")
        engine.pieces = ("A blue square.",)
        page.get_by_role("button", name="Again").click()
        expect(settled(page).locator(".text")).to_have_text("A blue square.")
        assert answers(engine)[1].turns == answers(engine)[0].turns
        page.get_by_role("button", name="Edit").click()
        expect(page.locator("article")).to_have_count(0)
        expect(page.get_by_role("textbox", name="Question")).to_have_value("What is this?")
        ask(page, "What is that?")
        settled(page)
        assert [(turn.text, turn.images) for turn in answers(engine)[2].turns] == [
            ("What is that?", 1)
        ]


def test_words_are_shown_as_they_are_and_code_as_code(page: Page, engine: FakeEngine) -> None:
    nasty = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    engine.pieces = (nasty, " **bold** and `x = 1`\n```python\nfor <b> in y:\n```\nend ** here")
    page.on("dialog", lambda dialog: pytest.fail(f"a script ran: {dialog.message}"))
    ask(page, nasty)
    exchange = settled(page)
    expect(exchange.locator(".bubble")).to_have_text(nasty)
    shown = exchange.locator(".text")
    expect(shown).to_contain_text(nasty)
    expect(shown.locator("strong")).to_have_text("bold")
    expect(shown.locator("code").first).to_have_text("x = 1")
    expect(shown.locator("pre")).to_have_text("for <b> in y:")
    expect(shown).to_contain_text("end ** here")
    assert page.locator("article img, article script, article b").count() == 0
    draw(page, nasty)
    expect(settled(page, 1).get_by_role("button", name=f"Enlarge {nasty}")).to_be_visible()


def test_the_oldest_questions_are_left_out_when_the_context_is_full(
    config: Any, visits: Visits
) -> None:
    class Forgetful(FakeEngine):
        def submit(self, request: Request) -> FakeTicket:
            if isinstance(request, AnswerRequest) and len(request.turns) > 3:
                raise PromptError(
                    "the question is 2000 tokens long, and the model's context 1024: shorten it"
                )
            return super().submit(request)

    engine = Forgetful(config)
    with served(engine) as address:
        page = visits.open(address, forgiven=[f"{_REPLIED} 400"])
        for number in range(4):
            ask(page, f"Question {number}")
            settled(page, number)
        notes = page.get_by_text("The oldest questions no longer fit")
        expect(notes).to_have_count(2)
        assert [turn.text for turn in answers(engine)[-1].turns] == [
            "Question 2",
            "A red circle.",
            "Question 3",
        ]


def test_no_more_pictures_are_sent_than_one_request_may_hold(
    page: Page, engine: FakeEngine
) -> None:
    set_up(page, How_many=16)
    draw(page, "a red circle")
    settled(page)
    ask(page, "What are they?")
    settled(page, 1)
    hand_over(page, "paste", [("a.png", "image/png", picture())])
    expect(page.locator("#tray li")).to_have_count(1)
    ask(page, "And this?")
    settled(page, 2)
    assert [len(request.images) for request in answers(engine)] == [16, 1]
    expect(page.get_by_text("The oldest questions no longer fit")).to_be_visible()


# Drawing


def test_pictures_form_in_place_and_are_shown_with_the_next_question(
    page: Page, engine: FakeEngine
) -> None:
    engine.pause = 0.02
    watch_pictures(page)
    set_up(page, How_many=2, Guidance=3, Seed=7)
    draw(page, "a red circle")
    exchange = settled(page)
    expect(exchange.locator("figcaption")).to_have_text(["seed 7Download", "seed 8Download"])
    looks = page.evaluate("looks")
    assert looks.count("blob:, seed 7, busy") == 1
    assert looks.count("blob:, seed 8, busy") == 1
    assert looks[0].startswith("data:, Drawing… ")
    assert looks.index("blob:, seed 7, busy") >= 5  # looks at the first picture before it was whole
    request = drawings(engine)[0]
    assert (request.prompt, request.n, request.seed, request.options.cfg_weight) == (
        "a red circle",
        2,
        7,
        3,
    )
    tray = [image.get_attribute("alt") for image in page.locator("#tray img").all()]
    assert tray == [f"a red circle, drawn with seed {seed}" for seed in (7, 8)]
    page.get_by_role("button", name="Remove a red circle, drawn with seed 8").click()
    ask(page, "What is this?")
    settled(page, 1)
    assert [(turn.text, turn.images) for turn in answers(engine)[0].turns] == [("What is this?", 1)]


def test_drawing_is_a_mode_and_can_be_done_again(page: Page, engine: FakeEngine) -> None:
    page.get_by_role("form", name="Message").get_by_text("Draw").click()
    box = page.get_by_role("textbox", name="Description of the picture")
    box.fill("an owl")
    page.get_by_role("button", name="Send").click()
    settled(page)
    first = page.locator("figure img").get_attribute("src")
    page.get_by_role("button", name="Again").click()
    expect(page.locator("figure img")).not_to_have_attribute("src", first or "")
    settled(page)
    expect(page.locator("#tray li")).to_have_count(1)  # the first one is gone
    assert [request.prompt for request in drawings(engine)] == ["an owl", "an owl"]
    page.get_by_role("button", name="Enlarge an owl").first.click()
    viewer = page.get_by_role("dialog", name="Picture, enlarged")
    expect(viewer.get_by_role("img", name="an owl")).to_be_visible()
    expect(viewer.get_by_role("link", name="Download")).to_have_attribute(
        "download", re.compile(r"janus-\d+\.png")
    )
    page.keyboard.press("Escape")
    expect(viewer).to_be_hidden()


@pytest.mark.parametrize(("work", "way"), [(ask, "button"), (draw, "key")])
def test_what_is_under_way_is_stopped(
    page: Page, engine: FakeEngine, work: Callable[..., None], way: str
) -> None:
    engine.pause = 0.7
    engine.pieces = tuple(f"word{number} " for number in range(100))
    work(page, "a red circle")
    expect(page.locator(".text:not(:empty), figure img").first).to_be_visible()
    if way == "button":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press("Escape")
    expect(settled(page).get_by_text("Stopped.", exact=True)).to_be_visible()
    wait_until(lambda: engine.open == 0)
    engine.pause, engine.pieces = 0, ("Yes.",)
    ask(page, "And now?")
    expect(settled(page, 1).locator(".text")).to_have_text("Yes.")


# Refusals


def test_a_key_is_asked_for_and_kept_for_the_tab(engine: FakeEngine, visits: Visits) -> None:
    with served(engine, api_key="right") as address:
        page = visits.open(address, forgiven=[f"{_REPLIED} 401"])
        dialog = page.get_by_role("dialog", name="This server asks for a key")
        dialog.get_by_label("API key").fill("wrong")
        page.keyboard.press("Enter")
        expect(dialog).to_contain_text("The key is wrong or missing")
        dialog.get_by_label("API key").fill("right")
        dialog.get_by_role("button", name="Continue").click()
        expect(page.get_by_title("The model that answers and draws")).to_have_text("fake")
        page.reload()
        ask(page, "Hello")
        settled(page)
        assert page.evaluate("[sessionStorage['janus-key'], JSON.stringify(localStorage)]") == [
            "right",
            "{}",
        ]
        page.get_by_role("button", name="Settings").click()
        page.get_by_role("button", name="Forget the key").click()
        page.keyboard.press("Escape")
        page.get_by_role("button", name="Again").click()
        dialog.get_by_role("button", name="Cancel").click()
        expect(settled(page).get_by_text("The key is wrong or missing")).to_be_visible()


def test_a_busy_server_is_waited_for(engine: FakeEngine, visits: Visits) -> None:
    engine.room = 0
    with served(engine) as address:
        page = visits.open(address, forgiven=[f"{_REPLIED} 429"])
        page.clock.install()
        ask(page, "Hello")
        expect(
            settled(page).get_by_text("Too many requests are waiting: try again later. Wait 7 s.")
        ).to_be_visible()
        expect(page.get_by_role("button", name="Again in 7 s")).to_be_disabled()
        for _ in range(8):
            page.clock.run_for(1000)
        engine.room = 1
        page.get_by_role("button", name="Again", exact=True).click()
        page.clock.run_for(1000)
        expect(settled(page).locator(".text")).to_have_text("A red circle.")


def test_errors_are_one_sentence_in_place(engine: FakeEngine, visits: Visits) -> None:
    with served(engine) as address:
        page = visits.open(address, forgiven=[f"{_REPLIED} 400", "net::ERR"])
        set_up(page, Seed=2**53 - 1)
        ask(page, "Hello")
        settled(page)
        engine.failure = PromptError("it went wrong")
        ask(page, "What is this?")
        exchange = settled(page, 1)
        expect(exchange.locator(".text")).to_have_text("A red")
        expect(exchange.locator(".trouble")).to_have_text("It went wrong.")
        draw(page, "a red circle")
        expect(settled(page, 2).locator(".trouble")).to_have_text("It went wrong.")
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("Guidance").fill("5000")
        page.keyboard.press("Escape")
        draw(page, "a red circle")
        expect(settled(page, 3).locator(".trouble")).to_contain_text("less than or equal to 1000")
    ask(page, "Hello")
    expect(settled(page, 4).locator(".trouble")).to_have_text(
        "The server does not answer: see whether it is still running."
    )


# For everybody


def test_colours_follow_the_system_until_they_are_chosen(
    engine: FakeEngine, visits: Visits
) -> None:
    def becomes(colours: str) -> None:
        """The ground is, or after a moment comes to be, dark or light."""
        numbers = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g)"
        total = f"{numbers}.reduce((sum, one) => sum + +one, 0)"
        test = f"{total} {'< 150' if colours == 'dark' else '> 600'}"
        # After a reload, the page's policy may refuse the code that wait_for_function sends.
        wait_until(lambda: page.evaluate(test))

    with served(engine) as address:
        page = visits.open(address, color_scheme="dark")
        becomes("dark")
        page.emulate_media(color_scheme="light")
        becomes("light")
        page.get_by_role("button", name="Use dark colours").click()
        becomes("dark")
        page.reload()
        becomes("dark")
        page.get_by_role("button", name="Use light colours").click()
        becomes("light")


def test_a_narrow_phone_does_not_scroll_sideways(engine: FakeEngine, visits: Visits) -> None:
    engine.pieces = ("unbroken" * 40, f"\n```\n{'code ' * 40}\n```")

    def fits() -> None:
        assert page.evaluate(
            "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
        )
        hidden = """() => [...document.querySelectorAll(
          "header *, footer *, dialog[open] button"
        )].filter((node) => {
          const box = node.getBoundingClientRect();
          const outside = box.left < 0 || box.right > innerWidth;
          return box.width > 1 && !node.closest("#tray") && outside;
        }).map((node) => node.outerHTML)"""
        assert page.evaluate(hidden) == []

    with served(engine) as address:
        page = visits.open(
            address, viewport={"width": 320, "height": 568}, has_touch=True, is_mobile=True
        )
        fits()
        set_up(page, How_many=3)
        draw(page, "wide" * 40)
        settled(page)
        fits()
        page.get_by_role("button", name="Enlarge").first.click()
        fits()
        page.keyboard.press("Escape")
        ask(page, "long" * 60)
        settled(page, 1)
        fits()
        page.get_by_role("button", name="Settings").click()
        fits()


def test_the_keyboard_alone_does_everything(page: Page, engine: FakeEngine) -> None:
    def tab_to(name: str, key: str = "Tab") -> None:
        for _ in range(40):
            page.keyboard.press(key)
            focused = page.locator(":focus")
            if focused.count() and name in (
                focused.get_attribute("aria-label") or focused.inner_text()
            ):
                shown = "(node) => getComputedStyle(node).outlineStyle"
                assert focused.evaluate(shown) != "none", f"the focus on {name} is not seen"
                return
        pytest.fail(f"{name} is not reached by {key}")

    expect(page.get_by_role("textbox", name="Question")).to_be_focused()
    page.keyboard.type("first")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("second")
    page.keyboard.press("Enter")
    settled(page)
    assert answers(engine)[0].turns[0].text == "first\nsecond"
    tab_to("Settings", "Shift+Tab")
    page.keyboard.press("Enter")
    tab_to("", "Tab")
    expect(page.get_by_role("dialog", name="Settings")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Settings")).to_be_focused()
    page.get_by_role("textbox", name="Question").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    expect(page.get_by_role("radio", name="Ask")).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("radio", name="Draw")).to_be_checked()
    page.get_by_role("textbox", name="Description of the picture").focus()
    page.keyboard.type("an owl")
    page.keyboard.press("Enter")
    settled(page, 1)
    tab_to("Enlarge an owl", "Shift+Tab")
    page.keyboard.press("Enter")
    viewer = page.get_by_role("dialog", name="Picture, enlarged")
    expect(viewer).to_be_visible()
    page.keyboard.press("Escape")
    expect(viewer).to_be_hidden()
    tab_to("Again", "Shift+Tab")
    page.keyboard.press("Enter")
    settled(page, 1)
    assert len(drawings(engine)) == 2


def test_nothing_bars_anybody(engine: FakeEngine, visits: Visits) -> None:
    """By axe-core's rules: names, roles, landmarks, contrast."""
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="needs axe-playwright-python"
    ).Axe()

    def check(*colours: Literal["light", "dark"]) -> None:
        for scheme in colours:
            page.emulate_media(color_scheme=scheme)
            found = axe.run(page)
            assert found.violations_count == 0, found.generate_report()

    with served(engine) as address:
        page = visits.open(address, reduced_motion="reduce", forgiven=[f"{_REPLIED} 429"])
        check("light")
        engine.pieces = ("some `code` and **bold**",)
        ask(page, "What is this?")
        settled(page)
        draw(page, "a red circle")
        settled(page, 1)
        engine.room = 0
        draw(page, "an owl")
        settled(page, 2)
        check("light", "dark")
        page.get_by_role("button", name="Settings").click()
        check("dark", "light")
        page.keyboard.press("Escape")
        page.get_by_role("button", name="Enlarge").first.click()
        check("light")


def test_names_and_roles_are_what_a_screen_reader_needs(page: Page) -> None:
    hand_over(page, "paste", [("a.png", "image/png", picture())])
    expect(page.locator("body")).to_match_aria_snapshot("""
    - banner:
      - heading "Janus" [level=1]
      - text: fake
      - button "New chat"
      - button "Settings"
      - button "Use dark colours"
    - main:
      - heading "Show it a picture, or have it draw one" [level=2]
      - paragraph
      - button "Draw a red fox in fresh snow at sunrise"
    - contentinfo:
      - form "Message":
        - list "Pictures shown with the next question":
          - listitem:
            - button "Enlarge a.png"
            - button "Remove a.png"
        - textbox "Question"
        - button "Add pictures"
        - group "What to do":
          - radio "Ask" [checked]
          - radio "Draw"
        - button "Send" [disabled]
    - status
    """)
    ask(page, "What is this?")
    settled(page)
    expect(page.locator("main")).to_match_aria_snapshot("""
    - main:
      - region "Conversation":
        - article "Question and answer":
          - button "Enlarge a.png"
          - text: What is this?
          - button "Edit"
          - text: A red circle.
          - button "Copy"
          - button "Again"
    """)


# With Janus-Tiny


def test_janus_tiny_tells_what_is_in_a_picture(tiny: str, visits: Visits) -> None:
    page = visits.open(tiny)
    expect(page.get_by_title("The model that answers and draws")).to_have_text("janus-tiny")
    hand_over(page, "drop", [("shapes.png", "image/png", shapes())])
    expect(page.locator("#tray li")).to_have_count(1)
    ask(page, "What colour is the circle?")
    expect(settled(page).locator(".text")).to_have_text(re.compile("blue"))
    ask(page, "What colour is the square?")
    expect(settled(page, 1).locator(".text")).to_have_text(re.compile("red"))


def test_an_example_of_janus_tiny_is_answered(tiny: str, visits: Visits) -> None:
    page = visits.open(tiny)
    page.get_by_role("button", name="What is in the picture?").click()
    expect(settled(page).locator(".text")).to_have_text(
        re.compile("blue circle.*red square|red square.*blue circle")
    )


def test_what_janus_tiny_draws_is_saved_with_its_settings(
    tiny: str, visits: Visits, tmp_path: Path
) -> None:
    page = visits.open(tiny)
    set_up(page, How_many=2, Seed=7)
    watch_pictures(page)
    draw(page, "a red circle above a blue square")
    exchange = settled(page)
    assert [look[:5] for look in page.evaluate("looks")].index(
        "blob:"
    ) >= 3  # seen before they were whole
    tray = [image.get_attribute("alt") for image in page.locator("#tray img").all()]
    assert [alt and alt[-6:] for alt in tray] == ["seed 7", "seed 8"]
    for number in range(2):
        with page.expect_download() as download:
            exchange.get_by_role("link", name="Download").nth(number).click()
        assert download.value.suggested_filename == f"janus-{7 + number}.png"
        path = tmp_path / download.value.suggested_filename
        download.value.save_as(path)
        facts = read_metadata(path)
        assert (facts["prompt"], facts["seed"]) == (
            "a red circle above a blue square",
            str(7 + number),
        )
        assert facts["model"] == "janus-tiny"
    ask(page, "What colour is the square?")
    expect(settled(page, 1).locator(".text")).to_have_text(re.compile("blue"))


def test_janus_tiny_is_asked_on_when_its_context_is_full(tiny: str, visits: Visits) -> None:
    page = visits.open(tiny, forgiven=[f"{_REPLIED} 400"])
    for number in range(2):  # of 8 pictures, each 66 of 1024 positions
        hand_over(page, "drop", [(f"{k}.png", "image/png", shapes()) for k in range(8)])
        expect(page.locator("#tray li")).to_have_count(8)
        ask(page, "What colour is the square?")
        expect(settled(page, number).locator(".text")).not_to_be_empty()
    expect(page.get_by_text("The oldest questions no longer fit")).to_be_visible()
