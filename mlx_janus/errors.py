"""What can go wrong, by kind. Commands turn these into one line and an exit code; the library only raises them."""

from __future__ import annotations


class JanusError(Exception):
    """Base of every error that this package raises on purpose.

    The message is one line that says what was wrong, what it got, and what to do about it.
    """


class ConfigError(JanusError):
    """A config file or a tokenizer is missing, malformed, or holds sizes that no model can have."""


class UnsupportedModelError(JanusError):
    """The folder holds a model of another family."""


class CheckpointError(JanusError):
    """A weight file is missing, damaged, hostile, or does not fit its config."""


class OutputError(JanusError):
    """The output is there already, or cannot be written."""


class ImageError(JanusError):
    """A picture cannot be read: missing, damaged, no picture at all, or too large."""


class PromptError(JanusError):
    """A prompt cannot be used: empty, or longer than the model's context."""


class ConversationError(JanusError):
    """A conversation cannot do that now, or its file cannot be read."""


class OptionError(JanusError, ValueError):
    """An argument is outside what it may be; the message gives the range."""


class OutOfMemoryError(JanusError):
    """The model or the request needs more memory than there is."""


class HubError(JanusError):
    """The Hugging Face Hub did not give the model: absent, private, or out of reach."""
