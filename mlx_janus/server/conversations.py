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

    - System messages at the beginning become the system prompt, joined by blank lines. If they are
      the only messages, they become the question.
    - Later system messages and results of tools are put before the next question. Those that follow
      the last question are appended to it.
    - Images of an answer are shown with the next question.
    - An answer without text that has tool calls or images becomes no turn. Nor does an empty
      question that is not the last message.
    - If the last message is an answer, the model continues it.

    Raises:
        APIError: there is no question, or the last answer's images, or texts after the last answer,
            have no next question.
    """
    conversation = Conversation()
    instructions = []
    pending = _Pending()
    last_index = len(messages) - 1
    for index, message in enumerate(messages):
        text = _text(message)
        if isinstance(message, SystemMessage) and not conversation.turns:
            instructions.append(text)
        elif isinstance(message, SystemMessage | ToolMessage):
            pending.texts.append(text)
        else:
            images = _images(message, f"messages[{index}].content")
            _add_turn(conversation, pending, message, text, images, is_last=index == last_index)
    if instructions:
        conversation.system = "\n\n".join(instructions)
    _complete_last_question(conversation, pending)
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
    """Convert a message of the user or the model to a turn.

    A question takes the pending texts and images. The images of an answer become pending.

    Args:
        conversation: receives the turn, unless the message is left out.
        pending: texts and images for the next question.
        message: the message.
        text: the message's text.
        images: the message's images.
        is_last: whether this is the last message of the request.
    """
    if isinstance(message, AssistantMessage):
        # An answer without text is left out if it has something else, and is kept if it is empty.
        has_something_else = message.tool_calls or message.function_call or images
        if text or not has_something_else:
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


def _complete_last_question(conversation: Conversation, pending: _Pending) -> None:
    """Append pending texts to the last question. Without turns, the system prompt is the question.

    Raises:
        APIError: there is no question, or images or texts still need a later one.
    """
    turns = conversation.turns
    if not turns and conversation.system is not None:
        turns.append(Turn("user", conversation.system))
        conversation.system = None
    ends_with_answer = bool(turns) and turns[-1].role == "assistant"
    # Texts after a question can be appended to it. Texts or images after an answer cannot.
    needs_question = pending.images or (pending.texts and ends_with_answer)
    if needs_question or not any(turn.role == "user" for turn in turns):
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
