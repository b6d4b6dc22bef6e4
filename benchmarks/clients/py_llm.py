"""llm, Simon Willison's program, with a model of extra-openai-models.yaml."""

import os
import subprocess
import sys
from pathlib import Path

from trials import COLOR, IMAGE, MODEL, URL, check_red, run, trial

FOLDER = Path("llm").absolute()
FOLDER.mkdir()
(FOLDER / "extra-openai-models.yaml").write_text(
    f"- {{model_id: janus, model_name: {MODEL}, api_base: '{URL}', vision: true}}\n"
    f"- {{model_id: janus-json, model_name: {MODEL}, api_base: '{URL}', vision: true,"
    f" supports_schema: true}}\n"
    f"- {{model_id: janus-completion, model_name: {MODEL}, api_base: '{URL}', completion: true}}\n"
)


def llm(*arguments):
    """Run the program; return its output."""
    done = subprocess.run(
        [Path(sys.executable).with_name("llm"), *map(str, arguments)],
        env=os.environ | {"LLM_USER_PATH": str(FOLDER)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-500:])
    return done.stdout


@trial("-a, stream and --no-stream")
def _answer():
    check_red(llm("-m", "janus", "-a", IMAGE, COLOR))
    check_red(llm("-m", "janus", "--no-stream", "-a", IMAGE, COLOR))


@trial("-c")
def _second_turn():
    llm("-m", "janus", "-a", IMAGE, COLOR)
    assert llm("-c", "How many shapes are there?").strip()


@trial("sampling options")
def _sampling():
    options = ("temperature", 0.2, "top_p", 0.9, "frequency_penalty", 0.1, "seed", 1)
    pairs = [word for i in range(0, len(options), 2) for word in ("-o", *options[i : i + 2])]
    check_red(llm("-m", "janus", *pairs, "-a", IMAGE, COLOR))


@trial("--schema")
def _schema():
    llm("-m", "janus-json", "--schema", "color str, shape str", "-a", IMAGE, COLOR)


@trial("completion models")
def _completions():
    assert llm("-m", "janus-completion", "The picture shows").strip()


run()
