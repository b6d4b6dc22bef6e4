"""AutoGen's client of OpenAI's API, and an agent with it."""

from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.messages import MultiModalMessage
from autogen_core import Image
from autogen_core.models import UserMessage
from autogen_ext.models.openai import OpenAIChatCompletionClient
from pydantic import BaseModel
from trials import COLOR, IMAGE, KEY, MODEL, URL, check_red, run, trial

FACTS = {
    "vision": True,
    "function_calling": True,
    "json_output": True,
    "structured_output": True,
    "family": "unknown",
}
client = OpenAIChatCompletionClient(
    model=MODEL, base_url=URL, api_key=KEY, model_info=FACTS, max_retries=0
)


def question():
    """Return a question about an image."""
    return UserMessage(content=[Image.from_file(IMAGE), COLOR], source="user")


@trial("answer about an image, stream")
async def _answer():
    check_red((await client.create([question()])).content)
    *_, last = [part async for part in client.create_stream([question()])]
    check_red(last.content)


@trial("AssistantAgent, two turns")
async def _agent():
    agent = AssistantAgent("janus", client, system_message="Be brief.")
    task = MultiModalMessage(content=[COLOR, Image.from_file(IMAGE)], source="user")
    check_red((await agent.run(task=task)).messages[-1].content)
    assert (await agent.run(task="How many shapes are there?")).messages[-1].content


@trial("sampling fields")
async def _sampling():
    fields = {"temperature": 0.2, "top_p": 0.9, "frequency_penalty": 0.1}
    check_red((await client.create([question()], extra_create_args=fields)).content)


@trial("json_output")
async def _structured():
    class Shape(BaseModel):
        color: str

    await client.create([question()], json_output=Shape)


run()
