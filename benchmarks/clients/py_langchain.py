"""LangChain: ChatOpenAI, its agents' messages, and DallEAPIWrapper."""

import asyncio
import base64

from langchain_community.utilities.dalle_image_generator import DallEAPIWrapper
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from trials import (
    COLOR,
    IMAGE,
    IMAGE_URL,
    KEY,
    MODEL,
    TOO_LONG,
    URL,
    check_image,
    check_red,
    check_refused,
    fetch,
    run,
    trial,
)

COMMON = {"model": MODEL, "base_url": URL, "api_key": KEY, "max_retries": 0}
chat = ChatOpenAI(**COMMON)
DATA = base64.b64encode(IMAGE.read_bytes()).decode()


def question(block=None):
    """Return a question about an image."""
    image = block or {"type": "image_url", "image_url": {"url": IMAGE_URL}}
    return HumanMessage([image, {"type": "text", "text": COLOR}])


@trial("three kinds of image blocks")
def _blocks():
    check_red(chat.invoke([question()]).content)
    for block in (
        {"type": "image", "base64": DATA, "mime_type": "image/png"},
        {"type": "image", "source_type": "base64", "data": DATA, "mime_type": "image/png"},
    ):
        check_red(chat.invoke([question(block)]).content)


@trial("stream and usage")
def _stream():
    chunks = list(ChatOpenAI(**COMMON, stream_usage=True).stream([question()]))
    check_red("".join(chunk.content for chunk in chunks))
    assert any(chunk.usage_metadata for chunk in chunks)


@trial("batch and async")
def _batch():
    for answer in chat.batch([[question()]] * 3):
        check_red(answer.content)
    check_red(asyncio.run(chat.ainvoke([question()])).content)


@trial("bound tool, and its result in the history")
def _tools():
    @tool
    def weather(place: str) -> str:
        """Return the weather."""
        return place

    call = {"name": "weather", "args": {"place": "Rome"}, "id": "1", "type": "tool_call"}
    answer = chat.bind_tools([weather]).invoke(
        [
            SystemMessage("Be brief."),
            question(),
            AIMessage("", tool_calls=[call]),
            ToolMessage("sunny", tool_call_id="1"),
        ]
    )
    assert isinstance(answer.content, str)


@trial("ContextOverflowError")
def _too_long():
    check_refused(lambda: chat.invoke(TOO_LONG), ContextOverflowError)


@trial("sampling fields")
def _sampling():
    sampled = ChatOpenAI(
        **COMMON, temperature=0.3, top_p=0.9, seed=1, frequency_penalty=0.1, presence_penalty=0.1
    )
    check_red(sampled.invoke([question()]).content)
    answer = ChatOpenAI(**COMMON, logprobs=True, top_logprobs=2).invoke([question()])
    assert answer.response_metadata["logprobs"]["content"]


@trial("DallEAPIWrapper with its defaults")
def _dalle():
    check_image(fetch(DallEAPIWrapper(api_key=KEY, base_url=URL, model="dall-e-3").run("a star")))


@trial("with_structured_output")
def _structured():
    schema = {"title": "shape", "description": "A shape", "type": "object", "properties": {}}
    chat.with_structured_output(schema).invoke([question()])


@trial("use_responses_api")
def _responses():
    check_red(ChatOpenAI(**COMMON, use_responses_api=True).invoke([question()]).text)


@trial("OpenAI")
def _completions():
    assert OpenAI(**COMMON).invoke("The picture shows")


run()
