"""OpenAI's own package."""

import asyncio
import base64
import time

import openai
from trials import (
    COLOR,
    IMAGE_URL,
    KEY,
    MODEL,
    TOO_LONG,
    URL,
    check_image,
    check_red,
    check_refused,
    fetch,
    is_idle,
    message,
    run,
    text_of,
    trial,
)

client = openai.OpenAI(base_url=URL, api_key=KEY, max_retries=0, timeout=60)


def ask(*messages, model=MODEL, **fields):
    """Return the answer to a conversation; by default to a question about an image."""
    messages = messages or (message(COLOR, IMAGE_URL),)
    return client.chat.completions.create(model=model, messages=list(messages), **fields)


def draw(**fields):
    """Return the reply with the images of a prompt."""
    return client.images.generate(**{"model": MODEL, "prompt": "a red circle"} | fields)


def user(text):
    """Return a question without an image."""
    return {"role": "user", "content": text}


@trial("models")
def _models():
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


@trial("answer about an image")
def _answer():
    answer = ask()
    check_red(answer.choices[0].message.content)
    assert answer.usage.prompt_tokens > 0
    assert answer._request_id


@trial("another name of the model")
def _alias():
    check_red(ask(model="gpt-4o").choices[0].message.content)


@trial("stream with usage")
def _stream():
    chunks = list(ask(stream=True, stream_options={"include_usage": True}))
    check_red(text_of(chunks))
    assert chunks[-1].usage.completion_tokens > 0


@trial("stream helper")
def _stream_helper():
    with client.chat.completions.stream(
        model=MODEL, messages=[message(COLOR, IMAGE_URL)]
    ) as stream:
        for _ in stream:
            pass
        check_red(stream.get_final_completion().choices[0].message.content)


@trial("second turn")
def _second_turn():
    first = message(COLOR, IMAGE_URL)
    answer = ask(first).choices[0].message
    second = ask(first, answer, user("How many shapes are there?"))
    assert second.choices[0].message.content
    assert second.usage.prompt_tokens_details.cached_tokens > 0


@trial("n, seed, stop, max_tokens")
def _options():
    choices = ask(user("Hello"), n=2, seed=3, temperature=1, max_completion_tokens=5).choices
    again = ask(user("Hello"), n=2, seed=3, temperature=1, max_tokens=5).choices
    assert [choice.message.content for choice in choices] == [one.message.content for one in again]
    assert "red" not in ask(stop="red").choices[0].message.content


@trial("fields without effect")
def _fields():
    answer = ask(
        user="me", metadata={"a": "b"}, store=False, service_tier="auto", reasoning_effort="low",
        verbosity="low", modalities=["text"], parallel_tool_calls=False, safety_identifier="x",
        prompt_cache_key="x", response_format={"type": "text"}, tool_choice="auto",
        tools=[{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    )  # fmt: skip
    check_red(answer.choices[0].message.content)


@trial("odd conversations")
def _odd_conversations():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    conversations = {
        "system message later": [user("Hello"), {"role": "system", "content": "Be brief."}],
        "answer to continue": [user("Hello"), {"role": "assistant", "content": "The"}],
        "tool": [
            user("Hello"),
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "It is red."},
        ],
        "empty answer": [user("Hello"), {"role": "assistant", "content": ""}, user("And?")],
        "system message only": [{"role": "system", "content": "Hello"}],
        "two questions": [user("Hello"), user("And?")],
        "refusal": [
            user("Hello"),
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
            user("And?"),
        ],
    }
    for name, messages in conversations.items():
        assert ask(*messages, max_tokens=5).choices, name


@trial("images between texts")
def _images_between_texts():
    image = {"type": "image_url", "image_url": {"url": IMAGE_URL}}
    texts = [{"type": "text", "text": text} for text in ("First:", "Second:", COLOR)]
    parts = [texts[0], image, texts[1], image, texts[2]]
    assert ask({"role": "user", "content": parts}).choices[0].message.content


@trial("conversation that is too long")
def _too_long():
    check_refused(
        lambda: ask(user(TOO_LONG)), openai.BadRequestError, code="context_length_exceeded"
    )


@trial("cancelled answer and image")
def _cancel():
    stream = ask(user("Tell a story"), stream=True, temperature=100, n=8)
    next(iter(stream))
    stream.close()
    images = draw(stream=True, partial_images=16, n=8)
    next(iter(images))
    images.close()
    deadline = time.monotonic() + 10
    while not is_idle():
        assert time.monotonic() < deadline, "the server is still busy"
        time.sleep(0.1)


@trial("kept connection without a delay of 40 ms")
def _kept_connection():
    client.models.list()
    seconds = []
    for _ in range(9):
        start = time.perf_counter()
        client.models.list()
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.02, seconds


@trial("async client, and with aiohttp")
async def _async():
    for http_client in (None, openai.DefaultAioHttpClient(trust_env=False)):
        async with openai.AsyncOpenAI(base_url=URL, api_key=KEY, http_client=http_client) as other:
            conversation = {"model": MODEL, "messages": [message(COLOR, IMAGE_URL)]}
            answers = await asyncio.gather(
                *(other.chat.completions.create(**conversation) for _ in range(4))
            )
            for answer in answers:
                check_red(answer.choices[0].message.content)
            stream = await other.chat.completions.create(**conversation, stream=True)
            check_red(text_of([chunk async for chunk in stream]))


@trial("sampling fields")
def _sampling():
    for fields in (
        {"top_p": 0},
        {"frequency_penalty": 0.5},
        {"presence_penalty": 0.5},
        {"logit_bias": {"5": -100}},
        {"logprobs": True, "top_logprobs": 3},
        {"extra_body": {"top_k": 5}},
        {"extra_body": {"min_p": 0.1}},
        {"extra_body": {"repetition_penalty": 1.1}},
    ):
        answer = ask(temperature=0.5, seed=1, **fields).choices[0]
        assert answer.message.content is not None
        if "logprobs" in fields:
            assert len(answer.logprobs.content[0].top_logprobs) == 3


@trial("images in base64 and by URL")
def _images():
    reply = draw(n=2, extra_body={"seed": 1, "cfg_weight": 4})
    assert [image.seed for image in reply.data] == [1, 2]
    for image in reply.data:
        check_image(image.b64_json)
    check_image(fetch(draw(response_format="url").data[0].url))


@trial("DALL-E's and gpt-image's requests")
def _dalle():
    check_image(
        draw(
            model="dall-e-3", size="1024x1024", quality="hd", style="vivid",
            response_format="b64_json", user="me",
        ).data[0].b64_json
    )  # fmt: skip
    check_image(
        draw(
            model="gpt-image-1", size="1536x1024", quality="high", background="opaque",
            moderation="low", output_format="webp", output_compression=80,
        ).data[0].b64_json
    )  # fmt: skip


@trial("stream of images")
def _image_stream():
    events = list(draw(n=2, stream=True, partial_images=2))
    kinds = [event.type.partition(".")[2] for event in events]
    assert (kinds.count("partial_image"), kinds.count("completed")) == (4, 2), kinds
    for event in events:
        check_image(event.b64_json)


@trial("parse")
def _parse():
    from pydantic import BaseModel

    class Shape(BaseModel):
        color: str

    client.chat.completions.parse(
        model=MODEL, messages=[message(COLOR, IMAGE_URL)], response_format=Shape
    )


@trial("tool_choice required")
def _required():
    ask(
        tool_choice="required",
        tools=[{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    )


def input_message():
    """Return a question about an image in the form of Responses."""
    image = {"type": "input_image", "image_url": IMAGE_URL, "detail": "auto"}
    return {"role": "user", "content": [image, {"type": "input_text", "text": COLOR}]}


@trial("responses: answer, stream, second turn")
def _responses():
    answer = client.responses.create(model=MODEL, input=[input_message()])
    check_red(answer.output_text)
    with client.responses.stream(model=MODEL, input=[input_message()]) as stream:
        for _ in stream:
            pass
        check_red(stream.get_final_response().output_text)
    question = {"role": "user", "content": "How many shapes are there?"}
    conversation = [input_message(), *answer.output, question]
    assert client.responses.create(model=MODEL, input=conversation).output_text


@trial("responses: image_generation, with previews")
def _response_images():
    tool = {"type": "image_generation", "partial_images": 2}
    events = list(
        client.responses.create(
            model=MODEL, input="a red circle", tools=[tool], tool_choice=tool, stream=True
        )
    )
    kinds = [event.type for event in events]
    assert kinds.count("response.image_generation_call.partial_image") == 2
    check_image(events[-1].response.output[0].result)


@trial("completions")
def _completions():
    assert client.completions.create(model=MODEL, prompt="The picture shows", n=2).choices[1].text
    chunks = list(client.completions.create(model=MODEL, prompt="The picture shows", stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks)


@trial("images.edit")
def _edit():
    image = ("a.png", base64.b64decode(IMAGE_URL.partition(",")[2]))
    changed = client.images.edit(model=MODEL, image=[image], prompt="make it blue")
    check_image(changed.data[0].b64_json)


run()
