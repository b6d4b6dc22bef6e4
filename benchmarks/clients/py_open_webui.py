"""Open WebUI in front of the server, asked by its own API. Its page sends the same requests."""

import atexit
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
from trials import COLOR, IMAGE_URL, KEY, MODEL, URL, check_image, check_red, message, run, trial

SETTINGS = {
    "DATA_DIR": str(Path("open-webui").absolute()),
    "WEBUI_AUTH": "False",
    "WEBUI_SECRET_KEY": "for one run",
    "OFFLINE_MODE": "True",
    "ENABLE_OLLAMA_API": "False",
    "OPENAI_API_BASE_URL": URL,
    "OPENAI_API_KEY": KEY,
    "RAG_EMBEDDING_ENGINE": "openai",  # otherwise it downloads a model
    "ENABLE_IMAGE_GENERATION": "True",
    "IMAGE_GENERATION_ENGINE": "openai",
    "IMAGES_OPENAI_API_BASE_URL": URL,
    "IMAGES_OPENAI_API_KEY": KEY,
    "IMAGE_GENERATION_MODEL": MODEL,
    "IMAGE_SIZE": "",
}


def start():
    """Start Open WebUI and wait for it; return its process and a client that is logged in."""
    Path(SETTINGS["DATA_DIR"]).mkdir()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    program = Path(sys.executable).with_name("open-webui")
    with Path("open-webui.log").open("w") as log:
        process = subprocess.Popen(
            [program, "serve", "--host", "127.0.0.1", "--port", port],
            env=os.environ | SETTINGS,
            stdout=log,
            stderr=log,
        )
    atexit.register(process.terminate)  # if it does not start
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120, trust_env=False)
    deadline = time.monotonic() + 300
    while True:
        try:
            client.get("/health").raise_for_status()
        except httpx.HTTPError:
            assert process.poll() is None, Path("open-webui.log").read_text()[-2000:]
            assert time.monotonic() < deadline, "Open WebUI does not start"
            time.sleep(1)
        else:
            break
    user = client.post("/api/v1/auths/signin", json={"email": "", "password": ""}).json()
    client.headers["Authorization"] = f"Bearer {user['token']}"
    client.get("/api/models").raise_for_status()  # it asks the server for its models
    return process, client


process, client = start()


def ask(*messages, **fields):
    """Return the reply to a conversation; by default to a question about an image."""
    body = {"model": MODEL, "messages": list(messages) or [message(COLOR, IMAGE_URL)], **fields}
    reply = client.post("/api/chat/completions", json=body)
    assert reply.is_success, f"{reply.status_code} {reply.text}"
    return reply


def text_of(reply):
    """Return the answer of a reply that is not a stream."""
    return reply.json()["choices"][0]["message"]["content"]


@trial("models")
def _models():
    assert MODEL in [model["id"] for model in client.get("/api/models").json()["data"]]


@trial("answer about an image, stream")
def _answer():
    check_red(text_of(ask()))
    lines = ask(stream=True).text.splitlines()
    events = [line[6:] for line in lines if line.startswith("data: {")]
    choices = [choice for event in events for choice in json.loads(event).get("choices", [])]
    check_red("".join(choice["delta"].get("content") or "" for choice in choices))


@trial("Continue Response")
def _continue():
    # Janus-Tiny may end the answer at once.
    assert isinstance(text_of(ask(message("Hello"), {"role": "assistant", "content": "The"})), str)


@trial("Advanced Params")
def _sampling():
    params = {"temperature": 0.2, "top_k": 40, "top_p": 0, "min_p": 0.05, "frequency_penalty": 0.1}
    check_red(text_of(ask(**params, repeat_penalty=1.05, seed=1, max_tokens=20)))


@trial("images, with an empty Image Size and with 512x512")
def _images():
    for size in ({}, {"size": "512x512"}):
        reply = client.post("/api/v1/images/generations", json={"prompt": "a star", "n": 2} | size)
        assert reply.is_success, f"{reply.status_code} {reply.text}"
        for image in reply.json():
            check_image(client.get(image["url"]).content)


@trial("title of a chat")
def _title():
    body = {"model": MODEL, "messages": [message("Hello")], "chat_id": ""}
    reply = client.post("/api/v1/tasks/title/completions", json=body)
    assert reply.is_success, f"{reply.status_code} {reply.text}"


run(process.terminate)
