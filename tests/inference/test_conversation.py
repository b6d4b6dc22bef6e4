"""Conversations: prefix reuse, generated images, undo, files, the end of the context."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import mlx_janus
from mlx_janus.decode.logprobs import AnswerToken
from mlx_janus.errors import ConversationError, ImageError, OptionError, OutputError, PromptError
from mlx_janus.inference import text_generation as answering
from mlx_janus.inference.conversation import Conversation, Message, Picture
from mlx_janus.inference.prefix_cache import image_digest
from mlx_janus.models.janus import JanusModel
from mlx_janus.processing.images import to_image
from mlx_janus.processing.prompts import Turn
from mlx_janus.worlds import shapes

Janus = mlx_janus.JanusPipeline


@pytest.fixture(scope="module")
def tiny() -> Janus:
    return mlx_janus.load()


def picture(shape: str, colour: str, x: float = 32, y: float = 32) -> Image.Image:
    thing = shapes.Thing(shape, colour, 24, x, y, 0, shapes.COLOURS[colour])
    return to_image(shapes.pixels(shapes.Scene((thing,))))


RED, BLUE = picture("circle", "red"), picture("square", "blue")
COLOUR = "What colour is the circle?"


def test_a_turn_reads_its_own_tokens_only(tiny: Janus, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    hidden_states = JanusModel.hidden_states

    def counting(self: JanusModel, embeddings: Any, cache: Any = None) -> Any:
        read.append(embeddings.shape[1])
        return hidden_states(self, embeddings, cache)

    talk = tiny.conversation()
    first = talk.send(COLOUR, RED)
    assert first.cached_tokens == 0
    monkeypatch.setattr(JanusModel, "hidden_states", counting)
    question = "Where is the red circle?"
    second = talk.send(question)
    new = [tiny.prompts.special.eos, *tiny.prompts.following(Turn("user", question))]
    assert second.cached_tokens == first.prompt_tokens + len(first.tokens)
    assert second.prompt_tokens - second.cached_tokens == len(new)
    assert sum(read) <= len(new) + len(second.tokens) + 1
    assert talk.context_used == second.prompt_tokens + len(second.tokens)


def test_a_turn_that_fails_amid_a_pass_leaves_nothing_half_read(
    tiny: Janus, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = type(tiny.model.language_model.layers[2])
    call, calls = block.__call__, 0

    def interrupted(self: Any, *arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return call(self, *arguments, **named)

    talk, other = tiny.conversation(), tiny.conversation()
    for each in (talk, other):
        each.send(COLOUR, RED)
    monkeypatch.setattr(block, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        talk.send("Describe the picture.")
    monkeypatch.undo()
    assert talk.context_used == 0
    assert talk.send("Describe the picture.").tokens == other.send("Describe the picture.").tokens


def test_answers_are_those_of_reading_everything_anew(tiny: Janus) -> None:
    talk = tiny.conversation()
    turns: list[Turn] = []
    shown: list[Image.Image] = []
    for text, images in [
        (COLOUR, [RED]),
        ("How many shapes are there?", []),
        ("What shape is blue?", [BLUE, RED]),
    ]:
        turns.append(Turn("user", text, len(images)))
        shown += images
        options = answering.text_options(seed=0)
        said = "".join(
            chunk.text for chunk in tiny.stream_turns(turns, shown, options=options, system=None)
        )
        assert talk.send(text, images).text == said
        turns.append(Turn("assistant", said))


def test_a_picture_is_encoded_once(tiny: Janus, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []
    understand = JanusModel.understand
    monkeypatch.setattr(
        JanusModel, "understand", lambda self, x: (encoded.append(len(x)), understand(self, x))[1]
    )
    talk = tiny.conversation()
    talk.send(COLOUR, RED)
    talk.send("What colour is the square?", [BLUE, RED.copy()])
    talk.undo()
    talk.send("What shape is blue?", BLUE)
    assert encoded == [1, 1]


def test_the_digest_is_of_the_size_and_all_pixels() -> None:
    """Names of saved images contain it, so it stays what it was."""
    noise = np.random.default_rng(0).integers(0, 256, (600, 40, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    expected = hashlib.sha256(b"(40, 600)" + image.tobytes()).hexdigest()
    assert Picture(image).digest == image_digest(image) == expected


def test_what_was_drawn_can_be_asked_about(tiny: Janus) -> None:
    talk = tiny.conversation()
    drawn = talk.draw("a red circle", seed=1)
    again = tiny.generate_images("a red circle", seed=1)
    np.testing.assert_array_equal(drawn[0].tokens, again[0].tokens)
    assert talk.send(COLOUR).text == "red"
    talk.draw("a blue square", seed=1)
    assert talk.send("What colour is the square?").text == "blue"
    assert [m.role for m in talk.messages] == ["drawing", "user", "assistant"] * 2
    assert [len(m.pictures) for m in talk.messages if m.role == "user"] == [1, 1]


ORDERED = "one: {image} two: {image} What is in the picture?"


def test_each_image_stands_at_its_mark(tiny: Janus) -> None:
    """Janus-Tiny describes the first image."""
    red, blue = "a red circle in the middle", "a blue square in the middle"
    for images, text in (([RED, BLUE], red), ([BLUE, RED], blue), ([BLUE, BLUE], blue)):
        result = tiny.generate_text(ORDERED, images)
        talk = tiny.conversation()
        assert result.text == text
        assert talk.send(ORDERED, images).tokens == result.tokens
        assert "".join(chunk.text for chunk in talk.regenerate()) == text
        turn = Turn("user", "one:  two:  What is in the picture?", 2, (5, 11))
        stream = tiny.stream_turns([turn], images, options=answering.text_options())
        assert answering.last_result(stream).tokens == result.tokens


def test_marks_of_later_questions_and_of_generated_images(tiny: Janus, tmp_path: Path) -> None:
    talk = tiny.conversation()
    talk.send(COLOUR, RED)
    (drawn,) = talk.draw("a blue square", seed=1)
    with pytest.raises(PromptError, match=r"1 \{image\} mark and 2 images"):
        talk.stream("Is it {image}?", RED)
    second = talk.send("{image} or {image}?", RED)
    turns = [
        Turn("user", COLOUR, 1),
        Turn("assistant", talk.messages[1].text),
        Turn("user", " or ?", 2, (0, 4)),
    ]
    images = [RED, drawn.image, RED]
    stream = tiny.stream_turns(turns, images, options=answering.text_options())
    assert answering.last_result(stream).tokens == second.tokens
    assert second.cached_tokens > 64
    again = tiny.conversation()
    again.load(talk.save(tmp_path / "talk.json"))
    assert [message.marked for message in again.messages] == [False] * 3 + [True, False]
    third = [each.send("How many shapes are there?") for each in (talk, again)]
    assert third[0].tokens == third[1].tokens
    assert third[0].prompt_tokens == third[1].prompt_tokens


def test_a_mark_in_a_conversation_saved_without_places_is_text(tiny: Janus, tmp_path: Path) -> None:
    talk = tiny.conversation()
    talk.messages = [
        Message("user", "What is {image} here, {image}?", (Picture(RED),)),
        Message("assistant", "a red circle"),
    ]
    other = tiny.conversation()
    other.load(talk.save(tmp_path / "talk.json"))
    assert other.send(COLOUR).tokens == talk.send(COLOUR).tokens
    assert "{image}" in other.messages[0].text


def test_the_same_prefix_is_read_once_and_another_order_is_not(tiny: Janus) -> None:
    talk = tiny.conversation()
    first = talk.send(ORDERED, [RED, BLUE])
    for images, cached in (([RED, BLUE], first.prompt_tokens - 1), ([RED, RED], None)):
        talk.undo()
        result = talk.send(ORDERED, images)
        fresh = tiny.conversation().send(ORDERED, images)
        assert result.tokens == fresh.tokens
        if cached is not None:
            assert result.cached_tokens == cached
        else:  # up to the second image
            assert 64 < result.cached_tokens < first.prompt_tokens - 64
    talk.undo()
    other = talk.send(ORDERED, [BLUE, RED])
    assert other.cached_tokens < first.prompt_tokens - 2 * 64
    assert other.text == "a blue square in the middle"


def test_undo_regenerate_and_reset(tiny: Janus) -> None:
    talk = tiny.conversation()
    with pytest.raises(ConversationError, match="nothing was asked"):
        talk.undo()
    with pytest.raises(ConversationError, match="nothing was asked"):
        talk.regenerate()
    first = talk.send(COLOUR, RED)
    second = talk.send("What shape is red?")
    *_, last = talk.regenerate()
    assert last.result is not None
    assert last.result.tokens == second.tokens
    assert (
        last.result.prompt_tokens - last.result.cached_tokens == 1
    )  # all but the last token was read before
    assert len(talk.messages) == 4
    assert talk.undo().text == "What shape is red?"
    assert talk.send("What shape is red?").tokens == second.tokens
    talk.draw("a star", seed=0)
    assert talk.undo().role == "drawing"
    talk.reset()
    assert talk.messages == []
    assert talk.send(COLOUR, RED).tokens == first.tokens


def test_a_stopped_answer_leaves_the_conversation_as_it_was(tiny: Janus) -> None:
    talk, whole = tiny.conversation(), tiny.conversation()
    for one in (talk, whole):
        one.send(COLOUR, RED)
    stream = talk.stream("Describe the picture.")
    next(stream)
    with pytest.raises(ConversationError, match="still being given"):
        next(talk.stream("What?"))
    stream.close()
    assert len(talk.messages) == 2
    with pytest.raises(OptionError, match="prompt must be text"):
        talk.stream_drawing(["a star", "a square"])  # type: ignore[arg-type]
    steps = talk.stream_drawing("a star", seed=0)
    next(steps)
    steps.close()  # type: ignore[attr-defined]
    assert len(talk.messages) == 2
    assert talk.send("Describe the picture.").tokens == whole.send("Describe the picture.").tokens


# Several actions at once


def roles(talk: mlx_janus.Conversation) -> str:
    """The first letters of the messages' roles."""
    return "".join(message.role[0] for message in talk.messages)


def test_an_image_generated_during_an_answer_follows_it(tiny: Janus) -> None:
    talk, other = tiny.conversation(), tiny.conversation()
    answer = talk.stream(COLOUR, RED)  # before the drawing, which it does not show
    talk.draw("a star", seed=0)
    text = next(answer).text
    drawn = talk.draw("a blue square", seed=1)[0]
    text += "".join(chunk.text for chunk in answer)
    assert text == other.send(COLOUR, RED).text
    assert roles(talk) == "uadd"
    assert talk.send("What colour is the square?").text == "blue"
    assert len(talk.messages[-2].pictures) == 2
    assert talk.messages[-2].pictures[1].image == drawn.image


def test_images_that_end_in_the_midst_of_an_answer_are_kept(tiny: Janus) -> None:
    talk = tiny.conversation()
    steps = talk.stream_drawing("a blue square", seed=1)
    next(steps)
    answer = talk.stream(COLOUR, RED)
    next(answer)
    list(steps)
    list(answer)
    assert roles(talk) == "uad"
    assert talk.undo().role == "drawing"


def test_another_answer_keeps_the_images_generated_since(tiny: Janus) -> None:
    talk = tiny.conversation()
    first = talk.send(COLOUR, RED)
    drawing = talk.draw("a blue square", seed=1)[0]
    answer = talk.regenerate()
    next(answer)
    talk.draw("a star", seed=0)
    *_, last = answer
    assert last.result is not None
    assert last.result.tokens == first.tokens
    assert roles(talk) == "uadd"
    assert talk.messages[2].pictures[0].image == drawing.image
    assert talk.send("What colour is the square?").text == "blue"


def test_what_contradicts_an_answer_under_way_is_refused(tiny: Janus, tmp_path: Path) -> None:
    talk = tiny.conversation()
    talk.send(COLOUR, RED)
    path = talk.save(tmp_path / "talk.json")
    answer = talk.stream("Describe the picture.")
    next(answer)
    for change in (talk.undo, talk.reset, lambda: talk.load(path), lambda: next(talk.regenerate())):
        with pytest.raises(ConversationError, match="still being given: read it to its end"):
            change()
    talk.save(path)
    list(answer)
    assert roles(talk) == "uaua"
    assert talk.undo().text == "Describe the picture."


def test_what_contradicts_a_drawing_under_way_is_refused(tiny: Janus, tmp_path: Path) -> None:
    talk = tiny.conversation()
    talk.send(COLOUR, RED)
    path = talk.save(tmp_path / "talk.json")
    steps = talk.stream_drawing("a star", seed=0)
    next(steps)
    for change in (talk.reset, lambda: talk.load(path)):
        with pytest.raises(ConversationError, match="still being generated: read the steps"):
            change()
    talk.undo()
    list(steps)
    assert roles(talk) == "d"


@pytest.mark.parametrize("end", ["closed", "dropped", "failed"])
def test_after_an_action_that_was_stopped_everything_is_allowed_at_once(
    tiny: Janus, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = tiny.conversation()
    talk.send(COLOUR, RED)
    streams = [talk.stream("Describe the picture."), talk.stream_drawing("a star", window=1)]
    for stream in streams:
        next(stream)  # type: ignore[call-overload]
    if end == "failed":
        with monkeypatch.context() as patch:
            patch.setattr(JanusModel, "hidden_states", None)
            for stream in streams:
                with pytest.raises(TypeError):
                    list(stream)
    if end == "closed":
        for stream in streams:
            stream.close()
    del stream
    streams.clear()
    talk.undo()
    talk.reset()
    assert talk.messages == []


def test_a_question_whose_history_has_changed_is_refused(tiny: Janus) -> None:
    talk = tiny.conversation()
    questions = [talk.stream(COLOUR, RED) for _ in range(2)]
    list(questions[0])
    with pytest.raises(ConversationError, match="has changed since the question: ask it again"):
        list(questions[1])
    again, late = talk.regenerate(), talk.stream("What shape is red?")
    talk.undo()
    for stream in (again, late):
        with pytest.raises(ConversationError, match="has changed since the question"):
            list(stream)
    assert talk.messages == []
    answer = talk.stream(COLOUR, RED)
    next(answer)
    own = [Message("user", "Hello?"), Message("assistant", "Hello!")]
    talk.messages = list(own)
    with pytest.raises(ConversationError, match="has changed since the question"):
        list(answer)
    assert talk.messages == own


def test_a_placeholder_in_an_answer_is_no_picture(
    tiny: Janus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model may say anything, the id that stands for a part of a picture included."""
    talk = tiny.conversation()
    ids = iter([tiny.prompts.special.image, *tiny.prompts.encode(" red"), tiny.prompts.special.eos])
    monkeypatch.setattr(answering, "answer_tokens", lambda *_, **__: (AnswerToken(i) for i in ids))
    assert talk.send(COLOUR, RED).text == "red"
    monkeypatch.undo()
    assert talk.send("What shape is red?").text == "circle"


def test_wrong_arguments_show_at_once(tiny: Janus, tmp_path: Path) -> None:
    talk = tiny.conversation()
    with pytest.raises(OptionError):
        talk.stream("hello", max_tokens=0)
    with pytest.raises(ImageError):
        talk.stream("hello", tmp_path / "none.png")
    with pytest.raises(PromptError, match="empty"):
        talk.stream(" ")
    with pytest.raises(PromptError, match="tokens long"):
        talk.stream("a red circle " * 1000)
    assert talk.messages == []


def test_the_oldest_turns_go_when_the_context_ends(tiny: Janus) -> None:
    talk, context = tiny.conversation(), tiny.config.language.max_position_embeddings
    before, forgotten = 0, []
    for number in range(16):
        result = talk.send(f"What colour is the circle? {number}", RED if number % 2 else BLUE)
        assert result.prompt_tokens < context
        assert talk.forgotten >= before
        before = talk.forgotten
        forgotten.append(before)
    assert forgotten[-1] > 0
    assert (
        len(set(forgotten)) < 5
    )  # some room is made at once, so that most turns cost their own tokens only
    fresh = tiny.conversation()
    fresh.messages = talk.messages[2 * talk.forgotten : -2]
    assert fresh.send("What colour is the circle? 15", RED).tokens == result.tokens
    assert fresh.forgotten == 0


def test_a_long_loaded_chat_is_laid_out_a_few_times_only(
    tiny: Janus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leaving out one exchange after the other, it would be laid out 700 times."""
    talk = tiny.conversation()
    talk.messages = [Message("user", "What colour is it?"), Message("assistant", "red")] * 750
    lay_out = Conversation._prompt_ids
    calls = []

    def counted(self: Conversation, exchanges: Any, question: Message) -> list[int]:
        calls.append(len(exchanges))
        return lay_out(self, exchanges, question)

    monkeypatch.setattr(Conversation, "_prompt_ids", counted)
    talk.send("And now?", max_tokens=2)
    assert len(calls) < 20
    # No more is left out than needed: with one exchange more it would not fit.
    context = tiny.config.language.max_position_embeddings
    kept = [*zip(talk.messages[:1500:2], talk.messages[1:1500:2], strict=True)]
    question = Message("user", "And now?")
    sizes = [
        len(lay_out(talk, kept[left_out:], question))
        for left_out in (talk.forgotten - 1, talk.forgotten)
    ]
    assert sizes[0] > context - 2 * 2 >= sizes[1]


def test_a_saved_conversation_goes_on_with_the_same_tokens(tiny: Janus, tmp_path: Path) -> None:
    talk = tiny.conversation(system="Be brief.")
    talk.send(COLOUR, RED)
    drawn = talk.draw("a blue square", seed=3)[0]
    path = talk.save(tmp_path / "talk.json")
    talk.save(path)  # its own file is replaced
    assert len(list(tmp_path.iterdir())) == 3
    other = tiny.conversation()
    other.load(path)
    assert other.system == "Be brief."
    assert [(m.role, m.text, m.tokens) for m in other.messages] == [
        (m.role, m.text, m.tokens) for m in talk.messages
    ]
    assert other.messages[-1].pictures[0].metadata == drawn.metadata
    asked = "What colour is the square?", "Where is the blue square?"
    assert [talk.send(text).tokens for text in asked] == [other.send(text).tokens for text in asked]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"format": "x"}, "is no conversation"),
        ({"version": 2}, "is no conversation"),
        ({"messages": 3}, "messages a list"),
        ({"messages": [{"role": "assistant", "text": "hi"}]}, "take turns"),
        ({"messages": [{"role": "system", "text": "hi"}]}, "role"),
        (
            {"messages": [{"role": "user", "text": "hi", "pictures": ["../talk-1.png"]}]},
            "no PNG beside it",
        ),
        (
            {"messages": [{"role": "user", "text": "hi", "pictures": ["/etc/hosts"]}]},
            "no PNG beside it",
        ),
        (
            {"messages": [{"role": "user", "text": "hi", "pictures": ["gone.png"]}]},
            "cannot be read",
        ),
        (
            {"messages": [{"role": "user", "text": "hi", "pictures": ["fake.png"]}]},
            "cannot be read",
        ),
        (
            {
                "messages": [
                    {"role": "user", "text": "a"},
                    {"role": "assistant", "text": "b", "tokens": [-1]},
                ]
            },
            "tokens",
        ),
        (
            {
                "messages": [
                    {"role": "user", "text": "a"},
                    {"role": "assistant", "text": "b", "tokens": [1e9]},
                ]
            },
            "tokens",
        ),
        (
            {
                "messages": [
                    {"role": "user", "text": "a"},
                    {"role": "assistant", "text": "b", "tokens": [421]},
                ]
            },
            "tokens",
        ),
        ({"messages": [{"role": "user", "text": "hi", "marked": 1}]}, "marked"),
        ({"messages": [{"role": "user", "text": "{image}", "marked": True}]}, "for each image"),
        ({"messages": [{"role": "assistant", "text": "b", "marked": True}]}, "for each image"),
    ],
)
def test_files_that_are_no_conversations(
    tiny: Janus, tmp_path: Path, change: dict[str, Any], word: str
) -> None:
    talk = tiny.conversation()
    talk.send(COLOUR, RED)
    path = talk.save(tmp_path / "talk.json")
    (tmp_path / "fake.png").write_text("no picture")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConversationError, match=word):
        talk.load(path)
    assert len(talk.messages) == 2


@pytest.mark.parametrize("side", [9_500, 20_000])  # PIL warns of the first, and refuses the second
def test_an_image_that_says_it_is_huge_is_refused(tiny: Janus, tmp_path: Path, side: int) -> None:
    talk = tiny.conversation()
    path = tmp_path / "talk.json"
    message = {"role": "drawing", "text": "x", "pictures": ["huge.png"]}
    head = {"format": "mlx_janus conversation", "version": 1}
    path.write_text(json.dumps(head | {"messages": [message]}))
    size = struct.pack(">II", side, side) + b"\x08\x02\0\0\0"
    checksum = struct.pack(">I", zlib.crc32(b"IHDR" + size))
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(size))
    (tmp_path / "huge.png").write_bytes(start + b"IHDR" + size + checksum)
    with pytest.raises(ConversationError, match=r"huge\.png, an image of .*, cannot be read"):
        talk.load(path)


def test_a_file_that_cannot_be_read_or_must_not_be_replaced(tiny: Janus, tmp_path: Path) -> None:
    talk = tiny.conversation()
    with pytest.raises(ConversationError, match="check the path"):
        talk.load(tmp_path / "none.json")
    (tmp_path / "other.json").write_bytes(b"\x89PNG")
    with pytest.raises(ConversationError, match=r"not valid JSON.*: give a saved conversation$"):
        talk.load(tmp_path / "other.json")
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(
        ConversationError, match=r"a JSON object, got \[\]: give a saved conversation$"
    ):
        talk.load(tmp_path / "other.json")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(OutputError, match="no conversation"):
        talk.save(tmp_path / "other.json")
    with pytest.raises(OutputError, match="not a folder"):
        talk.save(tmp_path / "no" / "talk.json")
    assert [p.name for p in tmp_path.iterdir()] == ["other.json"]
