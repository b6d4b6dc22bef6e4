"""A training loop that can be killed at any time and goes on to the same result.

A stage is a number of steps. What step ``k`` does depends on the stage's state and on ``k`` alone: its batch and noise
are seeded by ``k``. So it is enough to write the state every few minutes, whole or not at all, with the number of steps
done. The log is JSON lines; going on from a checkpoint drops the lines that came after it.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, cast

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from filelock import FileLock
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

from ..errors import CheckpointError, OutputError
from ..files import draft_beside, write_atomically
from ..weights.safetensors_files import write_safetensors

LOG_FILE = "log.jsonl"
_LOG_EVERY = 10  # steps, averaged into one line

Report = Callable[[str, int, int, dict[str, float]], None]
"""Called after every step: the stage, steps done, steps in all, and what the step measured."""


class Stage(Protocol):
    """What the loop runs."""

    name: str
    steps: int

    def step(self, index: int) -> dict[str, float]:
        """Do step ``index``, and give what is to be logged."""

    def state(self) -> dict[str, mx.array]:
        """Everything that the next step depends on."""

    def restore(self, state: dict[str, mx.array]) -> None:
        """Take up a state."""


class Learner:
    """A module with its optimizer: AdamW, or with a ``muon_rate`` Muon for the matrices inside the network.

    MLX's Muon gets no weight decay: it would be added to the gradient before that is normalised, and shrink to nothing
    every matrix whose gradient is small (docs/lab-notes.md).

    Both rates rise linearly and fall as a cosine; gradients have a bounded norm. Muon (Jordan et al., 2024) makes the
    update of a matrix orthogonal.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        rate: float,
        steps: int,
        warmup: int,
        muon_rate: float | None,
        decay: float = 0.01,
        final_rate: float = 0.02,
    ):
        def schedule(top: float) -> Callable[[mx.array], mx.array]:
            rise = optim.linear_schedule(top * 0.01, top, warmup)
            fall = optim.cosine_decay(top, max(steps - warmup, 1), top * final_rate)
            return optim.join_schedules([rise, fall], [warmup])

        self.model = model
        self.optimizer: optim.Optimizer = optim.AdamW(schedule(rate), betas=[0.9, 0.98], weight_decay=decay)
        if muon_rate is not None:
            inner = optim.Muon(schedule(muon_rate), momentum=0.95, weight_decay=0.0)
            self.optimizer = optim.MultiOptimizer([inner, self.optimizer], [_is_inner_matrix])
        self.optimizer.init(model.trainable_parameters())

    def update(self, gradients: Any) -> mx.array:
        """One step of the optimizer; the norm of the gradients before they were clipped."""
        clipped, norm = optim.clip_grad_norm(gradients, 1.0)
        self.optimizer.update(self.model, clipped)
        mx.eval(self.model.parameters(), self.optimizer.state)
        return norm

    def state(self) -> dict[str, mx.array]:
        return {
            **{f"model.{name}": value for name, value in tree_flatten(self.model.parameters())},
            **{f"optimizer.{name}": value for name, value in tree_flatten(self.optimizer.state)},
        }

    def restore(self, state: dict[str, mx.array]) -> None:
        self.model.load_weights(list(part_of(state, "model.").items()), strict=True)
        self.optimizer.state = tree_unflatten(list(part_of(state, "optimizer.").items()))
        mx.eval(self.model.parameters(), self.optimizer.state)  # what is yet to be read is of this thread alone


def compiled_gradient(model: nn.Module, loss: Callable[..., Any]) -> Callable[..., Any]:
    """``nn.value_and_grad`` of ``loss(model, *arrays)`` as one compiled function of the arrays.

    A CPU compiles for some seconds, then takes less time a step; arrays of another shape are compiled anew.
    Tracing changes a copy of the model, so that several functions of one model may run side by side.
    """
    traced = copy.deepcopy(model)

    @mx.compile
    def gradient(parameters: Any, *arrays: mx.array) -> Any:
        traced.update(parameters)
        return nn.value_and_grad(traced, loss)(traced, *arrays)

    def call(*arrays: mx.array) -> Any:
        return gradient(model.parameters(), *arrays)

    return call


def _is_inner_matrix(path: str, array: mx.array) -> bool:
    """Whether a parameter maps features to features: no embedding, no head over a vocabulary, no vector."""
    outer = ("embed", "head", "conv_in", "conv_out")
    return array.ndim >= 2 and not any(word in path for word in outer)


def part_of(state: dict[str, mx.array], prefix: str) -> dict[str, mx.array]:
    """The arrays whose names begin so, without the prefix."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def checkpoint_file(folder: Path, stage: str) -> Path:
    """Where a stage's state is kept."""
    return folder / "checkpoints" / f"{stage}.safetensors"


def run_stage(
    stage: Stage, folder: Path, *, recipe: str, every: float = 120.0, report: Report | None = None, writes: bool = True
) -> None:
    """Run a stage to its end, from its checkpoint if there is one.

    Args:
        stage: what to run; left in its final state.
        folder: holds ``checkpoints/`` and the log.
        recipe: what the result depends on, as text; a checkpoint of another recipe is refused.
        every: seconds between checkpoints.
        report: called after every step.
        writes: whether this process writes the checkpoints and the log; one of those that share a stage does.

    Raises:
        CheckpointError: a checkpoint is damaged or of another recipe.
        OutputError: the folder cannot be written.
    """
    path = checkpoint_file(folder, stage.name)
    done, spent = _resume(stage, path, recipe)
    if writes:
        _cut_log(folder / LOG_FILE, stage.name, done)
    gathered: list[dict[str, float]] = []
    saved = started = time.monotonic()
    try:
        while done < stage.steps:
            gathered.append(stage.step(done))
            done += 1
            seconds = spent + time.monotonic() - started
            if not writes:
                continue
            if report:
                report(stage.name, done, stage.steps, gathered[-1])
            if done % _LOG_EVERY == 0 or done == stage.steps:
                _log(folder / LOG_FILE, stage.name, done, seconds, gathered)
                gathered = []
            last = done == stage.steps
            if last or (done % _LOG_EVERY == 0 and time.monotonic() - saved > every):
                _save(path, stage.state(), {"steps": str(done), "seconds": f"{seconds:.1f}", "recipe": recipe})
                saved = time.monotonic()
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be written ({error.strerror}): free some space, then run it again"
        ) from None


def load_state(folder: Path, stage: str) -> dict[str, mx.array]:
    """The final state of a finished stage."""
    return dict(mx.load(str(checkpoint_file(folder, stage))))  # type: ignore[arg-type]


def _resume(stage: Stage, path: Path, recipe: str) -> tuple[int, float]:
    if not path.exists():
        return 0, 0.0
    try:
        state, metadata = cast(tuple[dict[str, mx.array], dict[str, str]], mx.load(str(path), return_metadata=True))
        done, spent = int(metadata["steps"]), float(metadata["seconds"])
    except (RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): remove it to begin this stage again") from None
    if metadata.get("recipe") != recipe:
        raise CheckpointError(f"{path} is of another recipe or seed: choose another folder, or remove this one")
    stage.restore(state)
    return done, spent


def _save(path: Path, state: dict[str, mx.array], metadata: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with draft_beside(path, path.suffix) as draft:
        write_safetensors(draft, state, metadata)
        draft.replace(path)


def _log(path: Path, stage: str, step: int, seconds: float, gathered: list[dict[str, float]]) -> None:
    keys = dict.fromkeys(key for measured in gathered for key in measured)
    means = {key: float(f"{np.mean([m[key] for m in gathered if key in m]):.5g}") for key in keys}
    line = {"stage": stage, "step": step, "seconds": round(seconds, 1), **means}
    with _locked(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _cut_log(path: Path, stage: str, done: int) -> None:
    """Drop this stage's lines that are beyond its checkpoint, and a line that was cut by a kill."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        if not path.exists():
            return
        lines = read_log(path)
        kept = [line for line in lines if line["stage"] != stage or line["step"] <= done]
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))


def _locked(path: Path) -> FileLock:
    """Two processes write the log side by side; one rewrites it whole."""
    return FileLock(path.with_name(f".{path.name}.lock"))


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log that are whole."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines
