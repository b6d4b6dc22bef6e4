"""LlamaIndex with OpenAILike, as a chat model."""

import asyncio

from llama_index.core.base.llms.types import ChatMessage, ImageBlock, TextBlock
from llama_index.core.chat_engine import SimpleChatEngine
from llama_index.llms.openai_like import OpenAILike
from trials import COLOR, IMAGE, KEY, MODEL, URL, check_red, run, trial

COMMON = {"model": MODEL, "api_base": URL, "api_key": KEY, "max_retries": 0}
chat = OpenAILike(**COMMON, is_chat_model=True, context_window=1024, max_tokens=64)
QUESTION = ChatMessage(role="user", blocks=[ImageBlock(path=IMAGE), TextBlock(text=COLOR)])


@trial("answer about an image, from a path and from bytes")
def _answer():
    check_red(chat.chat([QUESTION]).message.content)
    block = ImageBlock(image=IMAGE.read_bytes(), image_mimetype="image/png")
    question = ChatMessage(role="user", blocks=[block, TextBlock(text=COLOR)])
    check_red(chat.chat([question]).message.content)


@trial("stream, async")
def _stream():
    *_, last = chat.stream_chat([QUESTION])
    check_red(last.message.content)
    check_red(asyncio.run(chat.achat([QUESTION])).message.content)


@trial("second turn, and a chat engine")
def _second_turn():
    answer = chat.chat([QUESTION]).message
    question = ChatMessage(role="user", content="How many shapes are there?")
    assert chat.chat([QUESTION, answer, question]).message.content
    engine = SimpleChatEngine.from_defaults(llm=chat)
    assert engine.chat("Hello").response
    assert engine.chat("And?").response


@trial("sampling fields")
def _sampling():
    fields = {"top_p": 0.9, "frequency_penalty": 0.1, "extra_body": {"top_k": 5, "min_p": 0.1}}
    check_red(chat.chat([QUESTION], **fields).message.content)


@trial("complete with is_chat_model=True")
def _complete():
    assert chat.complete("Hello").text


@trial("is_chat_model=False, the default")
def _completions():
    assert OpenAILike(**COMMON).complete("The picture shows").text


@trial("as_structured_llm")
def _structured():
    from pydantic import BaseModel

    class Shape(BaseModel):
        color: str

    caller = OpenAILike(**COMMON, is_chat_model=True, is_function_calling_model=True)
    caller.as_structured_llm(Shape).chat([QUESTION])


run()
