"""aisuite, which needs OpenAI's package in version 1."""

import aisuite
from trials import COLOR, IMAGE_URL, KEY, MODEL, URL, check_red, message, run, trial

client = aisuite.Client({"openai": {"api_key": KEY, "base_url": URL}})


def ask(**fields):
    """Return the answer to a question about an image."""
    messages = [message(COLOR, IMAGE_URL)]
    return client.chat.completions.create(model=f"openai:{MODEL}", messages=messages, **fields)


@trial("answer about an image")
def _answer():
    check_red(ask().choices[0].message.content)


@trial("sampling fields")
def _sampling():
    check_red(ask(temperature=0.2, top_p=0.9, frequency_penalty=0.1).choices[0].message.content)


run()
