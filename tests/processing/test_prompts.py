"""Prompts against the reference's own ids, and the promises that hold for any text and any ids."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from mlx_janus.config import SYSTEM_PROMPT, PromptConfig
from mlx_janus.errors import ConfigError, OptionError, PromptError
from mlx_janus.processing.prompts import IMAGE_MARK, Prompts, Turn, marked_question
from mlx_janus.processing.tokenizer import SpecialIds, prepare_tokenizer
from tests.support.golden import FIXTURES

PRO, JANUS, TRANSFORMERS = "deepseek-pro-bin", "deepseek-janus-safetensors", "transformers"
FOLDERS = (PRO, JANUS, TRANSFORMERS)
IMAGE_TOKENS = 16
PLACEHOLDER = "<image_placeholder>"
CONFIGS = {
    PRO: PromptConfig(),
    JANUS: PromptConfig(user="User", assistant="Assistant"),
    TRANSFORMERS: PromptConfig(),
}
ONE_PICTURE = [Turn("user", "What is in this image?", images=1)]
TWO_PICTURES = [Turn("user", "Which image is brighter?", images=2)]

EVERYTHING = settings(deadline=None, max_examples=200)
# Any text, and text of parts that may break: control spellings, their halves, odd spaces, emoji.
CONTROLS = [
    "<|User|>",
    "<|Assistant|>",
    PLACEHOLDER,
    "<begin_of_image>",
    "<end_of_image>",
    "<｜end▁of▁sentence｜>",
    "<|ref|>",
]
ODD = [
    "<｜▁pad▁｜>",
    "<",
    "|",
    ">",
    "User",
    ": ",
    "\n\n",
    "\r",
    " ",
    "  ",
    "\0",
    "ø",
    "猫",
    "👩‍👩‍👧",
    "é",
    "7",
    "!?",
]
PIECES = st.sampled_from([*CONTROLS, *ODD])
TEXTS = st.one_of(st.text(max_size=40), st.lists(PIECES, max_size=8).map("".join))
WORDS = TEXTS.filter(str.strip)
IDS = st.lists(st.integers(0, 640), max_size=60)


def source(folder: str) -> Tokenizer:
    """The folder's tokenizer with a placeholder, read without our code."""
    tokenizer = Tokenizer.from_file(str(FIXTURES / folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(PLACEHOLDER, normalized=False, special=True)])
    return tokenizer


PROMPTS = {
    name: Prompts(source(name), CONFIGS[name], image_tokens=IMAGE_TOKENS) for name in FOLDERS
}
SOURCES = {name: source(name) for name in FOLDERS}


@pytest.fixture(params=FOLDERS)
def folder(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def prompts(folder: str) -> Prompts:
    return PROMPTS[folder]


class Golden:
    """The reference's outputs; the transformers folder holds the weights of the Pro one."""

    def __init__(self, folder: str) -> None:
        path = FIXTURES / f"{PRO if folder == TRANSFORMERS else folder}.golden.safetensors"
        self.arrays = load_file(path)
        with safe_open(path, "np") as file:
            self.facts: dict[str, str] = file.metadata()

    def ids(self, name: str) -> list[int]:
        return [int(i) for i in self.arrays[name].reshape(-1)]


@pytest.fixture
def golden(folder: str) -> Golden:
    return Golden(folder)


def changed(folder: str, change: Callable[[dict[str, Any]], object]) -> Tokenizer:
    """The folder's tokenizer after ``change`` of its JSON."""
    data = json.loads(SOURCES[folder].to_str())
    change(data)
    return Tokenizer.from_str(json.dumps(data))


def whole(folder: str, rendered: str) -> list[int]:
    """Encode as the reference does: the whole rendered string, then bos, then images expanded."""
    tokenizer = SOURCES[folder]
    picture = f"<begin_of_image>{PLACEHOLDER * IMAGE_TOKENS}<end_of_image>"
    expanded = tokenizer.encode(picture, add_special_tokens=False).ids
    ids = tokenizer.encode("<｜begin▁of▁sentence｜>", add_special_tokens=False).ids
    for i in tokenizer.encode(rendered, add_special_tokens=False).ids:
        ids += expanded if i == tokenizer.token_to_id(PLACEHOLDER) else [i]
    return ids


class TestGolden:
    def test_special_ids(self, prompts: Prompts, golden: Golden) -> None:
        expected = json.loads(golden.facts["token_ids"])
        ours = prompts.special
        assert ours == SpecialIds(
            expected["bos"],
            expected["eos"],
            expected["pad"],
            expected["boi"],
            expected["eoi"],
            expected["image"],
        )

    def test_answering(self, prompts: Prompts, golden: Golden) -> None:
        assert prompts.answering(ONE_PICTURE) == golden.ids("und.input_ids")
        assert [prompts.render_answering(ONE_PICTURE)] == json.loads(golden.facts["und.sft_format"])

    def test_batch(self, prompts: Prompts, golden: Golden) -> None:
        rows, masks = golden.arrays["batch.input_ids"], golden.arrays["batch.attention_mask"]
        for turns, row, mask in zip((TWO_PICTURES, ONE_PICTURE), rows, masks, strict=True):
            assert prompts.answering(turns) == row[mask.astype(bool)].tolist()
        rendered = [prompts.render_answering(turns) for turns in (TWO_PICTURES, ONE_PICTURE)]
        assert rendered == json.loads(golden.facts["batch.sft_format"])

    def test_drawing(self, prompts: Prompts, golden: Golden) -> None:
        rendered = golden.facts["gen.prompt"]
        text = rendered.removeprefix(f"{prompts.config.user}: ").partition("\n\n")[0]
        ids = prompts.drawing(text)
        assert prompts.render_drawing(text) == rendered
        assert ids == golden.ids("gen.input_ids")
        assert [ids, prompts.unconditional(ids)] == golden.arrays["gen.tokens"].tolist()

    def test_bare_text(self, prompts: Prompts, golden: Golden) -> None:
        ids = prompts.encode("The quick brown fox jumps over the lazy dog.")
        assert [prompts.special.bos, *ids] == golden.ids("text.input_ids")

    def test_decode(self, prompts: Prompts, golden: Golden) -> None:
        for name in ("und", "batch"):
            texts = json.loads(golden.facts[f"{name}.greedy_text"])
            for row, text in zip(golden.arrays[f"{name}.greedy_tokens"], texts, strict=True):
                assert prompts.decode(row) == text
                assert stream(prompts, row) == text


class TestTemplate:
    def test_turns_end_with_separator_then_eos(self, prompts: Prompts, folder: str) -> None:
        turns = [
            Turn("user", " Hi \n"),
            Turn("assistant", " Hello. "),
            Turn("user", "What is it?", images=1),
        ]
        user, assistant = prompts.config.user, prompts.config.assistant
        rendered = (
            f"{SYSTEM_PROMPT}\n\n{user}: Hi\n\n{assistant}: Hello.<｜end▁of▁sentence｜>"
            f"{user}: <image_placeholder>\nWhat is it?\n\n{assistant}:"
        )
        assert prompts.render_answering(turns) == rendered
        ids = prompts.answering(turns)
        assert ids == whole(folder, rendered)
        assert ids.count(prompts.special.bos) == 1
        assert ids.count(prompts.special.eos) == 1
        assert ids.count(prompts.special.image) == IMAGE_TOKENS

    @pytest.mark.parametrize("images", [1, 2])
    @pytest.mark.parametrize(
        "words", ["", " \n", "  What?", "\n- one\n- two", "\n\tA\n", "\u3000b"]
    )
    def test_an_image_keeps_the_white_space_before_words(
        self, prompts: Prompts, folder: str, images: int, words: str
    ) -> None:
        """DeepSeek's code strips the whole message, which begins with the image."""
        user, assistant = prompts.config.user, prompts.config.assistant
        message = (f"{PLACEHOLDER}\n" * images + words).strip()
        rendered = f"{SYSTEM_PROMPT}\n\n{user}: {message}\n\n{assistant}:"
        turns = [Turn("user", words, images)]
        assert prompts.render_answering(turns) == rendered
        assert prompts.answering(turns) == whole(folder, rendered)
        assert prompts.answering(turns)[-len(prompts.following(turns[0])) :] == prompts.following(
            turns[0]
        )

    def test_history_is_a_prefix(self, prompts: Prompts) -> None:
        """What a conversation's cache relies on: more turns change nothing before them."""
        first = [Turn("user", "Hi")]
        more = [*first, Turn("assistant", "Hello."), Turn("user", "And?")]
        assert prompts.answering(more)[: len(prompts.answering(first))] == prompts.answering(first)

    def test_empty_answer_in_history(self, prompts: Prompts, folder: str) -> None:
        turns = [Turn("user", "Hi"), Turn("assistant", " "), Turn("user", "And?")]
        user, assistant = prompts.config.user, prompts.config.assistant
        rendered = f"{user}: Hi\n\n{assistant}:<｜end▁of▁sentence｜>{user}: And?\n\n{assistant}:"
        assert prompts.render_answering(turns, system="") == rendered
        assert prompts.answering(turns, system="") == whole(folder, rendered)

    @pytest.mark.parametrize(
        ("system", "start"), [("", ""), ("  \n", ""), ("  Be brief. ", "Be brief. \n\n")]
    )
    def test_system(self, prompts: Prompts, folder: str, system: str, start: str) -> None:
        rendered = prompts.render_answering(ONE_PICTURE, system=system)
        assert rendered.startswith(f"{start}{prompts.config.user}: ")
        assert prompts.answering(ONE_PICTURE, system=system) == whole(folder, rendered)

    def test_system_none_is_the_models_own(self) -> None:
        prompts = Prompts(SOURCES[PRO], PromptConfig(system="Be kind."), image_tokens=1)
        assert prompts.render_answering(ONE_PICTURE).startswith("Be kind.\n\n<|User|>: ")

    def test_image_tokens(self) -> None:
        prompts = Prompts(SOURCES[PRO], CONFIGS[PRO], image_tokens=576)
        assert prompts.answering(TWO_PICTURES).count(prompts.special.image) == 2 * 576

    def test_unconditional_keeps_first_and_last(self, prompts: Prompts) -> None:
        pad = prompts.special.pad
        assert prompts.unconditional([1, 2, 3, 4]) == [1, pad, pad, 4]
        assert prompts.unconditional([1, 2]) == [1, 2]
        assert prompts.unconditional([1]) == [1]

    @pytest.mark.parametrize("text", ["", " \n\t"])
    def test_empty_is_refused(self, prompts: Prompts, text: str) -> None:
        with pytest.raises(PromptError, match="empty"):
            prompts.drawing(text)
        with pytest.raises(PromptError, match="empty"):
            prompts.answering([Turn("user", text)])

    def test_pictures_need_no_words(self, prompts: Prompts) -> None:
        ids = prompts.answering([Turn("user", " ", images=1)])
        assert ids.count(prompts.special.image) == prompts.image_tokens
        assert prompts.render_answering([Turn("user", "", 1)]).count(prompts.config.user) == 1

    @pytest.mark.parametrize("turns", [[], [Turn("assistant", "Hello.")]])
    def test_there_must_be_a_question(self, prompts: Prompts, turns: list[Turn]) -> None:
        with pytest.raises(PromptError, match="there is no question"):
            prompts.answering(turns)

    def test_an_answer_at_the_end_is_left_open(self, prompts: Prompts) -> None:
        question = Turn("user", "Hi")
        ids = prompts.answering([question])
        begun = prompts.answering([question, Turn("assistant", "Hello, and ")])
        assert begun == ids + prompts.encode(" Hello, and")
        assert prompts.answering([question, Turn("assistant", " ")]) == ids
        finished = prompts.answering([question, Turn("assistant", "Hello, and "), question])
        assert finished[: len(begun)] == begun
        assert finished[len(begun)] == prompts.special.eos

    @pytest.mark.parametrize(
        ("role", "images"),
        [("system", 0), ("<|User|>", 0), ("user", -1), ("assistant", 1), ("assistant", -1)],
    )
    def test_turn_is_checked(self, role: Any, images: int) -> None:
        with pytest.raises(OptionError, match="must be"):
            Turn(role, "Hi", images)

    def test_image_tokens_are_checked(self) -> None:
        with pytest.raises(OptionError, match="image_tokens must be 1 or more, got 0"):
            Prompts(SOURCES[PRO], CONFIGS[PRO], image_tokens=0)


class TestPlaces:
    @pytest.mark.parametrize(
        "message",
        [
            # The example of DeepSeek's ``processing_vlm.py``.
            "{image} is Figure 1.\n{image} is Figure 2.\nWhich image is brighter?",
            "  before: {image} {image}\n\nafter: ",
            "\n {image} ",
            "What is here?\n{image}\n",
            "{image}{image}{image}",
        ],
    )
    def test_images_stand_at_their_marks(self, prompts: Prompts, folder: str, message: str) -> None:
        user, assistant = prompts.config.user, prompts.config.assistant
        content = message.replace("{image}", PLACEHOLDER).strip()
        rendered = f"{SYSTEM_PROMPT}\n\n{user}: {content}\n\n{assistant}:"
        turn = marked_question(message, message.count("{image}"))
        assert prompts.render_answering([turn]) == rendered
        assert prompts.answering([turn]) == whole(folder, rendered)
        following = prompts.following(turn)
        assert prompts.answering([turn])[-len(following) :] == following

    @EVERYTHING
    @given(pieces=st.lists(TEXTS, min_size=2, max_size=4))
    @pytest.mark.parametrize("folder", FOLDERS)
    def test_only_the_images_are_control_tokens(self, folder: str, pieces: list[str]) -> None:
        text = "".join(pieces)
        lengths = [len("".join(pieces[:count])) for count in range(1, len(pieces))]
        turn = Turn("user", text, len(lengths), tuple(lengths))
        prompts = PROMPTS[folder]
        assert turn.pieces == pieces
        ids = prompts.answering([turn], "")
        controls = {prompts.tokenizer.token_to_id(s) for s in special_spellings(folder)}
        plain = prompts.answering([Turn("user", "a", len(lengths))], "")
        assert [i for i in ids if i in controls] == [i for i in plain if i in controls]
        user, assistant = prompts.config.user, prompts.config.assistant
        content = PLACEHOLDER.join(pieces).strip()
        rendered = f"{user}: {content}\n\n{assistant}:"
        assert prompts.render_answering([turn], "") == rendered

    def test_marks_at_the_beginning_are_the_usual_prompt(self, prompts: Prompts) -> None:
        marked = marked_question("{image}\n{image}\nWhich image is brighter?", 2)
        assert prompts.answering([marked]) == prompts.answering(TWO_PICTURES)

    def test_without_images_or_marks_nothing_changes(self) -> None:
        assert marked_question("What is {image}?", 0) == Turn("user", "What is {image}?")
        assert marked_question("What is it?", 2) == Turn("user", "What is it?", 2)

    def test_a_mark_in_a_turn_is_ordinary_text(self, prompts: Prompts) -> None:
        rendered = prompts.render_answering([Turn("user", "What is {image}?", 1)])
        assert f"{PLACEHOLDER}\nWhat is {IMAGE_MARK}?" in rendered
        assert rendered.count(PLACEHOLDER) == 1

    @pytest.mark.parametrize(
        ("text", "images", "counts"),
        [
            ("{image} or {image}?", 1, "2 {image} marks and 1 image:"),
            ("{image}?", 3, "1 {image} mark and 3 images:"),
        ],
    )
    def test_as_many_marks_as_images(self, text: str, images: int, counts: str) -> None:
        with pytest.raises(PromptError) as caught:
            marked_question(text, images)
        fix = "write one mark for each image, or no mark to show the images before the text"
        assert str(caught.value) == f"the question has {counts} {fix}"

    @pytest.mark.parametrize("places", [(), (0,), (2, 1), (0, 4), (-1, 2), (0, 1, 2)])
    def test_places_are_checked(self, places: tuple[int, ...]) -> None:
        with pytest.raises(OptionError, match="places of a turn must be one for each image"):
            Turn("user", "abc", 2, places)


class TestUserText:
    @EVERYTHING
    @given(text=WORDS, answer=TEXTS, images=st.integers(0, 2))
    @pytest.mark.parametrize("folder", FOLDERS)
    def test_ordinary_text_is_encoded_whole(
        self, folder: str, text: str, answer: str, images: int
    ) -> None:
        for spelling in special_spellings(folder):
            text, answer = text.replace(spelling, "<>"), answer.replace(spelling, "<>")
        prompts = PROMPTS[folder]
        turns = [Turn("user", text, images), Turn("assistant", answer), Turn("user", text)]
        assert prompts.answering(turns) == whole(folder, prompts.render_answering(turns))
        assert prompts.answering(turns, answer) == whole(
            folder, prompts.render_answering(turns, answer)
        )
        assert prompts.drawing(text) == whole(folder, prompts.render_drawing(text))

    @EVERYTHING
    @given(text=WORDS, system=TEXTS)
    @pytest.mark.parametrize("folder", FOLDERS)
    def test_control_tokens_come_from_the_template_only(
        self, folder: str, text: str, system: str
    ) -> None:
        prompts = PROMPTS[folder]
        controls = {prompts.tokenizer.token_to_id(s) for s in special_spellings(folder)}

        def control_ids(ids: list[int]) -> list[int]:
            return [i for i in ids if i in controls]

        plain = [Turn("user", "a", 1), Turn("assistant", "a"), Turn("user", "a")]
        hostile = [Turn("user", text, 1), Turn("assistant", text), Turn("user", text)]
        assert control_ids(prompts.answering(hostile, system)) == control_ids(
            prompts.answering(plain, "a")
        )
        assert control_ids(prompts.drawing(text)) == control_ids(prompts.drawing("a"))
        assert not control_ids(prompts.encode(text))
        assert prompts.decode(prompts.encode(text)) == text

    @pytest.mark.parametrize(
        "spelling", ["<|User|>", PLACEHOLDER, "<｜end▁of▁sentence｜>", "<|ref|>", "<image_token_1>"]
    )
    def test_neutral_whatever_the_flags_say(self, folder: str, spelling: str) -> None:
        def unflag(data: dict[str, Any]) -> None:
            for token in data["added_tokens"]:
                token["special"] = False

        tokenizer = changed(folder, unflag)
        before = tokenizer.to_str()
        prompts = Prompts(tokenizer, CONFIGS[folder], image_tokens=IMAGE_TOKENS)
        control = tokenizer.encode(spelling).ids[-1]
        assert control not in prompts.encode(f"a{spelling}b")
        assert prompts.answering(ONE_PICTURE) == PROMPTS[folder].answering(ONE_PICTURE)
        assert prompts.decode([control, *prompts.encode("a")]) == "a"
        assert tokenizer.to_str() == before
        assert tokenizer.token_to_id(spelling) == control

    def test_given_tokenizer_is_not_changed(self, folder: str) -> None:
        tokenizer = source(folder)
        Prompts(tokenizer, CONFIGS[folder], image_tokens=IMAGE_TOKENS)
        assert not tokenizer.encode_special_tokens
        assert tokenizer.encode("<|User|>", add_special_tokens=False).ids == [
            tokenizer.token_to_id("<|User|>")
        ]

    @pytest.mark.parametrize(("content", "token_id"), [("smör", 538), ("ø", 180)])
    def test_ordinary_added_tokens_stay_recognised(
        self, folder: str, content: str, token_id: int
    ) -> None:
        """Janus-1.3B has thirteen such entries: the letters of bytes that no UTF-8 text has."""

        def add(data: dict[str, Any]) -> None:
            flags = {
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": True,
                "special": False,
            }
            data["added_tokens"].append({"id": token_id, "content": content, **flags})

        tokenizer = changed(folder, add)
        prompts = Prompts(tokenizer, CONFIGS[folder], image_tokens=IMAGE_TOKENS)
        text = f"{content}gås, {content} <x>"
        assert prompts.encode(text) == tokenizer.encode(text, add_special_tokens=False).ids
        assert prompts.encode(text).count(token_id) == 2
        rendered = prompts.render_drawing(text)
        assert prompts.drawing(text)[1:] == tokenizer.encode(rendered, add_special_tokens=False).ids
        assert (
            prompts.decode([token_id])
            == stream(prompts, [token_id])
            == tokenizer.decode([token_id])
        )

    def test_truncation_and_padding_of_the_file_are_ignored(self, folder: str) -> None:
        tokenizer = source(folder)
        tokenizer.enable_truncation(4)
        tokenizer.enable_padding(length=200)
        prompts = Prompts(tokenizer, CONFIGS[folder], image_tokens=IMAGE_TOKENS)
        assert prompts.answering(ONE_PICTURE) == PROMPTS[folder].answering(ONE_PICTURE)
        assert tokenizer.truncation is not None

    @pytest.mark.parametrize("text", ["\ud800", "a\udc80b", "\udfff\ud800"])
    def test_surrogates_are_refused(self, prompts: Prompts, text: str) -> None:
        with pytest.raises(PromptError, match="not Unicode text"):
            prompts.drawing(text)
        with pytest.raises(PromptError, match="not Unicode text"):
            prompts.answering([Turn("user", text)])
        with pytest.raises(PromptError, match="not Unicode text") as caught:
            prompts.answering(ONE_PICTURE, system=text)
        str(caught.value).encode()

    @pytest.mark.parametrize(
        "text", ["a\0b", "\ufeff猫", "\U0010ffff", "e\u0301 👩‍👩‍👧‍👦", "x" * 5000]
    )
    def test_odd_text_comes_back(self, prompts: Prompts, text: str) -> None:
        assert prompts.decode(prompts.encode(text)) == text


def special_spellings(folder: str) -> list[str]:
    return [t.content for t in SOURCES[folder].get_added_tokens_decoder().values()]


def stream(prompts: Prompts, ids: Any) -> str:
    detokenizer = prompts.detokenizer()
    return "".join([*(detokenizer.add(i) for i in ids), detokenizer.finish()])


class TestDetokenizer:
    @EVERYTHING
    @given(ids=IDS)
    @pytest.mark.parametrize("folder", FOLDERS)
    def test_pieces_are_the_whole(self, folder: str, ids: list[int]) -> None:
        prompts = PROMPTS[folder]
        expected = prompts.tokenizer.decode(ids, skip_special_tokens=True)
        assert prompts.decode(ids) == stream(prompts, ids) == expected

    @EVERYTHING
    @given(text=TEXTS)
    def test_characters_are_never_split(self, text: str) -> None:
        prompts = PROMPTS[PRO]
        detokenizer = prompts.detokenizer()
        seen = ""
        for i in prompts.encode(text):
            seen += detokenizer.add(i)
            assert text.startswith(seen)
        assert seen == text
        assert detokenizer.finish() == ""

    def test_bytes_one_by_one(self, prompts: Prompts) -> None:
        """Every byte sequence that matters: each pair of lead and follower, valid or not."""
        vocabulary = prompts.tokenizer.get_vocab()
        ids = [vocabulary[c] for c in byte_characters()]
        for lead in [*range(0x70, 0x100, 5), 0xC0, 0xC2, 0xE0, 0xED, 0xEF, 0xF0, 0xF4, 0xF5, 0xFF]:
            for follower in range(0x00, 0x100, 3):
                row = [ids[lead], ids[follower], ids[0x80], ids[lead]]
                assert stream(prompts, row) == prompts.decode(row)
                assert prompts.decode(row) == bytes([lead, follower, 0x80, lead]).decode(
                    errors="replace"
                )

    def test_incomplete_end(self, prompts: Prompts) -> None:
        ids = prompts.encode("👍")
        assert len(ids) == 4
        detokenizer = prompts.detokenizer()
        assert [detokenizer.add(i) for i in ids[:3]] == ["", "", ""]
        assert detokenizer.finish() == "\ufffd"
        assert [detokenizer.add(i) for i in ids] == ["", "", "", "👍"]  # usable again after finish
        assert detokenizer.finish() == ""

    def test_special_and_unknown_ids_give_nothing(self, prompts: Prompts) -> None:
        ids = [
            prompts.special.bos,
            prompts.special.eos,
            prompts.special.image,
            600,
            639,
            102399,
            2**32 - 1,
        ]
        assert stream(prompts, ids) == prompts.decode(ids) == ""

    def test_special_id_inside_a_character(self, prompts: Prompts) -> None:
        ids = prompts.encode("👍")
        ids.insert(2, prompts.special.image)
        assert stream(prompts, ids) == prompts.decode(ids) == "👍"


def byte_characters() -> list[str]:
    """Return tokenizers' byte-level alphabet: the character of the vocabulary for each byte."""
    printable = [b for b in range(256) if chr(b) in set(ByteLevel.alphabet())]
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


class TestPrepare:
    def test_placeholder_is_added(self) -> None:
        text = prepare_tokenizer(FIXTURES / JANUS / "tokenizer.json", CONFIGS[JANUS])
        tokenizer = Tokenizer.from_str(text)
        assert tokenizer.token_to_id(PLACEHOLDER) == 537
        assert tokenizer.get_added_tokens_decoder()[537].special

    def test_deterministic_and_idempotent(self, folder: str, tmp_path: Path) -> None:
        texts = {
            prepare_tokenizer(FIXTURES / folder / "tokenizer.json", CONFIGS[folder])
            for _ in range(3)
        }
        assert len(texts) == 1
        path = tmp_path / "tokenizer.json"
        path.write_text(texts.pop(), encoding="utf-8")
        assert prepare_tokenizer(path, CONFIGS[folder]) == path.read_text(encoding="utf-8")
        assert json.loads(path.read_text(encoding="utf-8"))["version"] == "1.0"

    def test_converted_folder_loads(self, folder: str, tmp_path: Path) -> None:
        text = prepare_tokenizer(FIXTURES / folder / "tokenizer.json", CONFIGS[folder])
        (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
        prompts = Prompts.load(tmp_path, CONFIGS[folder], image_tokens=IMAGE_TOKENS)
        assert prompts.special == PROMPTS[folder].special
        assert prompts.answering(TWO_PICTURES) == PROMPTS[folder].answering(TWO_PICTURES)

    def test_control_tokens_become_special(self, tmp_path: Path) -> None:
        def unflag(data: dict[str, Any]) -> None:
            for token in data["added_tokens"]:
                token["special"] = False
            data["truncation"] = {
                "direction": "Right",
                "max_length": 4,
                "strategy": "LongestFirst",
                "stride": 0,
            }

        path = tmp_path / "tokenizer.json"
        path.write_text(changed(PRO, unflag).to_str(), encoding="utf-8")
        prepared = json.loads(prepare_tokenizer(path, CONFIGS[PRO]))
        assert prepared == json.loads(SOURCES[PRO].to_str())

    def test_role_words_are_no_control_tokens(self) -> None:
        """Janus-1.3B's roles are entries of the vocabulary and stay ordinary words."""
        prompts = PROMPTS[JANUS]
        word = prompts.tokenizer.token_to_id("User")
        assert word in prompts.answering(ONE_PICTURE)
        assert prompts.encode("User") == [word]
        assert prompts.decode([word]) == "User"

    @pytest.mark.parametrize("field", ["bos", "eos", "pad", "image_start", "image_end"])
    def test_other_control_tokens_must_be_there(self, field: str) -> None:
        config = PromptConfig(**{field: "<absent>"})
        with pytest.raises(
            ConfigError, match=rf"tokenizer\.json: the tokenizer lacks the {field} token '<absent>'"
        ):
            prepare_tokenizer(FIXTURES / PRO / "tokenizer.json", config)


class TestLoad:
    def load(self, folder: Path) -> Prompts:
        return Prompts.load(folder, PromptConfig(), image_tokens=IMAGE_TOKENS)

    def write(self, folder: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
        data = json.loads((FIXTURES / name / "tokenizer.json").read_text(encoding="utf-8"))
        change(data)
        (folder / "tokenizer.json").write_text(json.dumps(data))

    def refused(self, folder: Path) -> str:
        with pytest.raises(ConfigError) as caught:
            self.load(folder)
        message = str(caught.value)
        assert message.startswith(f"{folder / 'tokenizer.json'}")
        assert "\n" not in message
        return message

    def test_fixture(self) -> None:
        assert self.load(FIXTURES / PRO).answering(ONE_PICTURE) == PROMPTS[PRO].answering(
            ONE_PICTURE
        )

    def test_missing(self, tmp_path: Path) -> None:
        assert "is missing: download" in self.refused(tmp_path)

    @pytest.mark.parametrize("content", [b"", b"{", b"<html>", b"\xff\xfe", b"null x"])
    def test_no_json(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "tokenizer.json").write_bytes(content)
        assert "is not valid JSON" in self.refused(tmp_path)

    @pytest.mark.parametrize(
        "data", [{}, {"model": {}}, {"model": {"type": "BPE", "vocab": {}, "merges": ["a b"]}}]
    )
    def test_no_tokenizer(self, tmp_path: Path, data: Any) -> None:
        (tmp_path / "tokenizer.json").write_text(json.dumps(data))
        assert re.search("is not a (byte-level )?tokenizer", self.refused(tmp_path))

    def test_control_token_absent(self) -> None:
        message = self.refused(FIXTURES / JANUS)
        assert "lacks the image token '<image_placeholder>'" in message
        assert "convert the folder" in message

    def test_rewritten_without_spaces(self, tmp_path: Path) -> None:
        """transformers 5.0 to 5.15 write Metaspace, which loses byte-level spaces."""

        def rewrite(data: dict[str, Any]) -> None:
            data["pre_tokenizer"] = {
                "type": "Metaspace",
                "replacement": "▁",
                "prepend_scheme": "always",
                "split": False,
            }

        self.write(tmp_path, PRO, rewrite)
        assert "is not a byte-level tokenizer" in self.refused(tmp_path)

    def test_control_token_made_of_text(self, tmp_path: Path) -> None:
        def swallow(data: dict[str, Any]) -> None:
            data["model"]["vocab"] |= {
                token["content"]: token["id"] for token in data["added_tokens"]
            }
            data["model"]["ignore_merges"] = True
            data["pre_tokenizer"] = data["pre_tokenizer"]["pretokenizers"][-1]  # cuts nothing
            assert data["pre_tokenizer"]["type"] == "ByteLevel"

        self.write(tmp_path, PRO, swallow)
        assert "as the control token '<" in self.refused(tmp_path)

    def test_two_entries_with_one_id(self, tmp_path: Path) -> None:
        def clash(data: dict[str, Any]) -> None:
            first, second = data["model"]["merges"][0]
            data["model"]["vocab"][first + second] = data["model"]["vocab"]["!"]

        self.write(tmp_path, PRO, clash)
        assert "contradicts itself" in self.refused(tmp_path)
