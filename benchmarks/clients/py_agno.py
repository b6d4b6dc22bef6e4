"""Agno with OpenAILike."""

from agno.agent import Agent
from agno.media import Image
from agno.models.openai.like import OpenAILike
from pydantic import BaseModel
from trials import COLOR, IMAGE, KEY, MODEL, URL, check_red, run, trial


class Shape(BaseModel):
    """A schema for structured answers."""

    color: str


def ask(**options):
    """Return an agent's run on a question about an image."""
    fields = options.pop("fields", {})
    model = OpenAILike(id=MODEL, base_url=URL, api_key=KEY, max_retries=0, **fields)
    agent = Agent(model=model, telemetry=False, **options)
    return agent.run(COLOR, images=[Image(filepath=IMAGE)])


@trial("answer about an image")
def _answer():
    check_red(ask().content)


@trial("sampling fields")
def _sampling():
    check_red(ask(fields={"temperature": 0.2, "top_p": 0.9, "frequency_penalty": 0.1}).content)


@trial("output_schema")
def _structured():
    content = ask(output_schema=Shape).content
    assert isinstance(content, Shape), content


run()
