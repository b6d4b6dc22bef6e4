"""The errors that the library raises. Commands print them as one line and set an exit code."""

from __future__ import annotations

import re

_LINE_BREAK = re.compile(r"\s*[\r\n\t]\s*")
_MAX_MESSAGE = 400  # characters: room for two long paths; texts from files may be far longer


def one_line(text: str) -> str:
    """Return a message as one line of at most 400 printable characters, as ``escape`` does.

    A line break becomes a space.
    """
    return escape(_LINE_BREAK.sub(" ", text), _MAX_MESSAGE)


def escape(text: str, longest: int) -> str:
    """Return a text with printable characters only, cut in the middle if it is too long.

    Others are escaped: a text from a file may hold line breaks and a terminal's control sequences.
    """
    if text.isprintable() and len(text) <= longest:
        return text
    # Cut before and after escaping: an escape is longer than its character.
    line = "".join(map(_escape_character, _cut(text, longest)))
    return _cut(line, longest)


def _escape_character(character: str) -> str:
    return character if character.isprintable() else repr(character)[1:-1]  # without quotes


def _cut(text: str, longest: int) -> str:
    """Replace the middle of a text of more than ``longest`` characters by "..."."""
    if len(text) <= longest:
        return text
    end = longest // 3  # the end often holds the fix
    beginning = longest - end - len("...")
    return f"{text[:beginning]}...{text[-end:]}"


class JanusError(Exception):
    """Base of every error that this package raises on purpose.

    The message is one line of at most 400 printable characters: the problem, the value, and the
    fix.
    """

    def __init__(self, message: str = ""):
        super().__init__(one_line(message))


class ConfigError(JanusError):
    """A config file or a tokenizer is missing or malformed, or holds impossible sizes."""


class UnsupportedModelError(JanusError):
    """The model is of another family, or of an unknown format version."""


class CheckpointError(JanusError):
    """A weight file is missing, damaged, hostile, or does not fit its config."""


class OutputError(JanusError):
    """The output exists already or cannot be written."""


class ImageError(JanusError):
    """An image cannot be read: missing, damaged, not an image, or too large."""


class PromptError(JanusError):
    """A prompt cannot be used: empty, not Unicode, or too long."""


class ContextLengthError(PromptError):
    """A prompt is longer than the model's context."""


class ConversationError(JanusError):
    """A conversation does not allow the operation in its state, or its file cannot be read."""


class OptionError(JanusError, ValueError):
    """An argument is out of range, of a wrong type, or not allowed here; the message says why."""


class OutOfMemoryError(JanusError):
    """The model or the request needs more memory than is available."""


class HubError(JanusError):
    """The Hugging Face Hub did not deliver the model: absent, private, or out of reach."""
