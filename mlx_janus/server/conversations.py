"""OpenAI's messages as the model's turns.

The model's template knows a system prompt, questions with images, and answers. Messages of other
kinds become a part of the next question: instructions amid the conversation, results of tools, and
images in an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..processing.prompts import Turn
from .errors import APIError
from .schema import (
    AssistantMessage,
    ImagePart,
    Message,
    SystemMessage,
    TextPart,
    ToolMessage,
    UserMessage,
)


@dataclass(frozen=True)
class ImageSource:
    """The URL of an image, and the field of the body that holds it."""

    url: str
    field: str


@dataclass
class Conversation:
    """A conversation as the engine takes it."""

    system: str | None = None  # None: the model's own
    turns: list[Turn] = field(default_factory=list)
    images: list[ImageSource] = field(default_factory=list)  # of all turns, in order


@dataclass
class _Pending:
    """Texts and images that wait for the next question."""

    texts: list[str] = field(default_factory=list)
    images: list[ImageSource] = field(default_factory=list)


def read_conversation(messages: Sequence[Message]) -> Conversation:
    """Convert messages to turns.

    - System messages at the beginning are the system prompt, joined by blank lines.
    - Later system messages and results of tools begin the next question, or end the last one if no
      question follows.
    - Images of an answer are shown with the next question.
    - An answer that is only calls of tools, and an empty question that is not the last message, are
      left out.
    - An answer at the end is the beginning of the next answer, which continues it.

    Raises:
        APIError: there is no question, or images wait for one.
    """
    conversation = Conversation()
    instructions = []
    pending = _Pending()
    last = len(messages) - 1
    for index, message in enumerate(messages):
        text = _text(message)
        if isinstance(message, SystemMessage) and not conversation.turns:
            instructions.append(text)
        elif isinstance(message, SystemMessage | ToolMessage):
            pending.texts.append(text)
        else:
            images = _images(message, f"messages[{index}].content")
            _add_turn(conversation, pending, message, text, images, is_last=index == last)
    if instructions:
        conversation.system = "\n\n".join(instructions)
    _end_last_question(conversation, pending)
    return conversation


def _add_turn(
    conversation: Conversation,
    pending: _Pending,
    message: UserMessage | AssistantMessage,
    text: str,
    images: list[ImageSource],
    *,
    is_last: bool,
) -> None:
    """Add a question with what is pending, or an answer, whose images become pending.

    Args:
        conversation: gets the turn, if there is one.
        pending: texts and images for the next question.
        message: of the user or the model.
        text: the message's text.
        images: the message's images.
        is_last: whether this is the last message of the request.
    """
    if isinstance(message, AssistantMessage):
        if text or not (message.tool_calls or message.function_call or images):
            conversation.turns.append(Turn("assistant", text))
        pending.images += images
        return
    text = "\n".join([*pending.texts, text]).strip()
    images = [*pending.images, *images]
    if text or images or is_last:
        conversation.turns.append(Turn("user", text, images=len(images)))
        conversation.images += images
        pending.texts.clear()
        pending.images.clear()


def _end_last_question(conversation: Conversation, pending: _Pending) -> None:
    """Add pending texts to the last question.

    Raises:
        APIError: there is no question, or images or texts wait for one.
    """
    turns = conversation.turns
    if not turns and conversation.system is not None:  # the instructions are the question
        turns.append(Turn("user", conversation.system))
        conversation.system = None
    ends_with_answer = bool(turns) and turns[-1].role == "assistant"
    waits = pending.images or (pending.texts and ends_with_answer)
    if waits or not any(turn.role == "user" for turn in turns):
        raise APIError(400, "there is no question: add a message of the user", param="messages")
    if pending.texts:
        question = turns[-1]
        text = "\n".join([question.text, *pending.texts])
        turns[-1] = Turn("user", text, images=question.images)


def _text(message: Message) -> str:
    """Return a message's text. Text parts become lines; no content becomes ""."""
    if isinstance(message.content, str):
        return message.content
    return "\n".join(part.text for part in message.content or () if isinstance(part, TextPart))


def _images(message: UserMessage | AssistantMessage, content_field: str) -> list[ImageSource]:
    """Return the images of a message.

    Args:
        message: a message of the user or the model.
        content_field: the field that holds the message's content, such as "messages[0].content".
    """
    if isinstance(message.content, str):
        return []
    return [
        ImageSource(part.image_url.url, f"{content_field}[{index}].image_url.url")
        for index, part in enumerate(message.content or ())
        if isinstance(part, ImagePart)
    ]
