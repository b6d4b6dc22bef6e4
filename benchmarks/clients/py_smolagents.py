"""smolagents with OpenAIServerModel."""

from PIL import Image
from smolagents import CodeAgent, OpenAIServerModel, ToolCallingAgent
from trials import COLOR, IMAGE, KEY, MODEL, URL, check_red, message, run, trial

model = OpenAIServerModel(MODEL, api_base=URL, api_key=KEY, client_kwargs={"max_retries": 0})


@trial("answer about an image, stream")
def _answer():
    image = {"type": "image", "image": Image.open(IMAGE)}
    question = {"role": "user", "content": [image, {"type": "text", "text": COLOR}]}
    check_red(model.generate([question]).content)
    check_red("".join(delta.content or "" for delta in model.generate_stream([question])))


@trial("sampling fields")
def _sampling():
    fields = {"temperature": 0.2, "top_p": 0.9, "frequency_penalty": 0.1}
    assert model.generate([message("Hello")], **fields).content


@trial("ToolCallingAgent", theirs="its instructions are longer than Janus-Tiny's context")
def _tools():
    ToolCallingAgent([], model, max_steps=1, verbosity_level=0).run("Hello")


@trial("CodeAgent", theirs="its instructions are longer than Janus-Tiny's context")
def _code():
    CodeAgent([], model, max_steps=1, verbosity_level=0).run("Hello")


run()
