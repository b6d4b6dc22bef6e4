"""The tools of a request: functions as in chat, and ``image_generation``.

To the grammar, ``image_generation`` is a function without arguments: the model decides whether to
draw, and the prompt is the text of the last question. If a request demands an image, and nothing
else, the model is not asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import APIError
from ..schema import Function, FunctionTool
from .schema import (
    AllowedTools,
    FunctionChoice,
    ImageChoice,
    ImageTool,
    OtherTool,
    ResponsesFunction,
    ResponsesRequest,
)

IMAGE_TOOL = "image_generation"
_DESCRIPTION = "Draw the image that the user asks for."

_Tool = ResponsesFunction | ImageTool


@dataclass(frozen=True)
class ToolPlan:
    """The tools that a response may use.

    Args:
        functions: the functions that an answer may call; ``IMAGE_TOOL`` is one of them if the model
            may draw.
        choice: whether the answer may be words, or has to be a call.
        image: the settings of an image; None: the model may not draw.
        draws_at_once: whether the response is an image in any case.
    """

    functions: tuple[FunctionTool, ...] = ()
    choice: Literal["auto", "required"] = "auto"
    image: ImageTool | None = None
    draws_at_once: bool = False


def plan_tools(body: ResponsesRequest) -> ToolPlan:
    """Return the tools that a response may use.

    Raises:
        APIError: a tool is not supported, two tools have the same name, or ``tool_choice`` names a
            tool that is not there.
    """
    tools = _supported_tools(body.tools or ())
    choice = body.tool_choice or "auto"
    if isinstance(choice, AllowedTools):
        tools = _chosen(tools, choice.tools)
        choice = choice.mode
    elif isinstance(choice, ImageChoice):
        tools = _chosen(tools, [{"type": IMAGE_TOOL}])
        choice = "required"
    elif isinstance(choice, FunctionChoice):
        tools = _chosen(tools, [{"type": "function", "name": choice.name}])
        choice = "required"
    if choice == "none":
        return ToolPlan()
    image = next((tool for tool in tools if isinstance(tool, ImageTool)), None)
    draws_at_once = choice == "required" and image is not None and len(tools) == 1
    return ToolPlan(tuple(map(_function, tools)), choice, image, draws_at_once)


def _supported_tools(given: Sequence[_Tool | OtherTool]) -> list[_Tool]:
    """Return the tools of a request.

    Raises:
        APIError: a tool is a built-in one that this server does not have, or two tools have the
            same name.
    """
    tools: list[_Tool] = []
    for index, tool in enumerate(given):
        if isinstance(tool, OtherTool):
            reason = f"the tool {tool.type!r} is not supported: leave it out"
            raise APIError(400, f"tools[{index}]: {reason}", param=f"tools[{index}]")
        tools.append(tool)
    names = [_name(tool) for tool in tools]
    if len(set(names)) < len(names):
        raise APIError(400, "tools: two tools have the same name", param="tools")
    return tools


def _name(tool: _Tool) -> str:
    """Return a tool's name; for the drawing tool, which has none, its type."""
    return IMAGE_TOOL if isinstance(tool, ImageTool) else tool.name


def _chosen(tools: Sequence[_Tool], wanted: Sequence[dict[str, Any]]) -> list[_Tool]:
    """Return the tools that ``tool_choice`` names.

    Args:
        tools: all tools.
        wanted: the tools that ``tool_choice`` names: a "name" for a function, or only a "type".

    Raises:
        APIError: a wanted tool is not there.
    """
    wanted_names = [reference.get("name", reference.get("type")) for reference in wanted]
    names = [_name(tool) for tool in tools]
    for name in wanted_names:
        if name not in names:
            raise APIError(400, f"tool_choice: there is no {name!r} in tools", param="tool_choice")
    return [tool for tool in tools if _name(tool) in wanted_names]


def _function(tool: _Tool) -> FunctionTool:
    """Return a tool as a chat's function."""
    if isinstance(tool, ImageTool):
        function = Function(name=IMAGE_TOOL, description=_DESCRIPTION)
    else:
        function = Function(
            name=tool.name,
            description=tool.description,
            parameters=tool.parameters,
            strict=tool.strict,
        )
    return FunctionTool(type="function", function=function)
