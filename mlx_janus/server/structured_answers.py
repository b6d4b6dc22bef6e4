"""Structured answers: JSON by ``response_format``, and calls of ``tools``.

A grammar of ``decode/grammar.py`` lets the model generate only answers of the requested form. The
system prompt ends with a description of the tools. A schema is not a part of the prompt.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..decode.grammar import ANY_OBJECT, Grammar, Tool, call_grammar, schema_grammar
from ..errors import OptionError
from .errors import APIError
from .schema import (
    CalledFunction,
    ChatRequest,
    Delta,
    FunctionDelta,
    NamedTool,
    SchemaFormat,
    TextFormat,
    ToolCall,
    ToolCallDelta,
)

if TYPE_CHECKING:
    from .service import Service


@dataclass(frozen=True)
class AnswerForm:
    """The form that a request demands of its answers.

    Args:
        grammar: the grammar of an answer; None: any text.
        tools: the tools that an answer may call.
    """

    grammar: Grammar | None = None
    tools: tuple[Tool, ...] = ()

    @property
    def allows_words(self) -> bool:
        """Whether an answer may be any text that is not a call."""
        return self.grammar is None or self.grammar.allows_words

    def system(self, without_tools: str) -> str:
        """Return the system prompt with the tools at its end.

        Args:
            without_tools: the system prompt without tools; "": none.
        """
        if self.grammar is None or not self.tools:
            return without_tools
        parts = [without_tools, _instructions(self.tools, self.grammar)]
        return "\n\n".join(part for part in parts if part)


async def answer_form(
    body: ChatRequest, service: Service, format_field: str = "response_format"
) -> AnswerForm:
    """Return the form of a request's answers. The engine checks and compiles the form's grammar.

    Args:
        body: the request.
        service: the server's parts.
        format_field: the name of ``response_format`` in the client's API, for error messages.

    Raises:
        APIError: the fields contradict each other, a schema is refused, or the grammar needs a
            package that is not installed.
    """
    try:
        form = _form(body, format_field)
        if form.grammar is not None:
            if importlib.util.find_spec("llguidance") is None:
                reason = "this server cannot do it: its package llguidance is not installed"
                raise APIError(400, f"{form.grammar.subject}: {reason}", param=form.grammar.subject)
            # In a thread, because a large schema takes up to a second.
            await asyncio.to_thread(service.engine.check_grammar, form.grammar)
    except OptionError as error:
        # The message begins with the field whose schema is refused.
        field = "tools" if str(error).startswith("tools") else format_field
        raise APIError(400, str(error), param=field) from None
    return form


def _form(body: ChatRequest, format_field: str) -> AnswerForm:
    """Return the form of a request's answers.

    Raises:
        APIError: ``_tools`` refuses the tools; or the request has tools and demands JSON, but
            ``tool_choice`` does not say which of the two an answer is.
        OptionError: a schema is too deep or too large.
    """
    tools = _tools(body)
    wanted = body.response_format
    is_text = wanted is None or isinstance(wanted, TextFormat)
    if tools:
        allows_words = body.tool_choice in (None, "auto")
        if allows_words and not is_text:
            fix = 'leave one of them out, or set tool_choice to "none" or "required"'
            reason = f"JSON as {format_field} does not go with tools: {fix}"
            raise APIError(400, reason, param=format_field)
        return AnswerForm(call_grammar(tools, allows_words=allows_words), tools)
    if is_text:
        return AnswerForm()
    schema: object = ANY_OBJECT
    lenient = True
    if isinstance(wanted, SchemaFormat):
        given = wanted.json_schema.json_schema
        schema = ANY_OBJECT if given is None else given
        lenient = not wanted.json_schema.strict
    return AnswerForm(schema_grammar(schema, lenient=lenient, subject=format_field))


def _tools(body: ChatRequest) -> tuple[Tool, ...]:
    """Return the tools that an answer may call.

    Raises:
        APIError: two tools have the same name, or ``tool_choice`` demands a call without tools or
            names a tool that the request does not have.
    """
    given = [tool.function for tool in body.tools or ()]
    names = [function.name for function in given]
    if len(set(names)) < len(names):
        raise APIError(400, "tools: two functions have the same name", param="tools")
    choice = body.tool_choice
    if choice == "none":
        return ()
    if choice == "required" and not given:
        raise APIError(400, "tool_choice demands a call: add tools", param="tool_choice")
    if isinstance(choice, NamedTool):
        given = [function for function in given if function.name == choice.function.name]
        if not given:
            reason = f"there is no function {choice.function.name!r} in tools"
            raise APIError(400, f"tool_choice: {reason}", param="tool_choice")
    return tuple(
        Tool(
            function.name,
            function.parameters,
            lenient=not function.strict,
            description=function.description or "",
        )
        for function in given
    )


def _instructions(tools: Sequence[Tool], grammar: Grammar) -> str:
    """Return the text about tools for the prompt."""
    lines = ["You can call these functions:"]
    for tool in tools:
        fields = {
            "name": tool.name,
            "description": tool.description,
            "parameters": tool.parameters,
        }
        given = {key: value for key, value in fields.items() if value}
        lines.append(json.dumps(given, ensure_ascii=False))
    call = 'JSON of this form: {"name":...,"arguments":{...}}'
    if grammar.allows_words:
        lines.append(f"To call a function, answer with {call}. Otherwise answer in words.")
    else:
        lines.append(f"Call a function: answer with {call}.")
    return "\n".join(lines)


class CallReader:
    """A reader of one answer, which converts a call in JSON to OpenAI's ``tool_calls``.

    If there are tools, an answer that begins with "{" is a call. The text is added in pieces.

    Args:
        tools: the tools that the answer may call.
    """

    def __init__(self, tools: Sequence[Tool]):
        self._tools = tools
        self._text = ""
        self._tool: Tool | None = None  # the called tool, as soon as it is known
        self._sent = 0  # characters of the text that are in a delta, or before the arguments
        self._id = f"call_{secrets.token_hex(12)}"

    @property
    def complete(self) -> bool:
        """Whether the text is an entire call."""
        if self._tool is None:
            return False
        try:
            json.loads(self._text)
        except ValueError:
            return False
        return True

    @property
    def call(self) -> ToolCall | None:
        """The call; None: the answer is no call, or was cut before the call's arguments."""
        if self._tool is None:
            return None
        end = len(self._text) - self.complete  # the last "}" is not a part of the arguments
        arguments = self._text[len(self._tool.call_start) : end]
        return ToolCall(
            id=self._id, function=CalledFunction(name=self._tool.name, arguments=arguments)
        )

    def add(self, text: str) -> Delta:
        """Add a piece of the answer, and return the new part of the message.

        The last character of a call so far is held back, since it may be the "}" that ends the
        call, which is not a part of the arguments.
        """
        self._text += text
        if not self._tools or not self._text.startswith("{"):
            return Delta(content=text)
        if self._tool is not None:
            return self._arguments_to(len(self._text) - 1)
        for tool in self._tools:
            if self._text.startswith(tool.call_start):
                self._tool = tool
                self._sent = len(tool.call_start)
                function = FunctionDelta(name=tool.name, arguments="")
                start = ToolCallDelta(id=self._id, type="function", function=function)
                return Delta(tool_calls=[start])
        return Delta()

    def finish(self) -> Delta:
        """End the answer, and return the last part of the message; it may be empty."""
        if self._tool is None:
            # A call that was cut before its arguments is sent as text.
            is_held = self._tools and self._text.startswith("{")
            return Delta(content=self._text) if is_held else Delta()
        # The last "}" of a complete call is not a part of the arguments.
        return self._arguments_to(len(self._text) - self.complete)

    def _arguments_to(self, end: int) -> Delta:
        """Return the arguments up to a position of the text that are in no delta yet."""
        new = self._text[self._sent : end]
        if not new:
            return Delta()
        self._sent = end
        return Delta(tool_calls=[ToolCallDelta(function=FunctionDelta(arguments=new))])
