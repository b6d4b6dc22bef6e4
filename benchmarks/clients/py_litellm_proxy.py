"""LiteLLM's proxy in front of the server, asked with OpenAI's package."""

import atexit
import secrets
import socket
import subprocess
import sys
import time
from pathlib import Path

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
    fetch,
    message,
    run,
    text_of,
    trial,
)

MASTER_KEY = f"sk-{secrets.token_hex(32)}"
CONFIG = f"""
model_list:
  - model_name: "janus/*"
    litellm_params: {{model: "openai/*", api_base: "{URL}", api_key: {KEY}}}
  - model_name: painter
    litellm_params: {{model: openai/dall-e-3, api_base: "{URL}", api_key: {KEY}}}
    model_info: {{mode: image_generation}}
  - model_name: short
    litellm_params: {{model: "openai/{MODEL}", api_base: "{URL}", api_key: {KEY}}}
  - model_name: long
    litellm_params: {{model: openai/x, api_key: {KEY}, mock_response: from the longer one}}
general_settings: {{master_key: {MASTER_KEY}}}
litellm_settings:
  context_window_fallbacks: [{{short: [long]}}]
  num_retries: 0
"""


def start_proxy():
    """Start the proxy and wait for it; return its process and OpenAI's client of it."""
    Path("proxy.yaml").write_text(CONFIG)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    program = Path(sys.executable).with_name("litellm")
    with Path("proxy.log").open("w") as log:
        process = subprocess.Popen(
            [program, "--config", "proxy.yaml", "--host", "127.0.0.1", "--port", port],
            stdout=log,
            stderr=log,
        )
    atexit.register(process.terminate)  # if it does not start
    client = openai.OpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key=MASTER_KEY, max_retries=0
    )
    deadline = time.monotonic() + 300
    while True:
        try:
            client.models.list()
        except openai.APIConnectionError:
            assert process.poll() is None, Path("proxy.log").read_text()[-2000:]
            assert time.monotonic() < deadline, "the proxy does not start"
            time.sleep(0.5)
        else:
            return process, client


process, client = start_proxy()


def ask(model=f"janus/{MODEL}", text=COLOR, image=IMAGE_URL, **fields):
    """Return the answer to a question about an image."""
    images = [image] if image else []
    return client.chat.completions.create(model=model, messages=[message(text, *images)], **fields)


@trial("answer and stream with usage by a wildcard")
def _answer():
    check_red(ask().choices[0].message.content)
    chunks = list(ask(stream=True, stream_options={"include_usage": True}))
    check_red(text_of(chunks))
    assert any(chunk.usage for chunk in chunks)


@trial("a refusal keeps its status and stops no other request")
def _refusal():
    try:
        ask(n=99)
    except openai.BadRequestError:
        pass
    else:
        raise AssertionError("it was answered")
    check_red(ask().choices[0].message.content)


@trial("fallback to a model with a longer context")
def _context_fallback():
    answer = ask("short", TOO_LONG, image=None)
    assert answer.choices[0].message.content == "from the longer one"


@trial("images by URL and in base64")
def _images():
    reply = client.images.generate(model="painter", prompt="a star", n=2, size="1024x1024")
    for image in reply.data:
        check_image(fetch(image.url))
    reply = client.images.generate(model="painter", prompt="a star", response_format="b64_json")
    check_image(reply.data[0].b64_json)


@trial("sampling fields")
def _sampling():
    check_red(ask(frequency_penalty=0.1, top_p=0).choices[0].message.content)


@trial("responses", lacks="/v1/responses")
def _responses():
    client.responses.create(model=f"janus/{MODEL}", input="Hello")


@trial("answer right after a refusal of responses")
def _after_responses():
    check_red(ask().choices[0].message.content)


run(process.terminate)
