"""Measure answers in one batch against the same answers in a row, without the reading of prompts.

    python benchmarks/answers_batch.py [--shape 1b --layers 24] [--answers 8] [--tokens 48]

All answers continue one prefix, which is read before the clock starts. Each has its own seed and
exactly ``--tokens`` tokens: nothing ends it earlier.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for a run as a bare script

import mlx_janus

# isort: split
import mlx.core as mx
import numpy as np

from benchmarks.machine import machine
from benchmarks.published_shapes import MODELS
from benchmarks.random_model import config
from mlx_janus.decode.answer_batch import AnswerBatch
from mlx_janus.decode.prefill import prefill_all
from mlx_janus.decode.text import TextOptions, answer_tokens
from mlx_janus.memory import materialize
from mlx_janus.models.backbone import Cache, add_rows, take_rows, to_ragged_cache
from mlx_janus.models.janus import JanusModel

_STEP = 256  # positions of the prefix read at once


@dataclass(frozen=True)
class Times:
    """The seconds of one measurement: by the clock, and of all the process's threads."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Comparison:
    """Answers in a row and in one batch."""

    in_a_row: Times
    at_once: Times
    equal: int  # answers with equal tokens in both


class Answers:
    """Answers that continue one prefix.

    Args:
        model: the weights.
        prefix: number of positions of the prefix, of random tokens; at least 1.
        options: sampling and length of each answer.
    """

    def __init__(self, model: JanusModel, prefix: int, options: Sequence[TextOptions]):
        random = np.random.default_rng(0)
        ids = random.integers(model.config.language.vocab_size, size=prefix + 1)
        embeddings = model.embed_text(mx.array(ids)[None])
        self.model = model
        self.options = options
        self.last = embeddings[0, -1:]  # (1, hidden): the position that gives the first token
        self._cache = model.make_cache()
        prefill_all(model, embeddings[:, :-1], self._cache, _STEP)

    def prefix_cache(self) -> Cache:
        """Return a copy of the prefix's KV cache."""
        return take_rows(self._cache, [0])

    def in_a_row(self) -> tuple[Times, list[list[int]]]:
        """Generate the answers one after the other."""
        times = []
        ids = []
        for options in self.options:
            tokens = answer_tokens(self.model, self.last, options, self.prefix_cache())
            found = [next(tokens).id]  # it reads the last position of the prompt
            times.append(_timed(lambda tokens=tokens, found=found: found.extend(_ids(tokens))))
            ids.append(found)
        total = Times(sum(part.wall for part in times), sum(part.cpu for part in times))
        return total, ids

    def at_once(self) -> tuple[Times, list[list[int]]]:
        """Generate the answers in one batch."""
        batch = AnswerBatch(self.model)
        answers = [batch.add(self.last, options, self.prefix_cache()) for options in self.options]
        batch.step()  # adds the first tokens
        ids = [[next(answer).id] for answer in answers]

        def generate() -> None:
            for answer, found in zip(answers, ids, strict=True):
                found.extend(_ids(answer))

        return _timed(generate), ids

    def largest_difference(self) -> float:
        """Return the largest difference of a logit between one row and a batch, as a share.

        The share is of the standard deviation of the logits.
        """
        count = len(self.options)
        batch = to_ragged_cache(self.prefix_cache())
        for _ in range(count - 1):
            add_rows(batch, to_ragged_cache(self.prefix_cache()))
        embeddings = mx.repeat(self.last[None], count, axis=0)  # (n, 1, hidden)
        together = self.model.text_logits(self.model.hidden_states(embeddings, batch)[:, 0])
        hidden = self.model.hidden_states(self.last[None], self.prefix_cache())
        alone = self.model.text_logits(hidden[:, 0])
        return float((mx.abs(together - alone).max() / alone.std()).item())


def _ids(tokens: object) -> list[int]:
    """Return the ids of all further tokens."""
    return [token.id for token in tokens]  # type: ignore[attr-defined]


def _timed(function: Callable[[], object]) -> Times:
    """Call a function and return its times."""
    wall = time.perf_counter()
    cpu = time.process_time()
    function()
    return Times(time.perf_counter() - wall, time.process_time() - cpu)


def compare(answers: Answers, repeats: int) -> list[Comparison]:
    """Measure in turns, so that other work on the machine disturbs both alike."""
    comparisons = []
    for _ in range(repeats):
        row_times, row_ids = answers.in_a_row()
        batch_times, batch_ids = answers.at_once()
        equal = sum(one == other for one, other in zip(row_ids, batch_ids, strict=True))
        comparisons.append(Comparison(row_times, batch_times, equal))
    return comparisons


def load(shape: str | None, layers: int | None) -> tuple[str, JanusModel]:
    """Return a name and Janus-Tiny, or a published shape with random weights in float32."""
    if shape is None:
        return "Janus-Tiny, float32", mlx_janus.load("tiny").model
    sizes = MODELS[shape].sizes
    sizes = replace(sizes, layers=layers or sizes.layers)
    model = JanusModel(config(sizes))
    model.eval()
    materialize(model.answering_arrays().values())
    return f"{shape}'s shape, {sizes.layers} layers, random weights, float32", model


@click.command()
@click.option("--shape", type=click.Choice(list(MODELS)), help="[default: Janus-Tiny]")
@click.option("--layers", type=int, help="Layers of the language model.  [default: the shape's]")
@click.option("--answers", "count", default=8, show_default=True, help="Answers at once.")
@click.option("--tokens", default=48, show_default=True, help="Tokens of each answer.")
@click.option("--prefix", default=96, show_default=True, help="Positions of the prefix.")
@click.option("--temperature", default=1.0, show_default=True)
@click.option("--repeats", default=5, show_default=True)
def main(
    shape: str | None,
    layers: int | None,
    count: int,
    tokens: int,
    prefix: int,
    temperature: float,
    repeats: int,
) -> None:
    """Print the time of answers at once as a share of their time in a row."""
    name, model = load(shape, layers)
    options = [TextOptions(tokens, temperature, seed=seed) for seed in range(count)]
    answers = Answers(model, prefix, options)
    comparisons = compare(answers, repeats)
    click.echo(f"Machine: {machine()}")
    click.echo(f"{name}: {count} answers of {tokens} tokens after {prefix} positions")
    click.echo(f"largest difference of a logit: {answers.largest_difference():.1e} deviations\n")
    click.echo("| run | in a row, s | at once, s | share | share of CPU time | equal answers |")
    click.echo("|---|---|---|---|---|---|")
    for number, run in enumerate(comparisons, start=1):
        row = run.in_a_row
        batch = run.at_once
        click.echo(
            f"| {number} | {row.wall:.2f} | {batch.wall:.2f} | {batch.wall / row.wall:.2f} "
            f"| {batch.cpu / row.cpu:.2f} | {run.equal} of {count} |"
        )
    wall = np.median([run.at_once.wall / run.in_a_row.wall for run in comparisons])
    cpu = np.median([run.at_once.cpu / run.in_a_row.cpu for run in comparisons])
    click.echo(f"\nmedian share: {wall:.2f}, of CPU time {cpu:.2f}")


if __name__ == "__main__":
    main()
