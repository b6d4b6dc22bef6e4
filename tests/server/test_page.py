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
from playwright.sync_api import Locator, Page, expect

from mlx_janus.engine.messages import AnswerRequest, DrawingRequest, Request
from mlx_janus.errors import PromptError
from mlx_janus.processing.saved_images import read_metadata
from mlx_janus.weights.published import read_published_sizes
from tests.support.browser import Visits, find_browser, hand_over
from tests.support.fake_engine import FakeEngine, FakeTicket
from tests.support.golden import FIXTURES
from tests.support.serving import served, started, wait_until

expect.set_options(timeout=20_000)
pytestmark = pytest.mark.skipif(
    find_browser() is None, reason="the page's tests need Chromium or Chrome"
)
Open = Callable[..., Page]
_REPLIED = "the server responded with a status of"


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


def choose(page: Page, mode: Literal["Ask", "Generate"]) -> None:
    page.get_by_role("form", name="Message").get_by_text(mode, exact=True).click()


def generate(page: Page, prompt: str, number: int = 1, seed: int | str = "") -> None:
    choose(page, "Generate")
    page.get_by_label("Images", exact=True).fill(str(number))
    page.get_by_label("Seed", exact=True).fill(str(seed))
    page.get_by_role("textbox", name="Prompt").fill(prompt)
    page.get_by_role("button", name="Send").click()


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
        const caption = target.closest("figure").querySelector("figcaption > *").textContent;
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
        page.get_by_role("button", name="Add images").click()
    chooser.value.set_files(
        [{"name": "a.png", "mimeType": "image/png", "buffer": picture(colour="red")}]
    )
    hand_over(
        page,
        "drop",
        [("b.png", "image/png", picture(colour="lime")), ("c.txt", "text/plain", b"words")],
    )
    expect(page.get_by_role("alert")).to_have_text(
        "c.txt is not an image that this browser can read: use PNG or JPEG."
    )
    hand_over(page, "paste", [("c.png", "image/png", picture(colour="blue"))])
    tray = page.get_by_role("list", name="Images sent with the next question").get_by_role(
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
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator("article")).to_have_count(0)
    expect(page.get_by_role("heading", name="Ask about an image")).to_be_visible()
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
    hand_over(page, "paste", [(f"{n}.png", "image/png", picture()) for n in range(17)])
    expect(page.get_by_role("alert")).to_have_text(
        "A question takes 16 images at most: 16.png is left out."
    )
    expect(page.locator("#tray li")).to_have_count(16)
    ask(page, "What are they?")
    settled(page)
    hand_over(page, "paste", [("a.png", "image/png", picture())])
    expect(page.locator("#tray li")).to_have_count(1)
    ask(page, "And this?")
    settled(page, 1)
    assert [len(request.images) for request in answers(engine)] == [16, 1]
    expect(page.get_by_text("The oldest questions no longer fit")).to_be_visible()


# Drawing


def test_pictures_form_in_place_and_are_shown_with_the_next_question(
    page: Page, engine: FakeEngine
) -> None:
    engine.pause = 0.02
    watch_pictures(page)
    set_up(page, Guidance=3)
    generate(page, "a red circle", 2, 7)
    exchange = settled(page)
    expect(exchange.locator("figcaption")).to_have_text(
        ["Seed 7Ask about thisDownload", "Seed 8Ask about thisDownload"]
    )
    looks = page.evaluate("looks")
    assert looks.count("blob:, Seed 7, busy") == 1
    assert looks.count("blob:, Seed 8, busy") == 1
    assert looks[0].startswith("data:, Generating… ")
    assert looks.index("blob:, Seed 7, busy") >= 5  # looks at the first picture before it was whole
    request = drawings(engine)[0]
    assert (request.prompt, request.n, request.seed, request.options.cfg_weight) == (
        "a red circle",
        2,
        7,
        3,
    )
    choose(page, "Ask")
    tray = page.locator("#tray img")
    assert [image.get_attribute("alt") for image in tray.all()] == ["a red circle, seed 8"]
    exchange.get_by_role("button", name="Ask about this").first.click()
    assert [image.get_attribute("alt") for image in tray.all()] == ["a red circle, seed 7"]
    ask(page, "What is this?")
    settled(page, 1)
    assert [(turn.text, turn.images) for turn in answers(engine)[0].turns] == [("What is this?", 1)]


def test_drawing_is_a_mode_and_can_be_done_again(page: Page, engine: FakeEngine) -> None:
    choose(page, "Generate")
    box = page.get_by_role("textbox", name="Prompt")
    box.fill("an owl")
    page.get_by_role("button", name="Send").click()
    settled(page)
    page.get_by_role("button", name="Again").click()
    settled(page, 1)
    expect(page.locator("figure img")).to_have_count(2)  # the first one stays
    expect(page.locator("#tray li")).to_have_count(0)  # a prompt does not change them
    choose(page, "Ask")
    expect(page.locator("#tray li")).to_have_count(1)  # the last one only
    assert [request.prompt for request in drawings(engine)] == ["an owl", "an owl"]
    assert drawings(engine)[0].seed != drawings(engine)[1].seed
    page.get_by_role("button", name="Enlarge an owl").first.click()
    viewer = page.get_by_role("dialog", name="Image, enlarged")
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


# Conversations


def conversations(page: Page) -> Locator:
    """The titles in the list of conversations, which is opened."""
    page.get_by_role("button", name="Conversations").click()
    return page.get_by_role("dialog", name="Conversations").locator("li .open span")


def start_over(page: Page) -> None:
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator("article")).to_have_count(0)


def stored_text(page: Page) -> str:
    """The conversations in the browser's database, as JSON."""
    return str(
        page.evaluate("transact('readonly', (rows) => result(rows.getAll())).then(JSON.stringify)")
    )


def stored_records(page: Page) -> int:
    """The number of conversations in the browser's database."""
    return int(
        page.evaluate(
            "transact('readonly', (rows) => result(rows.getAllKeys())).then(a => a.length)"
        )
    )


def test_conversations_are_kept_listed_opened_and_deleted(page: Page, engine: FakeEngine) -> None:
    hand_over(page, "paste", [("a.png", "image/png", picture())])
    expect(page.locator("#tray li")).to_have_count(1)
    ask(page, "What is this?")
    settled(page)
    generate(page, "an owl", 2, 7)
    settled(page, 1)
    page.get_by_role("textbox", name="Prompt").fill("half a pro")
    page.evaluate("saving")
    page.reload()
    expect(page.get_by_role("textbox")).to_have_value("half a pro")
    expect(settled(page).locator(".text")).to_have_text("A red circle.")
    expect(settled(page).get_by_role("img", name="a.png")).to_be_visible()
    expect(settled(page, 1).locator("figcaption .seed")).to_have_text(["Seed 7", "Seed 8"])
    ask(page, "And now?")  # the image of before is still sent
    settled(page, 2)
    assert [turn.images for turn in answers(engine)[-1].turns] == [1, 0, 1]
    start_over(page)
    page.get_by_role("button", name="Undo").click()
    expect(page.locator("article")).to_have_count(3)
    start_over(page)
    ask(page, "Hello")
    settled(page)
    titles = conversations(page)
    expect(titles).to_have_text(["Hello", "What is this?"])
    expect(page.locator("[aria-current]")).to_contain_text("Hello")
    page.get_by_role("button", name="Delete What is this?").click()
    expect(page.get_by_role("button", name="Undo")).to_be_focused()
    page.keyboard.press("Enter")
    expect(titles).to_have_text(["Hello", "What is this?"])
    page.get_by_role("button", name="What is this?", exact=False).first.click()
    expect(page.locator("article")).to_have_count(3)
    expect(page.get_by_role("dialog")).to_have_count(0)
    conversations(page)
    page.get_by_role("button", name="Delete What is this?").click()  # the one that is shown
    expect(page.locator("article")).to_have_count(0)
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Conversations")).to_be_focused()
    wait_until(lambda: stored_records(page) == 1)
    assert page.evaluate("transact('readonly', (_, rows) => result(rows.count()))") == 0
    expect(conversations(page)).to_have_text(["Hello"])


def test_a_conversation_is_exported_as_one_file_with_its_images(page: Page, tmp_path: Path) -> None:
    hand_over(page, "paste", [("a.png", "image/png", picture())])
    expect(page.locator("#tray li")).to_have_count(1)
    ask(page, "What is <b>this</b>?")
    settled(page)
    draw(page, "an owl")
    settled(page, 1)
    conversations(page)
    with page.expect_download() as download:
        page.get_by_role("button", name="Export What is <b>this</b>?").click()
    assert download.value.suggested_filename == "What-is-b-this-b-.html"
    download.value.save_as(tmp_path / "exported.html")
    html = (tmp_path / "exported.html").read_text(encoding="utf-8")
    assert "What is &lt;b&gt;this&lt;/b&gt;?" in html
    assert "A red circle." in html
    files = [base64.b64decode(data) for data in re.findall(r"data:image/png;base64,([^\"]+)", html)]
    assert files[0] == picture()
    assert [Image.open(io.BytesIO(data)).format for data in files] == ["PNG", "PNG"]


@pytest.mark.parametrize(
    ("error", "words"),
    [("SecurityError", "keeps no conversations"), ("QuotaExceededError", "storage is full")],
)
def test_conversations_last_as_long_as_the_tab_if_the_browser_keeps_none(
    engine: FakeEngine, visits: Visits, error: str, words: str
) -> None:
    with served(engine) as address:
        page = visits.open(address)
        page.evaluate(
            """(name) => {
              IDBObjectStore.prototype.put = () => { throw new DOMException("refused", name); };
            }""",
            error,
        )
        draw(page, "an owl")
        settled(page)
        expect(page.locator("#notice")).to_contain_text(words)
        start_over(page)
        ask(page, "Hello")
        settled(page)
        expect(page.locator("#notice")).to_be_hidden()  # it is said once
        titles = conversations(page)
        expect(titles).to_have_text(["Hello", "an owl"])
        expect(page.locator("#kept")).to_contain_text(words)
        titles.last.click()
        expect(settled(page).get_by_role("img", name="an owl")).to_be_visible()


def test_a_page_without_a_database_works(engine: FakeEngine, visits: Visits) -> None:
    with served(engine) as address:
        page = visits.open(address)
        page.add_init_script("Object.defineProperty(window, 'indexedDB', {value: undefined})")
        page.reload()
        ask(page, "Hello")
        expect(settled(page).locator(".text")).to_have_text("A red circle.")
        expect(page.locator("#notice")).to_contain_text("This browser keeps no conversations")


def test_two_tabs_do_not_lose_each_others_exchanges(engine: FakeEngine, visits: Visits) -> None:
    with served(engine) as address:
        page = visits.open(address)
        ask(page, "First")
        settled(page)
        other = page.context.new_page()
        other.goto(f"{address}/")
        conversations(other).first.click()
        settled(other)
        ask(other, "Second")
        settled(other, 1)
        settled(page, 1)  # the first tab shows it, too
        engine.pause = 0.3
        ask(page, "Left")  # both at once
        ask(other, "Right")
        settled(page, 2)
        settled(other, 2)
        wait_until(lambda: stored_records(page) == 2)
        lasts = [tab.locator("article").last.locator(".bubble") for tab in (page, other)]
        assert [last.inner_text() for last in lasts] == ["Left", "Right"]
        notices = [tab.locator("#notice").inner_text() for tab in (page, other)]
        assert sum("this is a copy" in notice for notice in notices) == 1


def test_damaged_records_are_left_out_and_the_other_model_is_named(
    page: Page, engine: FakeEngine
) -> None:
    page.evaluate("""transact("readwrite", (rows) => {
      rows.put({id: "a", changed: 1, exchanges: "none"});
      rows.put({id: "b", changed: 2, exchanges: [{draw: false, asked: "Half"}]});
      rows.put({id: "c", changed: 3, version: "1", exchanges: [{
        draw: true, asked: "an owl", answer: "", images: [], drawn: [{id: "gone", alt: "lost"}],
        notes: [], n: 1, seed: "", model: "janus-old", state: "done",
      }]});
    })""")
    titles = conversations(page)
    expect(titles).to_have_text(["an owl"])
    titles.click()
    expect(page.locator("#notice")).to_contain_text(
        "janus-old replied here so far. From now on, fake does."
    )
    expect(settled(page).locator("img")).to_have_count(0)
    page.get_by_role("button", name="Again").click()
    expect(settled(page).get_by_role("img", name="an owl")).to_be_visible()
    assert len(drawings(engine)) == 1


def test_a_reload_keeps_what_was_received(page: Page, engine: FakeEngine) -> None:
    engine.pause = 0.2
    engine.pieces = tuple(f"word{number} " for number in range(100))
    ask(page, "Count")
    wait_until(lambda: "word2" in stored_text(page))
    page.reload()
    exchange = settled(page)
    expect(exchange.locator(".text")).to_contain_text("word0 word1 word2")
    expect(exchange.get_by_text("Stopped.", exact=True)).to_be_visible()
    start_over(page)
    draw(page, "an owl")
    wait_until(lambda: '"partial":true' in stored_text(page))
    page.reload()
    expect(settled(page).locator("figcaption")).to_contain_text("Not finished")


# A preview that arrives while a conversation is being written: it replaces the one before it.
PREVIEW_DURING_A_WRITE = """async () => {
  const [exchange] = current.exchanges, index = IDBIndex.prototype, read = index.getAllKeys;
  const later = {...exchange.drawn[0], id: "later"};
  index.getAllKeys = function (...values) {
    const request = read.apply(this, values);
    exchange.drawn = [later];
    return request;
  };
  await keep();
  index.getAllKeys = read;
}"""


def test_an_image_that_comes_while_a_conversation_is_written_is_kept(page: Page) -> None:
    draw(page, "an owl")
    settled(page)
    page.evaluate(PREVIEW_DURING_A_WRITE)
    page.reload()
    expect(settled(page).locator("figure img")).to_be_visible()


# Images and prompts


def test_an_image_is_sent_without_words(page: Page, engine: FakeEngine) -> None:
    send = page.get_by_role("button", name="Send")
    expect(send).to_be_disabled()
    hand_over(page, "paste", [("a.png", "image/png", picture())])
    expect(send).to_be_enabled()
    send.click()
    exchange = settled(page)
    expect(exchange.locator(".bubble")).to_have_count(0)
    assert [(turn.text, turn.images) for turn in answers(engine)[0].turns] == [("", 1)]


def test_again_gives_another_answer_and_can_be_undone(page: Page, engine: FakeEngine) -> None:
    set_up(page, Answer_seed=5)
    ask(page, "What is this?")
    settled(page)
    engine.pieces = ("A blue square.",)
    page.get_by_role("button", name="Again").click()
    expect(settled(page).locator(".text")).to_have_text("A blue square.")
    first, second = (request.options for request in answers(engine))
    assert (first.temperature, first.seed) == (0, 5)
    assert second.temperature == 1
    assert second.seed != 5
    page.get_by_role("button", name="Undo").click()
    expect(settled(page).locator(".text")).to_have_text("A red circle.")


def test_any_image_can_be_asked_about_and_all_are_removed(page: Page, engine: FakeEngine) -> None:
    hand_over(page, "paste", [("a.png", "image/png", picture())])
    expect(page.locator("#tray li")).to_have_count(1)
    ask(page, "What is this?")
    settled(page)
    generate(page, "an owl", 3, 1)
    exchange = settled(page, 1)
    choose(page, "Ask")
    tray = page.locator("#tray img")
    expect(tray).to_have_count(1)  # the last of three
    exchange.get_by_role("button", name="Ask about this").first.click()
    settled(page).get_by_role("button", name="Enlarge a.png").click()
    page.get_by_role("dialog").get_by_role("button", name="Ask about this").click()
    expect(page.get_by_role("textbox", name="Question")).to_be_focused()
    assert [image.get_attribute("alt") for image in tray.all()] == ["an owl, seed 1", "a.png"]
    page.get_by_role("button", name="Remove all").click()
    expect(tray).to_have_count(0)
    ask(page, "How many stars are there?")
    settled(page, 2)
    assert answers(engine)[-1].turns[-1].images == 0


def test_a_seed_is_used_again_and_a_past_prompt_edited(page: Page, engine: FakeEngine) -> None:
    generate(page, "an owl", 2)
    settled(page)
    seed = drawings(engine)[0].seed
    draw_box = page.get_by_role("textbox", name="Prompt")
    draw_box.fill("a fox")
    page.get_by_role("button", name=f"Seed {seed + 1}", exact=True).click()
    expect(page.get_by_label("Seed", exact=True)).to_have_value(str(seed + 1))
    expect(draw_box).to_be_focused()
    page.keyboard.press("Enter")
    settled(page, 1)
    page.get_by_role("button", name="Edit").first.click()
    expect(draw_box).to_have_value("an owl")
    expect(page.get_by_label("Seed", exact=True)).to_have_value("")
    draw_box.fill("an old owl")
    page.keyboard.press("Enter")
    settled(page, 2)
    asked = [(request.prompt, request.n) for request in drawings(engine)]
    assert asked == [("an owl", 2), ("a fox", 2), ("an old owl", 2)]
    assert drawings(engine)[1].seed == seed + 1
    page.get_by_label("Images", exact=True).fill("17")
    draw_box.fill("an owl")
    page.keyboard.press("Enter")
    assert page.locator("#options :invalid").count() == 1
    expect(page.locator("article")).to_have_count(3)  # nothing is sent


def test_a_stopped_image_is_kept(page: Page, engine: FakeEngine) -> None:
    engine.pause = 0.3
    generate(page, "an owl", 2)
    expect(page.locator("figure img")).to_be_visible()
    page.keyboard.press("Escape")
    exchange = settled(page)
    expect(exchange.locator("figure")).to_have_count(1)
    expect(exchange.get_by_text("Stopped.", exact=True)).to_have_count(1)
    expect(exchange.locator("figcaption")).to_contain_text("Not finished")
    exchange.get_by_role("button", name="Enlarge an owl").click()
    expect(page.get_by_role("dialog").get_by_role("img")).to_be_visible()


def test_settings_show_the_servers_defaults_and_are_kept(page: Page, config: Any) -> None:
    page.get_by_role("button", name="Settings").click()
    own = config.generation
    for label, value in {
        "Guidance": f"{own.cfg_weight:g}",
        "Image temperature": f"{own.temperature:g}",
        "Answer temperature": "0",
        "Max tokens": "512",
    }.items():
        field = page.get_by_label(label)
        expect(field).to_have_attribute("placeholder", value)
        expect(field).to_have_accessible_description(re.compile(r"\w+.* \w+.*\."))
    expect(page.get_by_label("Steps")).to_be_hidden()
    page.get_by_label("Guidance").fill("3")
    page.keyboard.press("Escape")
    choose(page, "Generate")
    page.get_by_label("Images", exact=True).fill("4")
    page.reload()
    choose(page, "Generate")
    expect(page.get_by_label("Images", exact=True)).to_have_value("4")
    page.get_by_role("button", name="Settings").click()
    expect(page.get_by_label("Guidance")).to_have_value("3")
    page.get_by_role("button", name="Use the defaults").click()
    expect(page.get_by_label("Guidance")).to_have_value("")


def test_a_flow_has_steps_and_no_temperature(visits: Visits) -> None:
    config, _ = read_published_sizes(FIXTURES / "config_janusflow_1.3b.json")
    engine = FakeEngine(config)
    with served(engine) as address:
        page = visits.open(address)
        kept = json.dumps({"draw_temperature": "0.5"})  # chosen for another model
        page.evaluate("(kept) => localStorage.setItem('janus-settings', kept)", kept)
        page.reload()
        page.get_by_role("button", name="Settings").click()
        steps = page.get_by_label("Steps")
        expect(steps).to_have_attribute("placeholder", "30")
        expect(steps).to_have_accessible_description(re.compile("1 to 1000; more are slower"))
        expect(page.get_by_label("Image temperature")).to_be_hidden()
        expect(page.get_by_label("Guidance")).to_have_attribute("placeholder", "2")
        steps.fill("1001")
        assert not steps.evaluate("(field) => field.checkValidity()")
        steps.fill("3")
        page.get_by_role("button", name="Done").click()
        generate(page, "an owl")
        settled(page)
        expect(page.locator("figure .image")).to_have_count(1)
    (request,) = drawings(engine)
    assert request.options.steps == 3


# Changing images


def to_change(page: Page) -> list[str | None]:
    """The images in the tray of a prompt, by their texts."""
    tray = page.get_by_role("list", name="Images to change")
    return [image.get_attribute("alt") for image in tray.locator("img").all()]


def test_an_attached_image_is_changed_by_a_prompt(page: Page, engine: FakeEngine) -> None:
    set_up(page, Guidance=3, Freedom_of_changes=1.5)
    choose(page, "Generate")
    box = page.get_by_role("textbox", name="Prompt")
    expect(box).to_have_attribute("placeholder", "Describe an image")
    hand_over(page, "paste", [("a.png", "image/png", picture(colour="red"))])
    hand_over(page, "drop", [("b.png", "image/png", picture(colour="lime"))])
    expect(page.locator("#tray li")).to_have_count(2)
    assert to_change(page) == ["a.png", "b.png"]
    expect(box).to_have_attribute("placeholder", "Describe the change")
    generate(page, "swap the colours", 2, 7)
    exchange = settled(page)
    expect(exchange.locator(".bubble")).to_have_text("Changeswap the colours")
    expect(exchange.locator(".shown img")).to_have_count(2)
    expect(exchange.locator("figcaption .seed")).to_have_text(["Seed 7", "Seed 8"])
    assert to_change(page) == []
    expect(box).to_have_attribute("placeholder", "Describe an image")
    exchange.get_by_role("button", name="Again").click()  # with the same images
    settled(page, 1)
    page.get_by_role("button", name="Edit").first.click()
    assert to_change(page) == ["a.png", "b.png"]
    page.get_by_role("button", name="Remove a.png").click()
    box.fill("make it blue")
    page.keyboard.press("Enter")
    settled(page, 2)
    generate(page, "an owl")
    settled(page, 3)
    first, again, edited, plain = drawings(engine)
    assert (first.prompt, first.n, first.seed) == ("swap the colours", 2, 7)
    assert (first.options.cfg_weight, first.options.cfg_weight2) == (3, 1.5)
    for request in (first, again):
        colours = [image.getpixel((32, 32)) for image in request.images]
        assert colours == [(255, 0, 0), (0, 255, 0)]
    assert again.seed != 7
    assert [image.getpixel((32, 32)) for image in edited.images] == [(0, 255, 0)]
    assert plain.images == ()


def test_a_generated_image_is_changed(page: Page, engine: FakeEngine) -> None:
    generate(page, "an owl", 2, 7)
    exchange = settled(page)
    assert to_change(page) == []  # the last image is for a question, not for a prompt
    exchange.get_by_role("button", name="Change this").first.click()
    box = page.get_by_role("textbox", name="Prompt")
    expect(box).to_be_focused()
    assert to_change(page) == ["an owl, seed 7"]
    box.fill("a blue owl")
    page.keyboard.press("Enter")
    settled(page, 1)
    choose(page, "Ask")
    page.locator("figure .image").last.click()
    page.get_by_role("dialog").get_by_role("button", name="Change this").click()
    assert len(to_change(page)) == 1
    box.fill("a red owl")
    page.keyboard.press("Enter")
    settled(page, 2)
    assert [len(request.images) for request in drawings(engine)] == [0, 1, 1]
    page.evaluate("saving")
    page.reload()
    expect(settled(page, 2).locator(".shown img")).to_have_count(1)
    settled(page, 2).get_by_role("button", name="Again").click()
    settled(page, 3)
    assert len(drawings(engine)[-1].images) == 1
    ask_about = page.get_by_role("button", name="Ask about this").last
    ask_about.click()
    draw(page, "a star")  # a command in a question's place leaves the images to the question
    settled(page, 4)
    assert drawings(engine)[-1].images == ()


def test_a_model_that_changes_no_images_does_not_offer_it(config: Any, visits: Visits) -> None:
    class Pathway:
        def __init__(self, pathway: Any):
            self.options, self.steps = pathway.options, pathway.steps

    class DrawingOnly(FakeEngine):
        @property
        def pathway(self) -> Any:
            return Pathway(super().pathway)

    with served(DrawingOnly(config)) as address:
        page = visits.open(address)
        generate(page, "an owl")
        settled(page)
        change = page.get_by_role("button", name="Change this")
        expect(change).to_have_count(0)
        page.get_by_role("button", name="Enlarge an owl").click()
        expect(page.get_by_role("dialog").get_by_role("button", name="Ask about")).to_be_visible()
        expect(change).to_have_count(0)
        page.keyboard.press("Escape")
        hand_over(page, "paste", [("a.png", "image/png", picture())])
        expect(page.get_by_role("radio", name="Ask")).to_be_checked()


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
        expect(page.get_by_title("The model that answers and generates")).to_have_text("fake")
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
        generate(page, "wide" * 40, 3)
        settled(page)
        fits()
        page.get_by_role("button", name="Enlarge").first.click()
        fits()
        page.keyboard.press("Escape")
        choose(page, "Ask")
        ask(page, "long" * 60)
        settled(page, 1)
        fits()
        page.get_by_role("button", name="Settings").click()
        fits()


def test_images_stand_in_full_rows_and_targets_are_large(
    engine: FakeEngine, visits: Visits
) -> None:
    def columns() -> int:
        return len(
            page.locator(".grid").last.evaluate(
                "(grid) => getComputedStyle(grid).gridTemplateColumns.split(' ')"
            )
        )

    small = """() => [...document.querySelectorAll("button, a, input, textarea, .modes span")]
      .filter((node) => node.checkVisibility() && !node.matches(".unseen, .remove"))
      .filter((node) => {
        const box = node.getBoundingClientRect();
        const letters = parseFloat(getComputedStyle(node).fontSize);
        const field = node.matches("input, textarea");
        return field ? letters < 16 : box.height < 44 || box.width < 44;
      }).map((node) => node.outerHTML)"""
    with served(engine) as address:
        page = visits.open(address)
        generate(page, "an owl", 16, 1)
        settled(page)
        assert columns() == 4
        generate(page, "an owl", 4, 1)
        settled(page, 1)
        assert columns() == 2
        page.set_viewport_size({"width": 375, "height": 700})
        assert columns() == 2
        assert page.evaluate(small) == []
        choose(page, "Ask")
        page.locator("#text").fill("x")
        assert page.evaluate(small) == []
        page.get_by_role("button", name="Settings").click()
        assert page.evaluate(small) == []
        page.keyboard.press("Escape")
        conversations(page)
        assert page.evaluate(small) == []


def test_the_page_is_one_small_file() -> None:
    page = Path(mlx_janus.__file__).parent / "server" / "page.html"
    assert page.stat().st_size < 90_000


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
    expect(page.get_by_role("radio", name="Generate")).to_be_checked()
    page.get_by_role("textbox", name="Prompt").focus()
    page.keyboard.type("an owl")
    page.keyboard.press("Enter")
    settled(page, 1)
    tab_to("Enlarge an owl", "Shift+Tab")
    page.keyboard.press("Enter")
    viewer = page.get_by_role("dialog", name="Image, enlarged")
    expect(viewer).to_be_visible()
    page.keyboard.press("Escape")
    expect(viewer).to_be_hidden()
    tab_to("Again")
    page.keyboard.press("Enter")
    settled(page, 2)
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
        page.get_by_role("dialog").get_by_role("button", name="Change this").click()
        expect(page.locator("#tray li")).to_have_count(1)
        check("light", "dark")
        choose(page, "Generate")
        page.get_by_role("button", name="New conversation").click()  # with a notice
        expect(page.locator("#notice")).to_be_visible()
        conversations(page)
        check("light")
        page.get_by_role("button", name="Delete").click()
        check("dark")
        page.keyboard.press("Escape")
        check("dark")


def test_names_and_roles_are_what_a_screen_reader_needs(page: Page) -> None:
    hand_over(page, "paste", [("a.png", "image/png", picture())])
    expect(page.locator("body")).to_match_aria_snapshot("""
    - banner:
      - button "Conversations"
      - heading "Janus" [level=1]
      - text: fake
      - button "New conversation"
      - button "Settings"
      - button "Use dark colours"
    - main:
      - heading "Ask about an image, or generate one" [level=2]
      - paragraph
      - button "Generate a red fox in fresh snow at sunrise"
    - contentinfo:
      - form "Message":
        - list "Images sent with the next question":
          - listitem:
            - button "Enlarge a.png"
            - button "Remove a.png"
        - textbox "Question"
        - button "Add images"
        - group "What to do":
          - radio "Ask" [checked]
          - radio "Generate"
        - button "Send"
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
    expect(page.get_by_title("The model that answers and generates")).to_have_text("janus-tiny")
    hand_over(page, "drop", [("shapes.png", "image/png", shapes())])
    expect(page.locator("#tray li")).to_have_count(1)
    ask(page, "What colour is the circle?")
    expect(settled(page).locator(".text")).to_have_text(re.compile("blue"))
    ask(page, "What colour is the square?")
    expect(settled(page, 1).locator(".text")).to_have_text(re.compile("red"))


def test_an_example_of_janus_tiny_is_answered(tiny: str, visits: Visits) -> None:
    page = visits.open(tiny)
    page.get_by_role("button", name="What do you see?").click()
    expect(settled(page).locator(".text")).to_have_text(
        re.compile("blue circle.*red square|red square.*blue circle")
    )


def test_what_janus_tiny_draws_is_saved_with_its_settings(
    tiny: str, visits: Visits, tmp_path: Path
) -> None:
    page = visits.open(tiny)
    watch_pictures(page)
    generate(page, "a red circle above a blue square", 2, 7)
    exchange = settled(page)
    assert [look[:5] for look in page.evaluate("looks")].index(
        "blob:"
    ) >= 3  # seen before they were whole
    choose(page, "Ask")
    tray = [image.get_attribute("alt") for image in page.locator("#tray img").all()]
    assert [alt and alt[-6:] for alt in tray] == ["seed 8"]
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
    choose(page, "Ask")
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
