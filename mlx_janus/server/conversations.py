"""OpenAI's messages as the model's turns.

The model's template knows a system prompt, questions with images, and answers. Messages of other
kinds become a part of the next question: instructions amid the conversation, results of tools, and
images in an answer.

The parts of a message become lines. Interleaved texts and images stay in order. If all images
follow the texts, the images are put first: many clients send a question and then the images that it
is about, and the models were trained with the images first.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ..processing.prompts import Turn
from .errors import APIError
from .images import ImageSource
from .schema import (
    MAX_MESSAGES,
    AssistantMessage,
    ImagePart,
    LocatedImage,
    Message,
    SystemMessage,
    TextPart,
    ToolMessage,
)

_EMPTY_RESULT = "(no output)"  # the text of a question that is an empty result of a tool

Part = str | ImageSource
"""A text or an image of a message."""


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
    are_question: bool = False  # whether they become a question if no message of the user follows


def check_message_count(messages: Sequence[Message], field_name: str) -> None:
    """Check the number of messages in a request that was translated from another API.

    Args:
        messages: the translated messages.
        field_name: the field of the client's request that the messages come from.

    Raises:
        APIError: there is no message, or more than ``MAX_MESSAGES``.
    """
    if not messages:
        reason = "there is no message: add one of the user"
    elif len(messages) > MAX_MESSAGES:
        reason = f"there are {len(messages)} messages, but a request has at most {MAX_MESSAGES}"
    else:
        return
    raise APIError(400, f"{field_name}: {reason}", param=field_name)


def read_conversation(messages: Sequence[Message]) -> Conversation:
    """Convert messages to turns.

    - System messages at the beginning become the system prompt, joined by blank lines. If they are
      the only messages, they become the question.
    - Later system messages and results of tools are put before the next question. Those that follow
      the last question are appended to it.
    - Results of tools after an answer with a call, and with words or images, are a question if no
      question follows them.
    - Images of an answer are put before the next question.
    - An answer without text that has tool calls or images becomes no turn. Nor does an empty
      question that is not the last message.
    - If the last message is an answer, the model continues it.

    Raises:
        APIError: there is no question; or the last answer has images, or system messages or results
            of tools follow it, but no question does.
    """
    conversation = Conversation()
    instructions = []
    pending = _Pending()
    answers: list[AssistantMessage] = []  # since the last question or result of a tool
    last_index = len(messages) - 1
    for index, message in enumerate(messages):
        parts = _parts(message, f"messages[{index}].content")
        if isinstance(message, SystemMessage) and not conversation.turns:
            instructions.append(_text(parts))
        elif isinstance(message, SystemMessage):
            pending.texts.append(_text(parts))
        elif isinstance(message, ToolMessage):
            pending.texts.append(_text(parts))
            pending.are_question |= _call_follows_content(answers)
            answers.clear()
        elif isinstance(message, AssistantMessage):
            _add_pending_question(conversation, pending)
            _add_answer(conversation, pending, message, parts)
            answers.append(message)
        else:
            answers.clear()
            _add_question(conversation, pending, parts, is_last=index == last_index)
    if instructions:
        conversation.system = "\n\n".join(instructions)
    _complete_last_question(conversation, pending)
    return conversation


def _add_answer(
    conversation: Conversation, pending: _Pending, message: AssistantMessage, parts: Sequence[Part]
) -> None:
    """Convert an answer to a turn; its images become pending.

    Args:
        conversation: receives the turn, unless the answer is left out.
        pending: texts and images for the next question.
        message: the answer.
        parts: the answer's parts.
    """
    text = _text(parts)
    images = _images(parts)
    # An answer with only tool calls or images becomes no turn. An answer with nothing becomes an
    # empty turn.
    has_other_content = message.tool_calls or message.function_call or images
    if text or not has_other_content:
        conversation.turns.append(Turn("assistant", text))
    pending.images += images


def _add_question(
    conversation: Conversation, pending: _Pending, parts: Sequence[Part], *, is_last: bool
) -> None:
    """Convert a message of the user to a turn, with the pending texts and images.

    Args:
        conversation: receives the turn, unless the question is empty and not the last message.
        pending: texts and images for the question; emptied if the question becomes a turn.
        parts: the message's parts.
        is_last: whether this is the last message of the request.
    """
    images = [*pending.images, *_images(parts)]
    if _are_interleaved(parts):
        turn = _in_order([*pending.images, *pending.texts, *parts])
    else:
        text = "\n".join([*pending.texts, _text(parts)]).strip()
        turn = Turn("user", text, images=len(images))  # without places: images first
    if turn.text or images or is_last:
        conversation.turns.append(turn)
        conversation.images += images
        pending.texts.clear()
        pending.images.clear()
        pending.are_question = False


def _add_pending_question(conversation: Conversation, pending: _Pending) -> None:
    """Convert pending results of tools to a question, if they are one."""
    follow_answer = bool(conversation.turns) and conversation.turns[-1].role == "assistant"
    if pending.are_question and (follow_answer or pending.images):
        is_empty = not pending.images and not "".join(pending.texts).strip()
        parts = [_EMPTY_RESULT] if is_empty else []
        _add_question(conversation, pending, parts, is_last=True)


def _call_follows_content(answers: Sequence[AssistantMessage]) -> bool:
    """Return whether answers in a row have a call of a tool, and words or images."""
    has_call = any(answer.tool_calls or answer.function_call for answer in answers)
    return has_call and any(answer.content for answer in answers)


def _are_interleaved(parts: Sequence[Part]) -> bool:
    """Return whether a text stands between images, or an image between texts.

    Blank texts do not count.
    """
    filled = (part for part in parts if isinstance(part, ImageSource) or part.strip())
    # One item for each run of texts or of images, such as [False, True] for images after texts.
    runs = [is_image for is_image, _ in itertools.groupby(filled, _is_image)]
    return len(runs) > 2


def _in_order(parts: Sequence[Part]) -> Turn:
    """Return a question whose lines are the given texts and images, in this order."""
    texts: list[str] = []
    places: list[int] = []  # for each image, the number of characters before it
    length = 0  # characters of ``texts``
    for part in parts:
        if part == "":  # it would be an empty line
            continue
        if texts or places:
            texts.append("\n")
            length += 1
        if isinstance(part, ImageSource):
            places.append(length)
        else:
            texts.append(part)
            length += len(part)
    return Turn("user", "".join(texts), len(places), tuple(places))


def _complete_last_question(conversation: Conversation, pending: _Pending) -> None:
    """Append pending texts to the last question, or make them a question if they are one.

    Without turns, the system prompt is the question.

    Raises:
        APIError: there is no question, or pending images or texts need a later question.
    """
    _add_pending_question(conversation, pending)
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
        turns[-1] = replace(question, text=text)


def _parts(message: Message, content_field: str) -> list[Part]:
    """Return the texts and images of a message, in order; [] if the message has no content.

    Refusals are left out.

    Args:
        message: the message.
        content_field: the field that holds the message's content, such as "messages[0].content".
    """
    if isinstance(message.content, str):
        return [message.content]
    parts: list[Part] = []
    for index, part in enumerate(message.content or ()):
        if isinstance(part, TextPart):
            parts.append(part.text)
        elif isinstance(part, ImagePart):
            url_field = f"{content_field}[{index}].image_url.url"
            if isinstance(part, LocatedImage):  # the client's API has another name for the field
                url_field = part.field
            parts.append(ImageSource(part.image_url.url, url_field))
    return parts


def _is_image(part: Part) -> bool:
    return isinstance(part, ImageSource)


def _text(parts: Sequence[Part]) -> str:
    """Return the texts of a message as lines."""
    return "\n".join(part for part in parts if isinstance(part, str))


def _images(parts: Sequence[Part]) -> list[ImageSource]:
    return [part for part in parts if isinstance(part, ImageSource)]
