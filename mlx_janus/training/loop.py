"""A training loop that can be killed at any time and resumes to the same result.

A stage is a number of steps. Step ``k`` depends only on the stage's state and on ``k``, which seeds
its batch and its noise. To resume, it is therefore enough to save the state and the number of
finished steps every few minutes, atomically. The log is JSON lines; resuming drops the lines that
were written after the checkpoint.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Mapping, Sequence
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
_LOG_EVERY = 10  # steps averaged into one line

Batch = Mapping[str, Any]
"""Named arrays of one step, NumPy's or MLX's."""

Report = Callable[[str, int, int, dict[str, float]], None]
"""Called after every step: stage, finished steps, all steps, and the step's measurements."""


class Stage(Protocol):
    """A part of a training run that the loop can run and resume."""

    name: str  # in the log, and in the name of the checkpoint's file
    steps: int

    def step(self, index: int) -> dict[str, float]:
        """Run step ``index`` and return its measurements for the log."""

    def state(self) -> dict[str, mx.array]:
        """Return every array that the next step depends on."""

    def restore(self, state: dict[str, mx.array]) -> None:
        """Continue from a state that ``state`` returned.

        Raises:
            KeyError, ValueError: the state has other arrays than this stage.
        """


class Learner:
    """A module with its optimizer: AdamW, or Muon for the inner matrices and AdamW for the rest.

    Muon (Jordan et al., 2024) orthogonalises the update of a matrix. MLX's Muon adds weight decay
    to the gradient before normalising it, which would shrink every matrix with a small gradient to
    nothing; therefore Muon has no weight decay here (docs/lab-notes.md).

    Both learning rates have a linear warm-up and a cosine decay. Gradients are clipped to norm 1.

    Args:
        model: its trainable parameters are trained.
        rate: AdamW's highest learning rate.
        steps: number of steps until the end of the cosine.
        warmup: number of steps in which the rates rise.
        muon_rate: Muon's highest learning rate; None for AdamW alone.
        decay: AdamW's weight decay.
        final_rate: learning rate at the end, as a share of the highest.
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
            """Return a function of the step: a learning rate that rises to ``top``, then falls.

            It rises from 1% of ``top`` and falls to ``final_rate`` of ``top``.
            """
            first = top * 0.01
            rise = optim.linear_schedule(first, top, warmup)
            remaining = max(steps - warmup, 1)
            last = top * final_rate
            fall = optim.cosine_decay(top, remaining, last)
            return optim.join_schedules([rise, fall], [warmup])

        self.model = model
        self.optimizer: optim.Optimizer = optim.AdamW(
            schedule(rate),
            betas=[0.9, 0.98],
            weight_decay=decay,
        )
        if muon_rate is not None:
            inner = optim.Muon(
                schedule(muon_rate),
                momentum=0.95,
                weight_decay=0.0,
            )
            # The first optimizer gets the parameters that fit the condition, the last all others.
            optimizers = [inner, self.optimizer]
            self.optimizer = optim.MultiOptimizer(optimizers, [_is_inner_matrix])
        self.optimizer.init(model.trainable_parameters())

    def update(self, gradients: Any) -> mx.array:
        """Apply one optimizer step and return the norm of the gradients before clipping."""
        clipped, norm = optim.clip_grad_norm(gradients, 1.0)
        self.optimizer.update(self.model, clipped)
        mx.eval(self.model.parameters(), self.optimizer.state)
        return norm

    def state(self) -> dict[str, mx.array]:
        """Return the parameters as ``model.*`` and the optimizer's state as ``optimizer.*``."""
        state = {}
        for name, value in tree_flatten(self.model.parameters()):
            state[f"model.{name}"] = value
        for name, value in tree_flatten(self.optimizer.state):
            state[f"optimizer.{name}"] = value
        return state

    def restore(self, state: dict[str, mx.array]) -> None:
        """Continue from a state that ``state`` returned.

        Raises:
            ValueError: the state has other parameters than the model.
        """
        weights = part_of(state, "model.")
        self.model.load_weights(list(weights.items()), strict=True)
        optimizer_state = part_of(state, "optimizer.")
        self.optimizer.state = tree_unflatten(list(optimizer_state.items()))
        # Read the arrays now: a later step may run in another thread, which cannot read lazy ones.
        mx.eval(self.model.parameters(), self.optimizer.state)


def compiled_gradient(
    model: nn.Module,
    loss: Callable[[Any, dict[str, mx.array]], Any],
) -> Callable[[Batch], Any]:
    """Return ``nn.value_and_grad`` of ``loss(model, batch)`` as one compiled function of a batch.

    Compiling takes some seconds on a CPU and then saves time in every step. For a batch
    with other shapes, the function is compiled again.

    Args:
        model: every call uses its parameters at the time of the call.
        loss: returns the value to minimise, or a tuple that begins with that value. It must not
            compute the same expression twice if one of the two is returned: MLX 0.32 then fails to
            compile.

    Returns:
        A function from a batch to the result of ``loss`` and the gradients of the trainable
        parameters.
    """
    # Tracing leaves placeholders in a module's parameters. A copy is traced, so that the model
    # stays usable and several functions of one model can be compiled.
    traced = copy.deepcopy(model)

    @mx.compile
    def gradient(parameters: Any, arrays: dict[str, mx.array]) -> Any:
        traced.update(parameters)
        differentiated = nn.value_and_grad(traced, loss)
        return differentiated(traced, arrays)

    def call(batch: Batch) -> Any:
        arrays = {}
        for name, value in batch.items():
            arrays[name] = mx.array(value)
        return gradient(model.parameters(), arrays)

    return call


def _is_inner_matrix(path: str, array: mx.array) -> bool:
    """Return whether Muon updates a parameter: a matrix or kernel from features to features.

    Vectors, embeddings, output heads, and the codec's first and last convolutions stay with AdamW.

    Args:
        path: the parameter's dotted name.
        array: the parameter.
    """
    outer = ("embed", "head", "conv_in", "conv_out")  # parts of the names of AdamW's matrices
    if array.ndim < 2:
        return False
    return not any(word in path for word in outer)


def part_of(state: dict[str, mx.array], prefix: str) -> dict[str, mx.array]:
    """Select the arrays whose names start with a prefix, and remove the prefix."""
    selected = {}
    for name, value in state.items():
        if name.startswith(prefix):
            selected[name.removeprefix(prefix)] = value
    return selected


def checkpoint_file(folder: Path, stage: str) -> Path:
    """Return the file that holds a stage's state."""
    return folder / "checkpoints" / f"{stage}.safetensors"


def run_stage(
    stage: Stage,
    folder: Path,
    *,
    recipe: str,
    every: float = 120.0,
    report: Report | None = None,
    writes: bool = True,
) -> None:
    """Run a stage from its checkpoint, or else from its first step, to its end.

    Args:
        stage: left in its final state.
        folder: holds ``checkpoints/`` and the log.
        recipe: everything that the result depends on, as text; a checkpoint of another recipe is
            refused.
        every: least number of seconds between two checkpoints. The last step always saves one.
        report: called after every step, if this process writes.
        writes: whether this process writes the checkpoints and the log. Where two processes share
            the steps of a stage, only one of them writes.

    Raises:
        CheckpointError: the checkpoint is damaged or belongs to another recipe.
        OutputError: the folder cannot be written.
    """
    path = checkpoint_file(folder, stage.name)
    done, spent = _resume(stage, path, recipe)
    records = _Records(stage, folder, recipe, every=every, spent=spent) if writes else None
    try:
        if records:
            # Steps after the checkpoint run again: without this, the log would hold them twice.
            _cut_log(records.log, stage.name, done)
        while done < stage.steps:
            measured = stage.step(done)
            done += 1
            if records and report:
                report(stage.name, done, stage.steps, measured)
            if records:
                records.add(done, measured)
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be written ({error.strerror}): free some space, then run it again"
        ) from None


def load_state(folder: Path, stage: str) -> dict[str, mx.array]:
    """Load the final state of a finished stage."""
    return dict(mx.load(str(checkpoint_file(folder, stage))))  # type: ignore[arg-type]


class _Records:
    """The checkpoint and the log of a running stage.

    Args:
        stage: the running stage.
        folder: holds ``checkpoints/`` and the log.
        recipe: stored in the checkpoint.
        every: least number of seconds between two checkpoints.
        spent: seconds that earlier processes spent on this stage.
    """

    def __init__(self, stage: Stage, folder: Path, recipe: str, *, every: float, spent: float):
        self.log = folder / LOG_FILE
        self._checkpoint = checkpoint_file(folder, stage.name)
        self._stage = stage
        self._recipe = recipe
        self._every = every
        self._measured: list[dict[str, float]] = []  # since the last line of the log
        self._saved = time.monotonic()
        self._started = time.monotonic() - spent  # counts earlier processes too

    def add(self, done: int, measured: dict[str, float]) -> None:
        """Record a step; write a line of the log, and then a checkpoint, when one is due.

        Args:
            done: number of finished steps, including the recorded one.
            measured: the step's measurements.
        """
        self._measured.append(measured)
        last = done == self._stage.steps
        # A checkpoint is saved only right after a line, so that the log has all steps before it.
        if not last and done % _LOG_EVERY:
            return
        seconds = time.monotonic() - self._started
        _log(self.log, self._stage.name, done, seconds, self._measured)
        self._measured = []
        since_saved = time.monotonic() - self._saved
        if last or since_saved > self._every:
            facts = {
                "steps": str(done),
                "seconds": f"{seconds:.1f}",
                "recipe": self._recipe,
            }
            state = self._stage.state()
            _save(self._checkpoint, state, facts)
            self._saved = time.monotonic()


def _resume(stage: Stage, path: Path, recipe: str) -> tuple[int, float]:
    """Restore a stage from its checkpoint; return its finished steps and the seconds they took.

    Without a checkpoint, the stage is unchanged and both numbers are 0.

    Raises:
        CheckpointError: the checkpoint is damaged, of another recipe, or of another version.
    """
    if not path.exists():
        return 0, 0.0
    try:
        loaded = mx.load(str(path), return_metadata=True)
        state, metadata = cast(tuple[dict[str, mx.array], dict[str, str]], loaded)
        done = int(metadata["steps"])
        spent = float(metadata["seconds"])
    except (RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}): remove it to begin this stage again"
        ) from None
    if metadata.get("recipe") != recipe:
        raise CheckpointError(
            f"{path} is of another recipe or seed: choose another folder, or remove this one"
        )
    try:
        stage.restore(state)
    except (KeyError, ValueError):
        raise CheckpointError(
            f"{path} holds other arrays than this stage, of another version: "
            "remove it to begin this stage again"
        ) from None
    return done, spent


def _save(path: Path, state: dict[str, mx.array], metadata: dict[str, str]) -> None:
    """Write a checkpoint atomically: a kill meanwhile leaves the earlier checkpoint whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with draft_beside(path, path.suffix) as draft:
        write_safetensors(draft, state, metadata)
        draft.replace(path)


def _log(
    path: Path,
    stage: str,
    step: int,
    seconds: float,
    measured: Sequence[dict[str, float]],
) -> None:
    """Append one line with the means of the measurements of consecutive steps.

    Means are rounded to 5 significant digits.

    Args:
        path: the log.
        stage: the stage's name.
        step: number of finished steps.
        seconds: time spent on the stage so far.
        measured: one dictionary per step. The mean of a key is over the steps that have the key.
    """
    values: dict[str, list[float]] = {}
    for of_step in measured:
        for key, value in of_step.items():
            values.setdefault(key, []).append(value)
    line: dict[str, Any] = {
        "stage": stage,
        "step": step,
        "seconds": round(seconds, 1),
    }
    for key, numbers in values.items():
        mean = np.mean(numbers)
        line[key] = float(f"{mean:.5g}")
    with _locked(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _cut_log(path: Path, stage: str, done: int) -> None:
    """Drop a stage's lines about steps after ``done``, and any line that a kill cut short.

    The lines of other stages stay, since all stages of a run share the log.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        if not path.exists():
            return
        kept = []
        for line in read_log(path):
            is_other = line["stage"] != stage
            if is_other or line["step"] <= done:
                kept.append(json.dumps(line) + "\n")
        write_atomically(path, "".join(kept))


def _locked(path: Path) -> FileLock:
    """Return the lock to hold while the log is changed.

    Two processes may each run a stage with the same log. Without the lock, one could rewrite the
    log while the other appends to it.
    """
    lock = path.with_name(f".{path.name}.lock")
    return FileLock(lock)


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read a log's lines, except those that a kill cut short."""
    lines = []
    text = path.read_text(encoding="utf-8")
    for line in text.splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines
