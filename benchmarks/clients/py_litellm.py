"""LiteLLM, whose providers for servers like this one send different fields."""

import asyncio

import litellm
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
    message,
    run,
    trial,
)

PROVIDERS = ("openai", "hosted_vllm", "lm_studio", "llamafile", "litellm_proxy", "custom_openai")
COMMON = {"api_base": URL, "api_key": KEY, "num_retries": 0}
MESSAGES = [message(COLOR, IMAGE_URL)]


def ask(provider="openai", messages=MESSAGES, **fields):
    """Return the answer to a conversation; by default to a question about an image."""
    return litellm.completion(f"{provider}/{MODEL}", messages, **COMMON, **fields)


def draw(model=MODEL, **fields):
    """Return the reply with the images of a prompt."""
    return litellm.image_generation("a red circle", f"openai/{model}", **COMMON, **fields)


@trial("answer about an image by six providers")
def _answer():
    for provider in PROVIDERS:
        answer = ask(provider)
        check_red(answer.choices[0].message.content)
        assert answer.usage.completion_tokens > 0, provider


@trial("stream with usage by six providers")
def _stream():
    for provider in PROVIDERS:
        chunks = list(ask(provider, stream=True, stream_options={"include_usage": True}))
        check_red(
            "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        )
        assert chunks[-1].usage.completion_tokens > 0, provider


@trial("async answers")
async def _async():
    calls = [litellm.acompletion(f"openai/{MODEL}", MESSAGES, **COMMON) for _ in range(4)]
    for answer in await asyncio.gather(*calls):
        check_red(answer.choices[0].message.content)


@trial("ContextWindowExceededError")
def _too_long():
    question = {"role": "user", "content": TOO_LONG}
    check_refused(lambda: ask(messages=[question]), litellm.ContextWindowExceededError)


@trial("fallback to a model with a longer context")
def _context_fallback():
    router = litellm.Router(
        model_list=[
            {"model_name": name, "litellm_params": {"model": f"openai/{MODEL}"} | COMMON | more}
            for name, more in (("short", {}), ("long", {"mock_response": "from the longer one"}))
        ],
        context_window_fallbacks=[{"short": ["long"]}],
        num_retries=0,
    )
    answer = router.completion("short", [{"role": "user", "content": TOO_LONG}])
    assert answer.choices[0].message.content == "from the longer one"


@trial("sampling fields")
def _sampling():
    check_red(ask(top_p=0, frequency_penalty=0.1, presence_penalty=0.1).choices[0].message.content)
    check_red(
        ask("hosted_vllm", top_k=5, min_p=0.1, repetition_penalty=1.05).choices[0].message.content
    )
    assert ask(logprobs=True, top_logprobs=2).choices[0].logprobs.content


@trial("image_generation, also with size and url")
def _images():
    for image in draw(n=2).data:
        check_image(image.b64_json)
    check_image(draw(size="1024x1024", quality="hd").data[0].b64_json)
    # LiteLLM itself lets only OpenAI's own models have a response_format.
    check_image(fetch(draw("dall-e-3", response_format="url").data[0].url))


@trial("json_schema")
def _schema():
    schema = {"name": "shape", "schema": {"type": "object", "properties": {}}}
    ask(response_format={"type": "json_schema", "json_schema": schema})


@trial("responses")
def _responses():
    assert litellm.responses(input="Hello", model=f"openai/{MODEL}", **COMMON).output


@trial("text_completion")
def _completions():
    model = f"text-completion-openai/{MODEL}"
    answer = litellm.text_completion("The picture shows", model, **COMMON)
    assert answer.choices[0].text


run()
