"""Anthropic's own package."""

import base64

import anthropic
from trials import COLOR, IMAGE, KEY, MODEL, ROOT, TOO_LONG, check_red, check_refused, run, trial

client = anthropic.Anthropic(base_url=ROOT, api_key=KEY, max_retries=0, timeout=60)
SOURCE = {
    "type": "base64",
    "media_type": "image/png",
    "data": base64.b64encode(IMAGE.read_bytes()).decode(),
}
QUESTION = {
    "role": "user",
    "content": [{"type": "image", "source": SOURCE}, {"type": "text", "text": COLOR}],
}
TOOL = {"name": "stop", "input_schema": {"type": "object", "additionalProperties": False}}


def ask(*messages, **fields):
    """Return the answer to a conversation; by default to a question about an image."""
    return client.messages.create(
        model=MODEL, max_tokens=40, messages=list(messages) or [QUESTION], **fields
    )


@trial("answer about an image")
def _answer():
    sampling = {"temperature": 0.2, "top_p": 0.9, "top_k": 20}  # no arguments of this release
    answer = ask(system="Be brief.", stop_sequences=["#"], extra_body=sampling)
    check_red(answer.content[0].text)
    assert answer._request_id


@trial("stream")
def _stream():
    with client.messages.stream(model=MODEL, max_tokens=40, messages=[QUESTION]) as stream:
        check_red("".join(stream.text_stream))


@trial("second turn")
def _second_turn():
    answer = {"role": "assistant", "content": ask().content}
    second = ask(QUESTION, answer, {"role": "user", "content": "How many shapes are there?"})
    assert second.usage.cache_read_input_tokens > 0


@trial("tool")
def _tool():
    (call,) = ask(tools=[TOOL], tool_choice={"type": "any"}).content
    assert (call.type, call.input) == ("tool_use", {})


@trial("count_tokens")
def _count():
    assert client.messages.count_tokens(model=MODEL, messages=[QUESTION]).input_tokens > 0


@trial("conversation that is too long")
def _too_long():
    question = {"role": "user", "content": TOO_LONG}
    check_refused(lambda: ask(question), anthropic.BadRequestError)


run()
