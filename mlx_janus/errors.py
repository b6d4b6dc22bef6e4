"""The errors that the library raises. Commands print them as one line and set an exit code."""

from __future__ import annotations


class JanusError(Exception):
    """Base of every error that this package raises on purpose.

    The message is one line: the problem, the value, and the fix.
    """


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
