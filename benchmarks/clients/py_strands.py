"""Strands Agents with OpenAIModel."""

from pydantic import BaseModel
from strands import Agent
from strands.models.openai import OpenAIModel
from trials import COLOR, IMAGE, KEY, MODEL, URL, check_red, run, trial


def agent(**params):
    """Return an agent that prints nothing."""
    options = {"base_url": URL, "api_key": KEY, "max_retries": 0}
    model = OpenAIModel(client_args=options, model_id=MODEL, params=params)
    return Agent(model, system_prompt="Be brief.", callback_handler=None)


QUESTION = [{"image": {"format": "png", "source": {"bytes": IMAGE.read_bytes()}}}, {"text": COLOR}]


@trial("answer about an image, two turns")
def _answer():
    janus = agent()
    check_red(str(janus(QUESTION)))
    assert str(janus("How many shapes are there?")).strip()


@trial("sampling fields")
def _sampling():
    check_red(str(agent(temperature=0.2, top_p=0.9, frequency_penalty=0.1)(QUESTION)))


@trial("structured_output")
def _structured():
    class Shape(BaseModel):
        color: str

    agent().structured_output(Shape, QUESTION)


run()
