"""Anthropic's requests as chat requests."""

from __future__ import annotations

from collections.abc import Sequence

from ..conversations import check_message_count
from ..errors import APIError
from ..schema import (
    AssistantMessage,
    ChatRequest,
    Function,
    FunctionName,
    FunctionTool,
    ImagePart,
    ImageURL,
    LocatedImage,
    Message,
    NamedSchema,
    NamedTool,
    SamplingFields,
    SchemaFormat,
    SystemMessage,
    TextPart,
    ToolMessage,
    UserMessage,
)
from .schema import (
    Base64Source,
    Block,
    CustomTool,
    ImageBlock,
    MessageParam,
    MessagesRequest,
    NamedToolChoice,
    PromptFields,
    TextBlock,
    ToolResultBlock,
    ToolUseBlock,
)

FORMAT_FIELD = "output_config.format"
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}  # Anthropic's name -> a chat's
_Part = TextPart | ImagePart


def to_chat(body: PromptFields) -> ChatRequest:
    """Return a chat request with the same prompt and, for a ``MessagesRequest``, the same options.

    Raises:
        APIError: a tool is one that Anthropic provides, instructions have an image, or there are
            too many messages.
    """
    fields = {}
    if isinstance(body, MessagesRequest):
        # Anthropic's API has no log-probabilities.
        names = SamplingFields.model_fields.keys() - {"logprobs", "top_logprobs"}
        fields = {name: getattr(body, name) for name in names}
        fields |= {"max_tokens": body.max_tokens, "stop": body.stop_sequences, "seed": body.seed}
    wanted = body.output_config.format if body.output_config else None
    if wanted is not None:
        schema = NamedSchema(schema=wanted.json_schema)
        fields["response_format"] = SchemaFormat(type="json_schema", json_schema=schema)
    choice = body.tool_choice
    if isinstance(choice, NamedToolChoice):
        fields["tool_choice"] = NamedTool(type="function", function=FunctionName(name=choice.name))
    elif choice is not None:
        fields["tool_choice"] = _CHOICES[choice.type]
    tools = [_to_function(tool, index) for index, tool in enumerate(body.tools or ())]
    return ChatRequest(messages=_to_messages(body), tools=tools, **fields)


def _to_function(tool: CustomTool, index: int) -> FunctionTool:
    """Return a tool as a chat's function.

    Args:
        tool: the tool.
        index: its index among the request's tools, for the error.

    Raises:
        APIError: the tool is one that Anthropic provides, such as its web search.
    """
    if tool.type not in (None, "custom"):
        reason = f"the tool {tool.type!r} is not supported: leave it out"
        raise APIError(400, f"tools[{index}]: {reason}", param="tools")
    function = Function(
        name=tool.name,
        description=tool.description,
        parameters=tool.input_schema,
        strict=tool.strict,
    )
    return FunctionTool(type="function", function=function)


def _to_messages(body: PromptFields) -> list[Message]:
    """Return the system prompt and the conversation as a chat's messages.

    Raises:
        APIError: instructions have an image, or there are too many messages.
    """
    messages: list[Message] = []
    system = body.system
    if system is not None:
        texts = [system] if isinstance(system, str) else [block.text for block in system]
        messages.append(SystemMessage(role="system", content="\n\n".join(texts)))
    for index, message in enumerate(body.messages):
        place = f"messages[{index}].content"
        if message.role == "system":
            messages.append(_instructions(message, place))
        elif message.role == "assistant":
            messages.append(_answer(message, place))
        else:
            messages.append(_question(message, place))
    check_message_count(messages, "messages")
    return messages


def _instructions(message: MessageParam, place: str) -> SystemMessage:
    """Return instructions amid the conversation as a chat's message.

    Args:
        message: the instructions.
        place: the field that holds their content.

    Raises:
        APIError: the instructions have an image.
    """
    if isinstance(message.content, str):
        return SystemMessage(role="system", content=message.content)
    parts = _parts(message.content, place)
    texts = [part for part in parts if isinstance(part, TextPart)]
    if len(texts) < len(parts):
        reason = "instructions have no images: put the image into a message of the user"
        raise APIError(400, f"{place}: {reason}", param=place)
    return SystemMessage(role="system", content=texts)


def _answer(message: MessageParam, place: str) -> AssistantMessage:
    """Return an earlier answer as a chat's message. The prompt leaves its calls of tools out.

    Args:
        message: the answer.
        place: the field that holds its content.
    """
    if isinstance(message.content, str):
        return AssistantMessage(role="assistant", content=message.content)
    calls = [block.name for block in message.content if isinstance(block, ToolUseBlock)]
    parts = _parts(message.content, place)
    return AssistantMessage(role="assistant", content=[*parts] or None, tool_calls=calls or None)


def _question(message: MessageParam, place: str) -> UserMessage | ToolMessage:
    """Return a message of the user as a chat's message. Its results of tools come first.

    A question cannot be empty. So a message with results, but without any text or image, becomes an
    empty result.

    Args:
        message: the message.
        place: the field that holds its content.
    """
    if isinstance(message.content, str):
        return UserMessage(role="user", content=message.content)
    parts: list[_Part] = []
    has_results = False
    for index, block in enumerate(message.content):
        if isinstance(block, ToolResultBlock):
            has_results = True
            parts += _result_parts(block, f"{place}[{index}].content")
    parts += _parts(message.content, place)
    texts = [part.text for part in parts if isinstance(part, TextPart)]
    if has_results and len(texts) == len(parts) and not "".join(texts).strip():
        return ToolMessage(role="tool", content="")
    return UserMessage(role="user", content=[*parts])


def _result_parts(block: ToolResultBlock, place: str) -> list[_Part]:
    """Return the parts of a tool's result.

    Args:
        block: the result.
        place: the field that holds its content.
    """
    if isinstance(block.content, str):
        return [TextPart(type="text", text=block.content)]
    return _parts(block.content or (), place)


def _parts(blocks: Sequence[Block], place: str) -> list[_Part]:
    """Return texts and images as a chat's parts. Other blocks are left out.

    Args:
        blocks: the blocks.
        place: the field that holds them, such as "messages[0].content".
    """
    parts: list[_Part] = []
    for index, block in enumerate(blocks):
        if isinstance(block, TextBlock):
            parts.append(TextPart(type="text", text=block.text))
        elif isinstance(block, ImageBlock):
            source = block.source
            if isinstance(source, Base64Source):
                url = f"data:application/octet-stream;base64,{source.data}"
                field = f"{place}[{index}].source.data"
            else:
                url = source.url
                field = f"{place}[{index}].source.url"
            image = LocatedImage(type="image_url", image_url=ImageURL(url=url), field=field)
            parts.append(image)
    return parts
