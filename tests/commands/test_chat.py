"""``chat``: whole transcripts with input piped, and Ctrl-C and Ctrl-D on a terminal."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import mlx_janus
from mlx_janus.commands import chat, inputs
from mlx_janus.decode.text import TextOptions
from mlx_janus.inference import conversation
from mlx_janus.processing.prompts import Turn
from tests.support.golden import FIXTURES
from tests.support.programs import INTERRUPTIBLE, ROOT, Outcome, call, error_line

PICTURE = FIXTURES / "picture.png"
READY = "deepseek-pro-bin is ready. /help lists the commands.\n"
CUT = "Cut after 8 tokens, by --max-tokens or the model's context.\n"
Janus = mlx_janus.JanusPipeline


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def model(converted: dict[str, Path]) -> Path:
    return converted["deepseek-pro-bin"]


def talk(model: Path, *lines: str, flags: tuple[object, ...] = ()) -> Outcome:
    """A chat with these lines piped to it."""
    return call(
        chat.main,
        "-m",
        model,
        "--max-tokens",
        8,
        *flags,
        stdin="".join(f"{line}\n" for line in lines),
    )


def replies(janus: Janus, *questions: Turn) -> list[str]:
    """The library's answers to a conversation's questions."""
    conversation = janus.conversation()
    return [
        conversation.send(turn.text, [PICTURE] * turn.images, max_tokens=8).text
        for turn in questions
    ]


def written(*answers: str) -> str:
    return "".join(f"{answer}\n" for answer in answers)


def test_answers_are_the_librarys_and_history_counts(model: Path, pro: Janus) -> None:
    done = talk(model, "Hello?", "", "Hello?")
    first, second = replies(pro, Turn("user", "Hello?"), Turn("user", "Hello?"))
    assert done == Outcome(0, written(first, second), READY + CUT + CUT)
    assert first != second


def test_attached_images_stand_at_the_marks_of_the_question(model: Path, pro: Janus) -> None:
    question = "Is {image} like {image}?"
    attach = f"/image {PICTURE}"
    done = talk(model, "What is {image}?", attach, question, attach, question)
    conversation = pro.conversation()
    plain = conversation.send("What is {image}?", max_tokens=8)
    marked = conversation.send(question, [PICTURE] * 2, max_tokens=8)
    assert done.stdout == written(plain.text, marked.text)
    assert "Error: the question has 2 {image} marks and 1 image: write one" in done.stderr
    assert "/reset" not in done.stderr


@pytest.mark.check
def test_a_whole_transcript(model: Path, pro: Janus, here: Path) -> None:
    (here / "notes.txt").write_text("hello")
    done = talk(
        model,
        f"/image {PICTURE}",
        "What is this?",
        "And now?",
        "/image absent.png",
        "/image notes.txt",
        "/image",
        "/dance",
        "/draw",
        "/help",
        "/reset",
        "What is this?",
        "/quit now",
        "never asked",
    )
    seen = replies(pro, Turn("user", "What is this?", 1), Turn("user", "And now?"))
    fresh = replies(pro, Turn("user", "What is this?"))
    assert (done.code, done.stdout) == (0, written(*seen, *fresh))
    assert done.stderr == (
        READY
        + "1 image attached to your next question.\n"
        + CUT * 2
        + "Error: absent.png does not exist: check the path\n"
        + "Error: notes.txt is not an image that can be read: "
        "use PNG, JPEG, WebP, GIF, BMP, TIFF, PPM, AVIF, HEIC or ICO\n"
        + "Error: /image needs a file: /image photo.jpg\n"
        + "There is no /dance. /help lists the commands.\n"
        + "Error: the prompt is empty: describe the image to draw\n"
        + f"{chat.HELP}\n"
        + "The conversation is forgotten.\n"
        + CUT
    )


def test_draws_with_the_options_given(model: Path, pro: Janus, here: Path) -> None:
    """Temperature 0 is a temperature."""
    done = talk(
        model, "/draw a red fox", "/draw\ta red fox", flags=("--seed", 9, "--temperature", 0)
    )
    assert (done.code, done.stdout) == (0, "janus.png\njanus_2.png\n")
    assert done.stderr.count("seed 9\n") == 2
    assert "16/16" in done.stderr
    expected = pro.generate_images("a red fox", seed=9, temperature=0)[0]
    for name in ("janus.png", "janus_2.png"):
        with Image.open(here / name) as image:
            assert image.text["temperature"] == "0"  # type: ignore[attr-defined]
            assert image.tobytes() == expected.image.tobytes()


def test_a_drawing_without_a_seed_shows_its_own(model: Path, here: Path) -> None:
    done = talk(model, "/draw a red fox")
    with Image.open(here / "janus.png") as image:
        facts = image.text  # type: ignore[attr-defined]
    assert f"seed {facts['seed']}\n" in done.stderr
    assert facts["temperature"] == "1"


def test_sampling_options_reach_answers(model: Path, pro: Janus) -> None:
    done = talk(
        model, "Hello?", flags=("--temperature", 1, "--top-p", 0.9, "--seed", 4, "--system", "")
    )
    stream = pro.stream_turns(
        [Turn("user", "Hello?")],
        [],
        options=TextOptions(max_tokens=8, temperature=1, top_p=0.9, seed=4),
        system="",
    )
    assert done.stdout == written("".join(chunk.text for chunk in stream))


def test_penalties_and_filters_reach_answers(model: Path, pro: Janus) -> None:
    choice: dict[str, Any] = {
        "temperature": 1.5,
        "seed": 4,
        "top_k": 30,
        "min_p": 0.01,
        "frequency_penalty": -1.5,
        "presence_penalty": 0.5,
    }
    flags = [(f"--{name.replace('_', '-')}", value) for name, value in choice.items()]
    done = talk(
        model,
        "/set repetition_penalty 1.4",
        "Hello?",
        "/set top_p 0",
        "Hello?",
        "/draw a fox",
        flags=[part for flag in flags for part in flag],
    )
    told = pro.conversation()
    choice |= {"max_tokens": 8, "repetition_penalty": 1.4}
    first = told.send("Hello?", **choice).text
    assert done.stdout == written(first) + written(told.send("Hello?", top_p=0, **choice).text)
    assert "Error: top_p must be a number above 0 and at most 1" in done.stderr


def test_file_names_as_people_type_them(
    model: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unquoted with spaces or an apostrophe, quoted, several, under ~, dropped on the terminal."""
    monkeypatch.setenv("HOME", str(here))
    for name in ("it's a photo.png", "a b.png", "c.png"):
        shutil.copy(PICTURE, here / name)
    done = talk(
        model,
        "/image it's a photo.png",
        "/image a b.png",
        "/image 'a b.png' c.png",
        "/image ~/c.png",
        str(here / "c.png"),
        str(here / "a b.png").replace(" ", "\\ "),
        f"'{here / 'a b.png'}'",
        f"{here / 'c.png'} '{here / 'a b.png'}'",
        "/image it's gone.png",
        "/image ~nobody-of-that-name/c.png",
    )
    assert (done.code, done.stdout) == (0, "")
    assert re.findall(r"^(\d+) images? attached", done.stderr, re.MULTILINE) == [
        "1",
        "2",
        "4",
        "5",
        "6",
        "7",
        "8",
        "10",
    ]
    assert "Error: it's gone.png does not exist: quote names" in done.stderr
    assert "Error: ~nobody-of-that-name/c.png does not exist" in done.stderr


def test_images_by_their_addresses(
    model: Path, pro: Janus, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As files, after a command or dropped, and from the web."""
    monkeypatch.setattr(inputs, "fetch", lambda _: PICTURE.read_bytes())
    for name in ("a b.png", "c.png"):
        shutil.copy(PICTURE, here / name)
    one, other = (here / "a b.png").as_uri(), (here / "c.png").as_uri()
    done = talk(
        model,
        f"/image {one}",
        f"{one} {other}",
        f"'{other}'",
        "/image https://example.org/a.png",
        "/image -",
        "/image file://elsewhere/a.png",
        "What is this?",
    )
    assert re.findall(r"^(\d+) images? attached", done.stderr, re.M) == ["1", "3", "4", "5"]
    assert "Error: - does not exist" in done.stderr
    assert "Error: file://elsewhere/a.png is no file of this machine" in done.stderr
    assert done.stdout == written(*replies(pro, Turn("user", "What is this?", 5)))


def test_a_question_of_several_lines(model: Path, pro: Janus) -> None:
    """In triple quotes, also after a command. Quotes that enclose a part of it only are its own."""
    done = talk(
        model,
        '"""line one',
        "",
        "  line two",
        '"""',
        '/draw """a',
        'fox"""',
        "/undo",
        "/reset",
        '"""/help"""',
        "/reset",
        '"""one""" is what?',
        "/reset",
        '"""one"""',
        '""""""',
    )
    assert done.code == 0
    expected = [replies(pro, Turn("user", "line one\n\n  line two"))[0], "janus.png"]
    for question in ("/help", '"""one""" is what?', "one"):
        expected += replies(pro, Turn("user", question))
    assert done.stdout == written(*expected)
    assert "Removed: a\nfox\n" in done.stderr
    assert "\nError: the question is empty: say what you want" in done.stderr


def test_quotes_that_are_not_closed(model: Path) -> None:
    """What was asked before them is answered."""
    done = talk(model, "/seed 1", '"""line one', "line two")
    assert error_line(done) == 'Error: the input ends before the closing """: add them'
    assert "seed 1" in done.stderr


def test_words_that_nothing_would_read_are_refused(model: Path) -> None:
    done = talk(model, "/undo 2", "/reset now", "/load a b", "/save 'a b' c", '/save "a b" \'c')
    assert re.findall("^Error: (.*)$", done.stderr, re.M) == [
        "/undo takes nothing after it: write only /undo",
        "/reset takes nothing after it: write only /reset",
        "/load takes one file, got 2: quote a name with spaces",
        "/save takes one file, got 2: quote the entire name",
    ]


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("", "janus.json"),
        ("talk", "talk.json"),
        ("my chat", "my chat.json"),
        ('"my chat"', "my chat.json"),
        ("'my chat.json'", "my chat.json"),
        ("my\\ chat", "my chat.json"),
        ("it's mine", "it's mine.json"),
        ("new/", "new/janus.json"),
        ("there", "there/janus.json"),
        ("~/deep/", "deep/janus.json"),
    ],
)
def test_a_chat_is_saved_and_found_under_one_name(
    model: Path, here: Path, monkeypatch: pytest.MonkeyPatch, typed: str, name: str
) -> None:
    monkeypatch.setenv("HOME", str(here))
    (here / "there").mkdir()
    loaded = name if typed in ("", "new/", "there", "~/deep/") else typed
    done = talk(model, "Hello?", f"/save {typed}", "/reset", f"/load {loaded}")
    assert (here / name).is_file()
    assert done.stderr.endswith("Loaded 2 messages.\n"), done.stderr
    (here / name).unlink()
    address = (here / "by its address.json").as_uri()
    done = talk(model, "Hello?", f"/save {address}", f"/load {address}")
    assert done.stderr.endswith("Loaded 2 messages.\n"), done.stderr


def test_paths_in_questions_are_questions(model: Path, pro: Janus) -> None:
    for question in ("/etc/hosts is what?", "/absent/photo.png", "/" + "a" * 300 + "/b"):
        assert talk(model, question).stdout == written(*replies(pro, Turn("user", question)))
    assert "There is no /aaa" in talk(model, "/" + "a" * 300).stderr


def test_what_fails_leaves_the_talk_as_it_was(model: Path, pro: Janus) -> None:
    """Also a question too long for the context, whose picture still waits for the next one."""
    done = talk(model, "Hello?", f"/image {PICTURE}", "lighthouse " * 10_000, "What is this?")
    assert done.stdout == written(
        *replies(pro, Turn("user", "Hello?"), Turn("user", "What is this?", 1))
    )
    assert re.search(
        r"^Error: the question is \d+ tokens long.*; /reset forgets the conversation$",
        done.stderr,
        re.M,
    )


@pytest.mark.parametrize(
    "error", [RuntimeError("[malloc] Unable to\nallocate 8 bytes."), MemoryError(), OSError("x")]
)
def test_failures_do_not_end_the_talk(
    model: Path, pro: Janus, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    generate = conversation.generate_steps

    def fail_once(*_: Any) -> Any:
        monkeypatch.setattr(conversation, "generate_steps", generate)
        raise error

    monkeypatch.setattr(conversation, "generate_steps", fail_once)
    done = talk(model, "/draw a fox", "Hello?", "/draw a fox")
    assert (done.code, done.stdout) == (
        0,
        f"{written(*replies(pro, Turn('user', 'Hello?')))}janus.png\n",
    )
    assert len(re.findall("^Error: .*$", done.stderr, re.MULTILINE)) == 1


def test_an_empty_name_of_a_saved_chat_is_no_chat(model: Path) -> None:
    """As a shell's unset variable gives it."""
    assert "Is a directory" in error_line(call(chat.main, "-m", model, "--load", ""))


def test_an_absent_model_ends_it() -> None:
    done = call(chat.main, "-m", "no/such/model")
    assert done.code == 1
    assert done.stderr.startswith("Error: no/such/model is neither a folder nor a Hub id: ")
    assert done.stderr.count("\n") == 1
    assert call(chat.main, "-m", "x", "--n", 2).code == 2


def start_piped(program: str, *arguments: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


CHAT = INTERRUPTIBLE + "from mlx_janus.commands.chat import main; main()\n"


def test_bytes_that_are_no_text(model: Path) -> None:
    with start_piped(CHAT, "-m", model, "--max-tokens", 8) as process:
        out, err = process.communicate(b"caf\xe9?\n", timeout=60)
    assert process.returncode == 0
    assert out.endswith(b"\n")
    assert err.decode() == READY + CUT


def test_ctrl_c_with_piped_input_ends_it(model: Path) -> None:
    """Nobody is there to go on with."""
    with start_piped(CHAT, "-m", model, "--max-tokens", 16_000) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write(b"Hello?\nHello?\n")
        process.stdin.flush()
        assert process.stdout.read(5)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.decode() == f"{READY}\nstopped\n"


TINY = "janus-tiny is ready. /help lists the commands.\n"


def tiny_talk(*lines: str, flags: tuple[object, ...] = ()) -> Outcome:
    """A chat with Janus-Tiny."""
    return call(chat.main, *flags, stdin="".join(f"{line}\n" for line in lines))


def test_what_was_drawn_is_asked_about_taken_back_and_kept(here: Path) -> None:
    done = tiny_talk(
        "/seed 1",
        "/draw a red circle",
        "What colour is the circle?",
        "/retry",
        "/save talk",
        "What shape is red?",
        "/undo",
        "/undo",
        "/undo",
        "/undo",
        "/load talk.json",
        "What shape is red?",
    )
    assert done.stdout == "janus.png\nred\nred\ncircle\ncircle\n"
    bar = r"No model|drawing: |\s*$"
    notes = [line for line in re.split("[\r\n]", done.stderr) if not re.match(bar, line)]
    assert notes == [
        TINY.strip(),
        "seed 1",
        "seed 1",
        "Saved 3 messages to talk.json.",
        "Removed: What shape is red?",
        "Removed: What colour is the circle?",
        "Removed: a red circle",
        "Error: nothing was asked yet: ask something first",
        "Loaded 3 messages.",
    ]
    again = tiny_talk("What shape is red?", flags=("--load", here / "talk.json"))
    assert again.stdout == "circle\n"


def test_settings_are_checked_listed_and_used(here: Path) -> None:
    done = tiny_talk(
        "/set",
        "/set temperature 0.7",
        "/set temperature warm",
        "/set top_p 2",
        "/set top_k 20",
        "/set frequency_penalty 2.5",
        "/set speed 3",
        "/set cfg_weight 1",
        "/seed 3",
        "/draw a star",
        "/set temperature default",
        "/seed -1",
        "/set",
        "/system Be brief.",
        "/system none",
        "/system",
        "/stats",
    )
    with Image.open(here / "janus.png") as image:
        facts = image.text  # type: ignore[attr-defined]
    assert (facts["temperature"], facts["cfg_weight"], facts["seed"]) == ("0.7", "1", "3")
    penalties = "frequency_penalty default\npresence_penalty default\nrepetition_penalty default\n"
    for line in (
        f"temperature default\ntop_p 1.0\ntop_k default\nmin_p default\n{penalties}"
        "max_tokens default\ncfg_weight default\nseed random\n",
        "temperature 0.7\nError: temperature: 'warm' is not a valid",
        "Error: top_p: 2.0 is not in the range",
        "top_k 20\nError: frequency_penalty: 2.5 is not in the range -2<=x<=2",
        "Error: there is no setting speed: "
        "it must be one of temperature, top_p, top_k, min_p, frequency_penalty, "
        "presence_penalty, repetition_penalty, max_tokens, cfg_weight, seed\n",
        f"temperature default\ntop_p 1.0\ntop_k 20\nmin_p default\n{penalties}"
        "max_tokens default\ncfg_weight 1.0\nseed random\n",
        "system prompt: Be brief.\nsystem prompt: none\nsystem prompt: none\n"
        "0 of 1024 context tokens used\n",
    ):
        assert line in done.stderr, line


def test_stats_tell_what_an_answer_took() -> None:
    done = tiny_talk("How many shapes are there?", "How many stars are there?", "/stats")
    assert re.search(r"^1 token$", done.stderr, re.MULTILINE)
    read, total = re.findall(
        r"^(\d+) of (\d+) prompt tokens read, first token after [\d.]+ s$", done.stderr, re.M
    )[0]
    assert int(read) < int(total) / 2
    assert re.search(rf"^{int(total) + 1} of 1024 context tokens used$", done.stderr, re.MULTILINE)


# A terminal is forked off, which Python 3.12 warns of where there are threads, as MLX has.
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_ctrl_c_and_ctrl_d_on_a_terminal(model: Path) -> None:
    """Ctrl-C at the prompt and during an answer keeps the chat, Ctrl-D leaves it."""
    pexpect = pytest.importorskip("pexpect")
    program = (
        f"{INTERRUPTIBLE}import runpy; runpy.run_module('mlx_janus.chat', run_name='__main__')"
    )
    arguments = ["-c", program, "-m", str(model), "--max-tokens", "16000"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "dumb"}
    terminal = pexpect.spawn(
        sys.executable, arguments, env=environment, encoding="utf-8", timeout=30
    )
    try:
        terminal.expect_exact("is ready")
        terminal.expect_exact("> ")
        time.sleep(
            0.2
        )  # CPython looks for a signal that comes before readline waits only at the next key
        terminal.sendintr()
        terminal.expect_exact("Ctrl-D leaves.")
        terminal.expect_exact("> ")
        terminal.sendline("Hello?")
        terminal.expect_exact("Hello?\r\n")
        terminal.expect(".{5}")
        terminal.sendintr()
        terminal.expect_exact("stopped\r\n> ")
        assert not re.search(r"\n\r?\n$", terminal.before)  # no line is left blank
        terminal.sendline("/dance")
        terminal.expect_exact("There is no /dance")
        terminal.expect_exact("> ")
        terminal.sendeof()
        terminal.expect(pexpect.EOF)
        assert "Traceback" not in terminal.before
        assert terminal.before.count("\n") <= 1
        terminal.close()
        assert terminal.exitstatus == 0
    finally:
        terminal.close(force=True)


class Terminal:
    """The chat on a terminal of 100 by 40, and what is to be seen on it."""

    def __init__(self, folder: Path, *flags: object, before: str = "", **environment: str) -> None:
        pexpect, pyte = pytest.importorskip("pexpect"), pytest.importorskip("pyte")
        self.eof, self.timeout = pexpect.EOF, pexpect.TIMEOUT
        chat_program = "import runpy; runpy.run_module('mlx_janus.chat', run_name='__main__')"
        program = f"{INTERRUPTIBLE}{before}{chat_program}"
        home = {
            "PYTHONPATH": str(ROOT),
            "XDG_STATE_HOME": str(folder / "state"),
            "HOME": str(folder),
        }
        self.child = pexpect.spawn(
            sys.executable,
            ["-c", program, *map(str, flags)],
            env={
                **os.environ,
                **home,
                "TERM": "xterm-256color",
                "PROMPT_TOOLKIT_NO_CPR": "1",
                **environment,
            },
            encoding="utf-8",
            timeout=60,
            dimensions=(40, 100),
            cwd=str(folder),
        )
        self.written, self.typed = "", 0
        self.answers: dict[
            str, str
        ] = {}  # what a terminal that can do more says, to what it is asked
        self.screen = pyte.Screen(100, 40)
        self.stream = pyte.Stream(self.screen)

    def wait(self, *texts: str) -> None:
        """Until these lines stand on the screen, in this order, the last one on its last line."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            self.read()
            lines = self.lines()
            if (
                lines
                and lines[-1] == texts[-1].rstrip()
                and all(text.rstrip() in lines for text in texts)
            ):
                return
        raise AssertionError(f"{texts} did not come: {self.lines()}")

    def read(self) -> None:
        with contextlib.suppress(self.timeout):
            text = self.child.read_nonblocking(100_000, timeout=0.2)
            self.written += text
            self.stream.feed(text)
            for asked, answer in self.answers.items():
                if match := re.search(asked, text):
                    self.child.send(match.expand(answer))

    def said(self, what: str) -> None:
        """Until this was written since the last typing."""
        deadline = time.monotonic() + 60
        while what not in self.written[self.typed :]:
            assert time.monotonic() < deadline, (what, self.lines())
            self.read()

    def lines(self) -> list[str]:
        return [line.rstrip() for line in self.screen.display if line.strip()]

    def type(self, text: str) -> None:
        self.typed = len(self.written)
        self.child.send(text)

    def leave(self) -> None:
        self.type("\x04")
        self.child.expect(self.eof)
        self.child.close()
        assert self.child.exitstatus == 0


@pytest.fixture
def terminal(here: Path) -> Iterator[Any]:
    started: list[Terminal] = []

    def start(*flags: object, **more: str) -> Terminal:
        started.append(Terminal(here, *flags, **more))
        return started[-1]

    yield start
    for one in started:
        one.child.close(force=True)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_chat_on_a_terminal_with_a_picture_in_it(here: Path, terminal: Any) -> None:
    one = terminal()
    one.wait("> ")
    one.type("/seed 1\r")
    one.wait("seed 1", "> ")
    one.type("/dr\t")  # completed
    one.wait("> /draw")
    one.type(" a red circle\r")
    one.wait("janus.png", "> ")
    assert not any("Traceback" in line or "Error" in line for line in one.lines())
    shown = [y for y in range(40) if one.screen.buffer[y][0].data == "▀"]
    assert len(shown) == 20
    assert shown == list(range(shown[0], shown[0] + 20))  # drawn over and over at one place
    cells = np.array(
        [
            [
                tuple(bytes.fromhex(colour))
                for x in range(40)
                for colour in [getattr(one.screen.buffer[y][x], half)]
            ]
            for y in shown
            for half in ("fg", "bg")
        ]
    )
    with Image.open(here / "janus.png") as image:
        wanted = np.array(image.convert("RGB").resize((40, 40)), int)
    assert np.abs(cells - wanted).mean() < 12
    one.type("What colour is the circle?\r")
    one.wait("red", "> ")
    one.type("\x1b[A\x1b[A\r")  # two lines up in the history: /draw again
    one.wait("janus_2.png", "> ")
    one.leave()
    history = next((here / "state").rglob("chat_history"))
    assert "a red circle" in history.read_text()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_ctrl_c_stops_an_answer_and_a_drawing(model: Path, terminal: Any) -> None:
    one = terminal("-m", model, "--max-tokens", 16_000, NO_COLOR="1")
    one.wait("> ")
    one.type("Hällo? 🦔\r")
    time.sleep(1.5)
    one.type("\x03")
    one.wait("stopped", "> ")
    one.type("/set cfg_weight 5\r")
    one.wait("cfg_weight 5", "> ")
    one.type("/undo\r")
    one.wait("Error: nothing was asked yet: ask something first", "> ")
    one.type("\x03")
    one.wait("Ctrl-D leaves.", "> ")
    assert "▀" not in "".join(one.screen.display)
    one.leave()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_questions_of_several_lines_on_a_terminal(here: Path, model: Path, terminal: Any) -> None:
    """By Alt-Enter and by triple quotes. The history has an entire question as one entry."""
    one = terminal("-m", model, "--max-tokens", 2, NO_COLOR="1")
    one.wait("> ")
    one.type("one\x1b\rtwo\r")  # Alt-Enter
    one.wait("... two", "> ")
    one.type('"""one\r')
    one.wait("... ")
    one.type('two"""\r')
    one.wait('... two"""', "> ")
    one.type("\x1b[A\x1b[A")  # up, past the question's first line
    one.wait('> """one', '... two"""')
    one.type("\x1b[A\r")  # the question before it
    one.said("Cut after")
    one.wait("> ")
    one.type("/save talk\r")
    one.wait("Saved 6 messages to talk.json.", "> ")
    one.leave()
    messages = json.loads((here / "talk.json").read_text())["messages"]
    assert [message["text"] for message in messages[::2]] == ["one\ntwo"] * 3


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_history_that_cannot_be_kept_is_done_without(here: Path, terminal: Any) -> None:
    """As on a full disk."""
    (here / "state" / "mlx_janus" / "chat_history").mkdir(parents=True)
    one = terminal()
    one.wait("> ")
    one.type("/seed 3\r")
    one.wait("seed 3", "> ")
    one.type("\x1b[A\r")  # of this chat it is still known
    one.wait("> /seed 3", "seed 3", "> ")
    assert not re.search("Traceback|Exception|history", one.written)
    one.leave()


# Steps slow enough to stop one, and the same tokens.
SLOWLY = """
import time
from mlx_janus.inference import text_generation, vq_pathway
def slowly(steps):
    for step in steps:
        time.sleep(0.2)
        yield step
draw, answer = vq_pathway.draw_tokens, text_generation.answer_tokens
vq_pathway.draw_tokens = lambda *arguments: slowly(draw(*arguments))
text_generation.answer_tokens = lambda *arguments, **options: slowly(answer(*arguments, **options))
"""


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_whole_transcript_on_a_terminal(here: Path, terminal: Any) -> None:
    """Stops, files that are no images, a long message, umlauts; then the saved chat goes on."""
    shutil.copy(PICTURE, here / "ein Bild ä.png")
    (here / "cut.png").write_bytes(PICTURE.read_bytes()[:1000])
    (here / "notes.png").write_text("hello")
    janus = mlx_janus.load("tiny")
    talk = janus.conversation()
    one = terminal("--no-show", before=SLOWLY)
    one.wait("> ")
    one.type("/seed 1\r/draw a red circle\r")
    one.said("drawing:")
    time.sleep(0.5)
    one.type("\x03")
    one.wait("stopped", "> ")
    assert not (here / "janus.png").exists()
    one.type("/draw a red circle\r")
    one.wait("janus.png", "> ")
    talk.draw("a red circle", seed=1)
    one.type("Describe the picture.\r")
    one.said("a")
    time.sleep(0.3)
    one.type("\x03")
    one.wait("stopped", "> ")
    for line, error in [
        ("/image absent.png", "absent.png does not exist: check the path"),
        ("/image cut.png", "cut.png is damaged or cut short: download or export it again"),
        (
            "/image notes.png",
            "notes.png is not an image that can be read: use PNG",
        ),
    ]:
        one.type(f"{line}\r")
        one.said(f"Error: {error}")
    one.wait("> ")
    one.type("\x1b[200~" + "a red circle,\nagain " * 2000 + "\x1b[201~\r")  # as a terminal pastes
    one.said("Error: the question is")
    one.said("/reset forgets the conversation")
    one.wait("> ")
    one.type("/image ein Bild ä.png\r")
    one.wait("1 image attached to your next question.", "> ")
    question = "Welche Farbe hat das? 🦔"
    one.type(f"{question}\r")
    first = talk.send(question, here / "ein Bild ä.png", seed=1)
    one.said(first.text)
    one.wait("> ")
    one.type("/save talk\r")
    one.wait("Saved 3 messages to talk.json.", "> ")
    one.leave()
    other = terminal("--load", "talk.json", "--no-show")
    other.wait("Loaded 3 messages.", "> ")
    other.type("Describe the picture.\r")
    second = talk.send("Describe the picture.")
    other.wait(second.text, "> ")
    other.type("/save talk\r")
    other.wait("Saved 5 messages to talk.json.", "> ")
    other.leave()
    again = janus.conversation()
    again.load(here / "talk.json")
    assert [message.tokens for message in again.messages] == [
        message.tokens for message in talk.messages
    ]
    texts = [message.text for message in again.messages]
    assert texts == ["a red circle", question, first.text, "Describe the picture.", second.text]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_what_is_typed_meanwhile_is_the_next_line(terminal: Any) -> None:
    """The line is whole and not written into the image, also where the cells' size is unknown."""
    one = terminal(before=SLOWLY)
    one.wait("> ")
    one.type("/seed 1\r")
    one.wait("seed 1", "> ")
    one.type("/draw a red circle\r")
    one.said("drawing:")
    one.type("What colour is the circle?\r/st")
    one.said("janus.png")
    meanwhile = one.written[one.typed :].partition("janus.png")[0]
    one.wait("> What colour is the circle?", "> /st")
    assert "colour is" not in meanwhile
    assert "▀" in meanwhile


def sixels(text: str) -> np.ndarray:
    """The picture of a sixel sequence's body: (H, W, 3) in per cent."""
    width, height = map(int, re.match(r'"1;1;(\d+);(\d+)', text).groups())  # type: ignore[union-attr]
    picture, palette, colour, x, y = np.zeros((height + 6, width, 3), int), {}, 0, 0, 0
    for number, definition, repeat, sixel, move in re.findall(
        r"#(\d+)((?:;\d+)*)|(?:!(\d+))?([?-~])|([$-])", text.partition(f";{height}")[2]
    ):
        if number:
            colour = int(number)
            if definition:
                palette[colour] = [int(part) for part in definition.split(";")[2:]]
        elif move:
            x, y = 0, y + 6 * (move == "-")
        else:
            count, bits = int(repeat or 1), ord(sixel) - 63
            for row in range(6):
                if bits >> row & 1:
                    picture[y + row, x : x + count] = palette[colour]
            x += count
    return picture[:height]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("protocol", ["sixel", "kitty"])
def test_terminals_that_show_pixels_get_the_picture(
    here: Path, terminal: Any, protocol: str
) -> None:
    """What they are sent is read back, and holds what the file does."""
    one = terminal()
    one.answers = {
        r"\x1b\[c": "\x1b[?62;4;22c" if protocol == "sixel" else "\x1b[?62;22c",
        r"\x1b\[16t": "\x1b[6;20;10t",
    }
    if protocol == "kitty":
        one.answers[r"\x1b_G(?=[^;]*a=q)[^;]*i=(\d+)"] = "\x1b_Gi=\\1;OK\x1b\\\\"
    one.stream.feed = lambda _: None  # such pictures are more than pyte reads
    one.said("\x1b[?2004h")  # of a line editor that waits
    one.type("/draw a red circle\r")
    one.said("janus.png")
    one.said("100%")
    if protocol == "sixel":
        shown = sixels(re.findall(r"\x1bP[\d;]*q(.*?)\x1b\\", one.written, re.DOTALL)[-1]) * 2.55
    else:
        parts = re.findall(r"\x1b_Gi=(\d+),m=[01],f=100[^;]*;([^\x1b]*)\x1b\\", one.written)
        payload = "".join(data for number, data in parts if number == parts[-1][0])
        shown = np.array(Image.open(io.BytesIO(base64.b64decode(payload))).convert("RGB"))
    with Image.open(here / "janus.png") as image:
        wanted = np.array(image.convert("RGB").resize(shown.shape[1::-1]), int)
    assert np.abs(shown - wanted).mean() < 12
    one.leave()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_prompt_stays_out_of_a_redirected_answer(model: Path, here: Path) -> None:
    pexpect = pytest.importorskip("pexpect")
    line = f'"{sys.executable}" -m mlx_janus.chat -m "{model}" --max-tokens 8 >answers.txt'
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "dumb"}
    terminal = pexpect.spawn(
        "bash", ["-c", line], env=environment, encoding="utf-8", timeout=30, cwd=str(here)
    )
    try:
        terminal.expect_exact("> ")
        terminal.sendline("Hello?")
        terminal.expect_exact("Cut after 8 tokens")
        terminal.expect_exact("> ")
        terminal.sendeof()
        terminal.expect(pexpect.EOF)
    finally:
        terminal.close(force=True)
    assert not (here / "answers.txt").read_text(encoding="utf-8").startswith("> ")
    assert (here / "answers.txt").read_text(encoding="utf-8").count("\n") == 1
