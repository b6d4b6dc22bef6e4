"""The MCP server: it lists the tools, calls them, and turns every failure into one line."""

from __future__ import annotations

import asyncio
from typing import Any

from mcp.server.context import ServerRequestContext
from mcp.server.lowlevel import Server
from mcp_types import (
    CallToolRequestParams,
    CallToolResult,
    ListToolsResult,
    PaginatedRequestParams,
    TextContent,
)

from ..errors import one_line
from ..inference.pathway import EditingPathway
from ..version import __version__
from .calls import ToolCalls
from .host import Host
from .progress import ProgressReporter
from .tools import tools

_LISTING_WAIT = 3.0  # seconds that a client waits for the model before it gets the list of tools
_INSTRUCTIONS = (
    "Janus is a local model that draws images, answers questions about images, and may change "
    "them. Show drawn images to the user, and name their seeds: a seed draws the same image again."
)


def create_server(host: Host) -> Server[Any]:
    """Return the MCP server of a host. Any transport can run it, for any number of clients."""
    calls = ToolCalls(host)

    async def list_tools(
        _: ServerRequestContext[Any], __: PaginatedRequestParams | None
    ) -> ListToolsResult:
        """List the tools. The tool that changes images is left out if the model cannot do it."""
        can_edit = await _can_edit(host)
        return ListToolsResult(tools=tools(saves_images=host.saves_images, can_edit=can_edit))

    async def call_tool(
        context: ServerRequestContext[Any], params: CallToolRequestParams
    ) -> CallToolResult:
        """Call a tool. A failure becomes a result with one line of text."""
        wants_progress = bool(context.meta and "progress_token" in context.meta)
        progress = ProgressReporter(context.session, wants_progress)
        try:
            content = await calls.call(params.name, params.arguments, progress)
        except Exception as error:
            message = TextContent(text=one_line(host.explain(error)))
            return CallToolResult(content=[message], is_error=True)
        return CallToolResult(content=content)

    return Server(
        "mlx-janus",
        version=__version__,
        title="Janus",
        description="Draws images, reads images and changes images, with a local model.",
        instructions=_INSTRUCTIONS,
        on_list_tools=list_tools,
        on_call_tool=call_tool,
    )


async def _can_edit(host: Host) -> bool:
    """Return whether the model can change images.

    True if it is not loaded within ``_LISTING_WAIT`` seconds: a call will tell if it cannot.
    """
    try:
        async with asyncio.timeout(_LISTING_WAIT):
            async with host.engine() as engine:
                return isinstance(engine.pathway, EditingPathway)
    except Exception:  # a timeout, or a failure that a call of a tool will report
        return True
