"""Instructor, whose modes ask for structured answers in different ways."""

import instructor
import openai
from instructor.core.exceptions import InstructorRetryException
from pydantic import BaseModel
from trials import COLOR, IMAGE_URL, KEY, MODEL, URL, check_red, message, run, trial

plain = openai.OpenAI(base_url=URL, api_key=KEY, max_retries=0)
FIELDS = {"model": MODEL, "messages": [message(COLOR, IMAGE_URL)]}


class Shape(BaseModel):
    """A schema for structured answers."""

    color: str


def ask(mode):
    """Ask for a Shape in a mode, with one try."""
    client = instructor.from_openai(plain, mode=mode)
    return client.chat.completions.create(**FIELDS, response_model=Shape, max_retries=1)


@trial("response_model=None")
def _plain():
    client = instructor.from_openai(plain)
    answer = client.chat.completions.create(**FIELDS, response_model=None)
    check_red(answer.choices[0].message.content)


def may_fail_the_schema(name):
    """Ask in a mode that tells the schema to the model only; Janus-Tiny cannot read it.

    Each retry is longer, until it exceeds Janus-Tiny's context.
    """
    try:
        assert ask(instructor.Mode[name]).color
    except InstructorRetryException as error:
        if "Error code" in str(error) and "maximum context length" not in str(error):
            raise


for name in ("MD_JSON", "JSON"):
    trial(f"{name}, which may fail the schema")(lambda name=name: may_fail_the_schema(name))
for name in ("TOOLS", "JSON_SCHEMA"):
    trial(name)(lambda name=name: ask(instructor.Mode[name]))

run()
