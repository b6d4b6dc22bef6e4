"""Haystack's generators of answers and images."""

import asyncio

from haystack.components.generators import OpenAIImageGenerator
from haystack.components.generators.chat import OpenAIChatGenerator, OpenAIResponsesChatGenerator
from haystack.dataclasses import ChatMessage, ImageContent
from haystack.utils import Secret
from trials import COLOR, IMAGE, KEY, MODEL, URL, check_image, check_red, run, trial

COMMON = {"api_key": Secret.from_token(KEY), "api_base_url": URL, "max_retries": 0}
QUESTION = ChatMessage.from_user(content_parts=[ImageContent.from_file_path(IMAGE), COLOR])


def chat(**options):
    """Return a generator of answers."""
    return OpenAIChatGenerator(model=MODEL, **COMMON, **options)


@trial("answer about an image, and a second turn")
def _answer():
    answer = chat().run([QUESTION])["replies"][0]
    check_red(answer.text)
    question = ChatMessage.from_user("How many shapes are there?")
    assert chat().run([QUESTION, answer, question])["replies"][0].text


@trial("stream, async")
def _stream():
    chunks = []
    chat(streaming_callback=chunks.append).run([QUESTION])
    check_red("".join(chunk.content for chunk in chunks))
    check_red(asyncio.run(chat().run_async([QUESTION]))["replies"][0].text)


@trial("sampling fields")
def _sampling():
    fields = {"top_p": 0.9, "frequency_penalty": 0.1, "presence_penalty": 0.1, "seed": 1}
    check_red(chat(generation_kwargs=fields).run([QUESTION])["replies"][0].text)


@trial("OpenAIImageGenerator with its defaults")
def _image():
    check_image(OpenAIImageGenerator(model="gpt-image-1", **COMMON).run("a star")["images"][0])


@trial("response_format")
def _structured():
    chat(generation_kwargs={"response_format": {"type": "json_object"}}).run([QUESTION])


@trial("OpenAIResponsesChatGenerator")
def _responses():
    generator = OpenAIResponsesChatGenerator(model=MODEL, **COMMON)
    check_red(generator.run([QUESTION])["replies"][0].text)


run()
