"""OpenAI's Agents SDK, over chat completions and over Responses, its default."""

import agents
import openai
from pydantic import BaseModel
from trials import COLOR, IMAGE_URL, KEY, MODEL, URL, check_image, check_red, run, trial

client = openai.AsyncOpenAI(base_url=URL, api_key=KEY, max_retries=0)
agents.set_default_openai_client(client, use_for_tracing=False)
agents.set_tracing_disabled(True)
QUESTION = [
    {
        "role": "user",
        "content": [
            {"type": "input_image", "image_url": IMAGE_URL, "detail": "auto"},
            {"type": "input_text", "text": COLOR},
        ],
    }
]


class Shape(BaseModel):
    """A schema for structured answers."""

    color: str


def agent(**options):
    """Return an agent that asks by chat completions."""
    model = agents.OpenAIChatCompletionsModel(MODEL, client)
    return agents.Agent(name="Janus", instructions="Be brief.", model=model, **options)


@trial("answer about an image, with a tool")
async def _answer():
    @agents.function_tool
    def weather(place: str) -> str:
        """Return the weather."""
        return place

    check_red((await agents.Runner.run(agent(tools=[weather]), QUESTION)).final_output)


@trial("stream, second turn")
async def _stream():
    result = agents.Runner.run_streamed(agent(), QUESTION)
    async for _ in result.stream_events():
        pass
    check_red(result.final_output)
    question = {"role": "user", "content": "How many shapes are there?"}
    second = await agents.Runner.run(agent(), [*result.to_input_list(), question])
    assert second.final_output


@trial("sampling fields")
async def _sampling():
    settings = agents.ModelSettings(
        temperature=0.2, top_p=0.9, frequency_penalty=0.1, presence_penalty=0.1
    )
    result = await agents.Runner.run(agent(model_settings=settings), QUESTION)
    check_red(result.final_output)


@trial("set_default_openai_api")
async def _default_api():
    agents.set_default_openai_api("chat_completions")
    result = await agents.Runner.run(agents.Agent(name="Janus", model=MODEL), QUESTION)
    check_red(result.final_output)
    agents.set_default_openai_api("responses")


@trial("output_type")
async def _structured():
    await agents.Runner.run(agent(output_type=Shape), QUESTION)


def default_agent(**options):
    """Return an agent that asks by Responses."""
    return agents.Agent(name="Janus", instructions="Be brief.", model=MODEL, **options)


@trial("the default API: answer about an image, stream, second turn")
async def _responses():
    check_red((await agents.Runner.run(default_agent(), QUESTION)).final_output)
    result = agents.Runner.run_streamed(default_agent(), QUESTION)
    async for _ in result.stream_events():
        pass
    check_red(result.final_output)
    question = {"role": "user", "content": "How many shapes are there?"}
    second = await agents.Runner.run(default_agent(), [*result.to_input_list(), question])
    assert second.final_output


@trial("the default API: output_type")
async def _responses_structured():
    result = await agents.Runner.run(default_agent(output_type=Shape), QUESTION)
    assert isinstance(result.final_output, Shape)


@trial("the default API: ImageGenerationTool")
async def _responses_images():
    tool = agents.ImageGenerationTool(tool_config={"type": "image_generation"})
    settings = agents.ModelSettings(tool_choice="image_generation")
    artist = default_agent(tools=[tool], model_settings=settings)
    items = (await agents.Runner.run(artist, "a red circle", max_turns=2)).new_items
    check_image(items[0].raw_item.result)


run()
