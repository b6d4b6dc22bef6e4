"""Pydantic AI with OpenAIChatModel."""

import asyncio

from pydantic import BaseModel
from pydantic_ai import Agent, BinaryContent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from trials import COLOR, IMAGE, KEY, MODEL, URL, check_red, run, trial

model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=URL, api_key=KEY))
QUESTION = [BinaryContent(IMAGE.read_bytes(), media_type="image/png"), COLOR]


class Shape(BaseModel):
    """A schema for structured answers."""

    color: str


@trial("answer about an image, with a tool")
def _answer():
    agent = Agent(model, instructions="Be brief.")

    @agent.tool_plain
    def weather(place: str) -> str:
        """Return the weather."""
        return place

    result = agent.run_sync(QUESTION)
    check_red(result.output)
    assert result.usage.output_tokens > 0


@trial("stream")
def _stream():
    async def ask():
        async with Agent(model).run_stream(QUESTION) as result:
            return [text async for text in result.stream_text()]

    check_red(asyncio.run(ask())[-1])


@trial("second turn")
def _second_turn():
    agent = Agent(model)
    first = agent.run_sync(QUESTION)
    assert agent.run_sync("How many?", message_history=first.all_messages()).output


@trial("sampling fields")
def _sampling():
    settings = {
        "temperature": 0.2, "top_p": 0.9, "seed": 1, "max_tokens": 9, "stop_sequences": ["#"],
        "frequency_penalty": 0.1, "presence_penalty": 0.1, "logit_bias": {"5": -1},
    }  # fmt: skip
    check_red(Agent(model, model_settings=settings).run_sync(QUESTION).output)


@trial("output_type")
def _structured():
    Agent(model, output_type=Shape).run_sync(QUESTION)


@trial("NativeOutput")
def _native():
    Agent(model, output_type=NativeOutput(Shape)).run_sync(QUESTION)


@trial('"openai:" models')
def _responses():
    check_red(Agent(f"openai:{MODEL}").run_sync(QUESTION).output)


@trial('"openai-chat:" models')
def _chat():
    check_red(Agent(f"openai-chat:{MODEL}").run_sync(QUESTION).output)


run()
