"""Semantic Kernel's services for answers and images."""

import openai
from semantic_kernel.connectors.ai.open_ai import (
    OpenAIChatCompletion,
    OpenAIChatPromptExecutionSettings,
    OpenAITextToImage,
)
from semantic_kernel.contents import ChatHistory, ChatMessageContent, ImageContent, TextContent
from trials import COLOR, IMAGE_URL, KEY, MODEL, URL, check_image, check_red, run, trial

plain = openai.AsyncOpenAI(base_url=URL, api_key=KEY, max_retries=0)
chat = OpenAIChatCompletion(ai_model_id=MODEL, async_client=plain)


def history():
    """Return a conversation with a question about an image."""
    parts = [ImageContent(data_uri=IMAGE_URL), TextContent(text=COLOR)]
    return ChatHistory(
        system_message="Be brief.", messages=[ChatMessageContent(role="user", items=parts)]
    )


@trial("answer about an image, stream")
async def _answer():
    settings = OpenAIChatPromptExecutionSettings()
    answer = await chat.get_chat_message_content(history(), settings)
    check_red(answer.content)
    stream = chat.get_streaming_chat_message_content(history(), settings)
    check_red("".join([chunk.content or "" async for chunk in stream]))


@trial("sampling fields")
async def _sampling():
    settings = OpenAIChatPromptExecutionSettings(
        temperature=0.2, top_p=0.9, seed=1, frequency_penalty=0.1, presence_penalty=0.1
    )
    check_red((await chat.get_chat_message_content(history(), settings)).content)


@trial("images without a size and with 512x512")
async def _images():
    painter = OpenAITextToImage(ai_model_id=MODEL, async_client=plain)
    for image in await painter.generate_images("a star", n=2):
        check_image(image)
    for image in await painter.generate_images("a star", width=512, height=512):
        check_image(image)


@trial("response_format")
async def _structured():
    settings = OpenAIChatPromptExecutionSettings(response_format={"type": "json_object"})
    await chat.get_chat_message_content(history(), settings)


run()
