"""The items of a request as a chat's messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..conversations import check_message_count
from ..errors import APIError
from ..images import ImageSource
from ..schema import (
    AssistantMessage,
    ImageURL,
    LocatedImage,
    Message,
    SystemMessage,
    TextPart,
    ToolMessage,
    UserMessage,
)
from .schema import (
    CallItem,
    CallOutputItem,
    ImageItem,
    InputImage,
    MessageItem,
    Part,
    ReferenceItem,
    Refusal,
    ResponsesRequest,
)

_ChatPart = TextPart | LocatedImage


@dataclass
class ResponsesInput:
    """The input of a request.

    Args:
        messages: the messages, with the instructions first.
        prompt: the texts of the last question, as lines; the prompt of an image.
        images: the images of the last question.
        last_image: the last image of the input; None: there is no image.
    """

    messages: list[Message] = field(default_factory=list)
    prompt: str = ""
    images: list[ImageSource] = field(default_factory=list)
    last_image: ImageSource | None = None


def read_input(body: ResponsesRequest) -> ResponsesInput:
    """Convert the input to messages.

    - An earlier call of a function becomes an answer without text, which the prompt leaves out.
    - The result of a function becomes a tool's message, or with images a message of the user.
    - An image that was generated earlier becomes an image of an answer. It is shown with the next
      question or, without a next question, with the last one.
    - The reasoning of another model is left out.

    Raises:
        APIError: an item refers to a stored one, a message of the system has an image, or there are
            no or too many messages.
    """
    found = ResponsesInput()
    if body.instructions:
        found.messages.append(SystemMessage(role="system", content=body.instructions))
    if isinstance(body.input, str):
        found.messages.append(UserMessage(role="user", content=body.input))
        found.prompt = body.input
        return found
    for index, item in enumerate(body.input):
        place = f"input[{index}]"
        if isinstance(item, MessageItem):
            _add_message(found, item, place)
        elif isinstance(item, CallItem):
            call = {"name": item.name, "arguments": item.arguments}
            found.messages.append(AssistantMessage(role="assistant", tool_calls=[call]))
        elif isinstance(item, CallOutputItem):
            _add_call_output(found, item, place)
        elif isinstance(item, ImageItem) and item.result:
            url = f"data:application/octet-stream;base64,{item.result}"
            image = _located(url, f"{place}.result")
            found.messages.append(AssistantMessage(role="assistant", content=[image]))
            found.last_image = ImageSource(url, image.field)
        elif isinstance(item, ReferenceItem):
            fix = "send the item itself; many clients do so with store: false"
            raise APIError(400, f"this server stores no items: {fix}", param=place)
    _show_last_images(found.messages)
    check_message_count(found.messages, "input")
    return found


def _show_last_images(messages: list[Message]) -> None:
    """Move generated images that end a conversation into the question before them.

    If the message before them is no question, they stay at the end, as one answer.
    """
    images: list[LocatedImage] = []
    while messages and (last_images := _generated_images(messages[-1])):
        images = [*last_images, *images]
        messages.pop()
    question = messages[-1] if messages else None
    if images and isinstance(question, UserMessage):
        assert not isinstance(question.content, str)  # ``_add_message`` makes parts of a text
        messages[-1] = UserMessage(role="user", content=[*images, *question.content])
    elif images:
        messages.append(AssistantMessage(role="assistant", content=[*images]))


def _generated_images(message: Message) -> list[LocatedImage]:
    """Return the images of an answer that has nothing else; [] for another message."""
    if not isinstance(message, AssistantMessage) or not isinstance(message.content, list):
        return []
    images = [part for part in message.content if isinstance(part, LocatedImage)]
    return images if len(images) == len(message.content) else []


def _add_message(found: ResponsesInput, item: MessageItem, place: str) -> None:
    """Add a message. If it is the user's, replace ``prompt`` and ``images``, too.

    Args:
        found: receives the message.
        item: the message.
        place: the field that holds it, such as "input[0]".

    Raises:
        APIError: a message of the system has an image.
    """
    parts = _parts(item.content, f"{place}.content")
    texts = [part for part in parts if isinstance(part, TextPart)]
    images = [part for part in parts if isinstance(part, LocatedImage)]
    sources = [ImageSource(image.image_url.url, image.field) for image in images]
    if item.role in ("system", "developer"):
        if images:
            message = "instructions have no images: put the image into a message of the user"
            raise APIError(400, message, param=images[0].field)
        found.messages.append(SystemMessage(role="system", content=texts))
    elif item.role == "assistant":
        found.messages.append(AssistantMessage(role="assistant", content=[*parts]))
    else:
        found.messages.append(UserMessage(role="user", content=[*parts]))
        found.prompt = "\n".join(part.text for part in texts)
        found.images = sources
    if sources:
        found.last_image = sources[-1]


def _add_call_output(found: ResponsesInput, item: CallOutputItem, place: str) -> None:
    """Add the result of a function as a tool's message; with images, as a message of the user.

    Args:
        found: receives the result.
        item: the result.
        place: the field that holds it, such as "input[0]".
    """
    parts = _parts(item.output, f"{place}.output")
    texts = [part for part in parts if isinstance(part, TextPart)]
    if len(texts) < len(parts):
        found.messages.append(UserMessage(role="user", content=[*parts]))
    else:
        found.messages.append(ToolMessage(role="tool", content=texts))


def _parts(content: str | Sequence[Part], place: str) -> list[_ChatPart]:
    """Return the parts of a content as a chat's parts. Refusals are left out.

    Args:
        content: a text or parts.
        place: the field that holds them, such as "input[0].content".
    """
    if isinstance(content, str):
        return [TextPart(type="text", text=content)]
    parts: list[_ChatPart] = []
    for index, part in enumerate(content):
        if isinstance(part, InputImage):
            parts.append(_located(part.image_url, f"{place}[{index}].image_url"))
        elif not isinstance(part, Refusal):
            parts.append(TextPart(type="text", text=part.text))
    return parts


def _located(url: str, place: str) -> LocatedImage:
    """Return an image as a chat's part that remembers ``place``, the field that holds it."""
    return LocatedImage(type="image_url", image_url=ImageURL(url=url), field=place)
