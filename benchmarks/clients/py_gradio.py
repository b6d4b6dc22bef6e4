"""Gradio's chat page over a server, used by Gradio's client."""

import gradio
from gradio_client import Client, handle_file
from trials import COLOR, IMAGE, KEY, MODEL, URL, check_red, run, trial


def chat(**options):
    """Return a client of a chat page that was started in this process."""
    page = gradio.load_chat(URL, MODEL, KEY, api_name="chat", **options)
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True)
    return Client(address, verbose=False)


@trial("load_chat, text")
def _text():
    assert chat().predict({"text": "Hello", "files": []}, api_name="/chat")


@trial("load_chat, image, stream and not")
def _image():
    for streaming in (True, False):
        question = {"text": COLOR, "files": [handle_file(str(IMAGE))]}
        client = chat(file_types=["image"], streaming=streaming)
        check_red(client.predict(question, api_name="/chat"))


run()
