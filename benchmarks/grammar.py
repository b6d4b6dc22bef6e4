"""The cost of a token with a JSON Schema: masks, ends in reach, and whole answers.

    python benchmarks/grammar.py [--vocabulary 102400] [--model tiny]

The first table has the work on the CPU, for a vocabulary of made-up words of the published models'
size. The device computes the next logits during the mask and after the choice, so this work adds to
the time of a token only where it takes longer than a pass. The second table compares answers with
and without a schema.
"""

from __future__ import annotations

import json
import random
import string
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for a run as a bare script

import mlx_janus

# isort: split
import numpy as np

from mlx_janus.decode.constraint import GrammarCompiler, Vocabulary
from mlx_janus.decode.grammar import schema_grammar

CAPTION: dict[str, Any] = {
    "type": "object",
    "properties": {
        "caption": {"type": "string"},
        "objects": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "name": {"type": "string"},
                    "color": {"enum": ["red", "green", "blue", "other"]},
                    "count": {"type": "integer"},
                },
                "required": ["name", "color", "count"],
                "additionalProperties": False,
            },
        },
        "indoors": {"type": "boolean"},
    },
    "required": ["caption", "objects", "indoors"],
    "additionalProperties": False,
}
ANSWER = {
    "caption": 'A red circle stands above a blue square, and a sign says "stop"',
    "objects": [{"name": f"shape number {n}", "color": "red", "count": n} for n in range(8)],
    "indoors": False,
}


def made_up_vocabulary(size: int) -> Vocabulary:
    """Return a vocabulary of ``size`` tokens, the last of which ends an answer.

    The others are all bytes, pieces of JSON, and random words with and without a space before them.
    """
    choice = random.Random(0)
    tokens = {bytes([byte]): None for byte in range(256)}
    tokens |= dict.fromkeys(map(str.encode, ('"}', '"},', '":"', '":', '{"', '"]', ', "', "},{")))
    while len(tokens) < size - 1:
        letters = choice.choices(string.ascii_letters, k=choice.randint(2, 9))
        tokens[(choice.choice(["", " "]) + "".join(letters)).encode()] = None
    spelled = list(tokens)

    def spelling(token: int) -> tuple[str, bytes | None]:
        """Return the text of a token, which is not needed here, and its bytes."""
        return ("<end>", None) if token == size - 1 else ("", spelled[token])

    return Vocabulary(size, spelling, lambda text: list(text.encode()), size - 1, {size - 1})


def timed(function: Callable[[], object], seconds: list[float]) -> None:
    """Call a function, and append the seconds that it takes to a list."""
    started = time.perf_counter()
    function()
    seconds.append(time.perf_counter() - started)


def measure_masks(size: int) -> None:
    """Print the time of each part of a token's work on the CPU."""
    building: list[float] = []
    compiling: list[float] = []
    compiler = GrammarCompiler(lambda: made_up_vocabulary(size))
    grammar = schema_grammar(CAPTION)
    timed(lambda: compiler.check(schema_grammar("json")), building)
    timed(lambda: compiler.check(grammar), compiling)
    constraint = compiler.constraint(grammar, 900)  # 900: maximum of tokens
    masks: list[float] = []
    checks: list[float] = []
    adds: list[float] = []
    text = json.dumps(ANSWER, separators=(",", ":")).encode()
    for index, token in enumerate(text):  # the first 256 tokens are the bytes
        timed(constraint.mask, masks)
        timed(lambda t=token, room=900 - index: constraint.another_mask(t, room), checks)
        timed(lambda t=token: constraint.add(t), adds)
    print(f"| {size} tokens, {len(text)} steps | median, us | 99 %, us |\n|---|---|---|")
    for name, seconds in (("mask", masks), ("end in reach", checks), ("add a token", adds)):
        middle, most = np.percentile(seconds, [50, 99]) * 1e6
        print(f"| {name} | {middle:.0f} | {most:.0f} |")
    print(
        f"\nonce for a model: {building[0]:.2f} s; once for a schema: {compiling[0] * 1e3:.1f} ms\n"
    )


def measure_answers(model: str, tokens: int) -> None:
    """Print the time of a token with and without a schema."""
    janus = mlx_janus.load(model)
    print(f"| {janus.name} | tokens/s | CPU, ms a token |\n|---|---|---|")
    forms: dict[str, dict[str, Any]] = {
        # The bias suppresses end tokens, so that the answer has all ``tokens``.
        "words": {"logit_bias": dict.fromkeys(janus.prompts.end_ids, -100)},
        "schema": {"schema": CAPTION},
    }
    for name, form in forms.items():
        janus.generate_text("Describe it.", max_tokens=2, **form)
        started = time.process_time()
        result = janus.generate_text(
            "Describe it.", max_tokens=tokens, temperature=1, seed=1, **form
        )
        spent = (time.process_time() - started) / len(result.tokens)
        print(f"| {name} | {result.generation_tps:.1f} | {spent * 1e3:.2f} |")


@click.command()
@click.option("--vocabulary", default=102400, show_default=True, help="Tokens of the first table.")
@click.option("--model", default="tiny", show_default=True, help="Model of the second table.")
@click.option("--tokens", default=150, show_default=True, help="Longest answers of that table.")
def main(vocabulary: int, model: str, tokens: int) -> None:
    """Measure the cost of a token with a JSON Schema."""
    measure_masks(vocabulary)
    measure_answers(model, tokens)


if __name__ == "__main__":
    main()
