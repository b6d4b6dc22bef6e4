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
from safetensors import safe_open

from ..errors import CheckpointError, OutputError
from ..files import MAX_RECORDS_FILE, draft_beside, read_bounded, write_atomically
from ..memory import is_cuda
from ..weights.safetensors_files import write_safetensors

LOG_FILE = "log.jsonl"
_LOG_EVERY = 10  # steps whose means are one line of the log
_POLL = 1.0  # seconds between two looks at another process's checkpoint

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
        """Continue from arrays that ``state()`` returned earlier.

        Raises:
            KeyError, ValueError: an array is missing, surplus or misshaped.
        """


class Learner:
    """A module with its optimizer: AdamW, and optionally Muon for the inner matrices.

    Muon (Jordan et al., 2024) orthogonalises the update of a matrix. MLX's Muon adds the weight
    decay to the gradient and then normalises the sum. Where the gradient is small, the decay would
    shrink the matrix to nothing. Therefore Muon has no weight decay here (docs/lab-notes.md).

    Both learning rates have a linear warm-up and a cosine decay. Gradients are clipped to norm 1.

    Args:
        model: the module; frozen parameters are not trained.
        rate: AdamW's highest learning rate.
        steps: number of all training steps; the cosine decay ends after them.
        warmup: number of first steps, in which the learning rates rise.
        muon_rate: Muon's highest learning rate; None to train everything with AdamW.
        weight_decay: AdamW's weight decay.
        final_rate: last learning rate, as a share of the highest.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        rate: float,
        steps: int,
        warmup: int,
        muon_rate: float | None,
        weight_decay: float = 0.01,
        final_rate: float = 0.02,
    ):
        def schedule(highest: float) -> Callable[[mx.array], mx.array]:
            """Return a function from the step to the learning rate, which is at most ``highest``.

            The first rate is 1% of ``highest``.
            """
            first = highest * 0.01
            last = highest * final_rate
            rise = optim.linear_schedule(first, highest, warmup)
            falling_steps = max(steps - warmup, 1)  # MLX refuses 0
            fall = optim.cosine_decay(highest, falling_steps, last)
            return optim.join_schedules([rise, fall], [warmup])

        self.model = model
        adamw = optim.AdamW(
            schedule(rate),
            betas=[0.9, 0.98],
            weight_decay=weight_decay,
        )
        self.optimizer: optim.Optimizer = adamw
        if muon_rate is not None:
            muon = optim.Muon(
                schedule(muon_rate),
                momentum=0.95,
                weight_decay=0.0,
            )
            # Muon gets the parameters for which the condition is true, and AdamW all others.
            self.optimizer = optim.MultiOptimizer([muon, adamw], [_is_inner_matrix])
        self.optimizer.init(model.trainable_parameters())

    def update(self, gradients: Any) -> mx.array:
        """Clip the gradients, apply one optimizer step, and return the norm before clipping."""
        clipped, norm = optim.clip_grad_norm(gradients, 1.0)
        self.optimizer.update(self.model, clipped)
        mx.eval(self.model.parameters(), self.optimizer.state)
        return norm

    def state(self) -> dict[str, mx.array]:
        """Return the arrays to save.

        The parameters are named ``model.*``, and the optimizer's state ``optimizer.*``.
        """
        state = {}
        for name, value in tree_flatten(self.model.parameters()):
            state[f"model.{name}"] = value
        for name, value in tree_flatten(self.optimizer.state):
            state[f"optimizer.{name}"] = value
        return state

    def restore(self, state: dict[str, mx.array]) -> None:
        """Continue from arrays that ``state()`` returned earlier.

        Raises:
            ValueError: a parameter of the model is missing, surplus or misshaped.
        """
        weights = part_of(state, "model.")
        self.model.load_weights(list(weights.items()), strict=True)
        optimizer_state = part_of(state, "optimizer.")
        self.optimizer.state = tree_unflatten(list(optimizer_state.items()))
        # Read the arrays from the file now, because a later step may run in another thread, and
        # that thread could not read them.
        mx.eval(self.model.parameters(), self.optimizer.state)


def compiled_gradient(
    model: nn.Module,
    loss: Callable[[Any, dict[str, mx.array]], Any],
) -> Callable[[Batch], Any]:
    """Return a compiled function that computes a loss and its gradients on a batch.

    Compiling takes some seconds on a CPU and then saves time in every step. MLX compiles again for
    a batch whose arrays have other shapes. With CUDA the function is not compiled, because MLX
    would build hundreds of kernels at the first step, for minutes (docs/lab-notes.md).

    Args:
        model: every call uses its parameters at the time of the call.
        loss: a function of the model and the batch. It returns the value to minimise, or a tuple
            that begins with that value. It must not compute an expression twice and return one of
            the two results: MLX 0.32 then fails to compile.

    Returns:
        A function from a batch to a pair: the result of ``loss``, and the gradients of the
        trainable parameters.
    """
    # Tracing leaves placeholders in a module's parameters. A copy is traced, so that the model
    # stays usable and several functions of one model can be compiled.
    traced = copy.deepcopy(model)

    def compute(parameters: Any, arrays: dict[str, mx.array]) -> Any:
        traced.update(parameters)
        value_and_gradients = nn.value_and_grad(traced, loss)
        return value_and_gradients(traced, arrays)

    compiled = compute if is_cuda() else mx.compile(compute)

    def call_compiled(batch: Batch) -> Any:
        """Convert a batch to MLX's arrays and call the compiled function."""
        arrays = {}
        for name, value in batch.items():
            arrays[name] = mx.array(value)
        return compiled(model.parameters(), arrays)

    return call_compiled


def _is_inner_matrix(path: str, array: mx.array) -> bool:
    """Return whether Muon updates a parameter: a matrix or kernel from features to features.

    AdamW updates vectors, embeddings, output heads, and the codec's first and last convolutions.

    Args:
        path: the parameter's dotted name.
        array: the parameter, or its gradient, which has the same shape.
    """
    if array.ndim < 2:
        return False
    outer = ("embed", "head", "conv_in", "conv_out")  # parts of the dotted names
    return not any(part in path for part in outer)


def part_of(state: dict[str, mx.array], prefix: str) -> dict[str, mx.array]:
    """Select the arrays whose names start with a prefix, and remove the prefix from the names."""
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
        stage: the stage to run; it is left in its final state.
        folder: holds ``checkpoints/`` and the log.
        recipe: everything that the result depends on, as text. A checkpoint that was saved with
            another recipe is refused.
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
    recorder = _Recorder(stage, folder, recipe, every=every, spent=spent) if writes else None
    try:
        if recorder:
            # The steps after the checkpoint run again, so their lines in the log must go.
            _cut_log(recorder.log, stage.name, done)
        while done < stage.steps:
            measured = stage.step(done)
            done += 1
            if recorder and report:
                report(stage.name, done, stage.steps, measured)
            if recorder:
                recorder.add(done, measured)
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be written ({error.strerror}): free some space, then run it again"
        ) from None


def load_state(folder: Path, stage: str) -> dict[str, mx.array]:
    """Load the arrays of a finished stage's last checkpoint."""
    return dict(mx.load(str(checkpoint_file(folder, stage))))  # type: ignore[arg-type]


def wait_for_stage(folder: Path, stage: str, steps: int) -> None:
    """Return as soon as another process has written the last checkpoint of a stage.

    A barrier of ``mlx.core.distributed`` would keep a CPU core busy while it waits.

    Args:
        folder: holds ``checkpoints/``.
        stage: the stage's name.
        steps: its number of steps.
    """
    path = checkpoint_file(folder, stage)
    while not path.exists() or _finished_steps(path) < steps:
        time.sleep(_POLL)


def _finished_steps(path: Path) -> int:
    """Return the number of finished steps that a checkpoint records."""
    with safe_open(path, framework="numpy") as file:
        return int(file.metadata()["steps"])


class _Recorder:
    """Writer of the checkpoint and the log of a running stage.

    Args:
        stage: the running stage.
        folder: holds ``checkpoints/`` and the log.
        recipe: text that is stored in the checkpoint.
        every: least number of seconds between two checkpoints.
        spent: seconds that earlier processes spent on this stage.
    """

    def __init__(self, stage: Stage, folder: Path, recipe: str, *, every: float, spent: float):
        self.log = folder / LOG_FILE
        self._checkpoint = checkpoint_file(folder, stage.name)
        self._stage = stage
        self._recipe = recipe
        self._every = every
        self._measured: list[dict[str, float]] = []  # measurements since the log's last line
        now = time.monotonic()
        self._saved = now  # time of the last checkpoint, or of this process's start
        self._started = now - spent  # as if this process had run the stage from its first step

    def add(self, done: int, measured: dict[str, float]) -> None:
        """Record a finished step.

        Every ``_LOG_EVERY`` steps and after the last one, this appends a line to the log. Then it
        saves a checkpoint, if the step is the last or enough time has passed.

        Args:
            done: number of finished steps, including the recorded one.
            measured: the step's measurements.
        """
        self._measured.append(measured)
        is_last = done == self._stage.steps
        # A checkpoint is saved only right after a line, so that the log has all steps before it.
        if not is_last and done % _LOG_EVERY:
            return
        seconds = time.monotonic() - self._started
        _append_to_log(self.log, self._stage.name, done, seconds, self._measured)
        self._measured = []
        since_saved = time.monotonic() - self._saved
        if is_last or since_saved > self._every:
            metadata = {
                "steps": str(done),
                "seconds": f"{seconds:.1f}",
                "recipe": self._recipe,
            }
            state = self._stage.state()
            _save(self._checkpoint, state, metadata)
            self._saved = time.monotonic()


def _resume(stage: Stage, path: Path, recipe: str) -> tuple[int, float]:
    """Restore a stage from its checkpoint.

    Returns:
        The number of finished steps, and the seconds that they took. Both are 0 if there is no
        checkpoint; the stage is then unchanged.

    Raises:
        CheckpointError: the checkpoint is damaged, or was saved with another recipe or by another
            version of the stage.
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
    """Write a checkpoint atomically, so that a kill never damages the earlier checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with draft_beside(path, path.suffix) as draft:  # MLX writes only to a suffix that it knows
        write_safetensors(draft, state, metadata)
        draft.replace(path)


def _append_to_log(
    path: Path,
    stage: str,
    done: int,
    seconds: float,
    measured: Sequence[dict[str, float]],
) -> None:
    """Append one line with the means of several steps' measurements.

    Means are rounded to 5 significant digits.

    Args:
        path: the log.
        stage: the stage's name.
        done: number of finished steps.
        seconds: time spent on the stage so far.
        measured: one dictionary per step. The mean of a key is over the steps that have the key.
    """
    values_by_key: dict[str, list[float]] = {}
    for measured_in_step in measured:
        for key, value in measured_in_step.items():
            values_by_key.setdefault(key, []).append(value)
    line: dict[str, Any] = {
        "stage": stage,
        "step": done,
        "seconds": round(seconds, 1),
    }
    for key, values in values_by_key.items():
        mean = np.mean(values)
        line[key] = float(f"{mean:.5g}")
    with _log_lock(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _cut_log(path: Path, stage: str, done: int) -> None:
    """Drop a stage's lines about steps after ``done``, and any line that a kill cut short.

    The lines of other stages stay, since all stages of a run share the log.

    Args:
        path: the log.
        stage: the stage's name.
        done: number of steps whose lines stay.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _log_lock(path):
        if not path.exists():
            return
        kept = []
        for line in read_log(path):
            is_of_other_stage = line["stage"] != stage
            if is_of_other_stage or line["step"] <= done:
                kept.append(json.dumps(line) + "\n")
        write_atomically(path, "".join(kept))


def _log_lock(path: Path) -> FileLock:
    """Return the lock that a process must hold while it changes the log.

    Two processes may each run a stage with the same log. Without the lock, one could rewrite the
    log while the other appends to it.
    """
    lock_file = path.with_name(f".{path.name}.lock")
    return FileLock(lock_file)


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a log, each a dictionary; skip a line that a kill cut short."""
    records = []
    text = read_bounded(path, MAX_RECORDS_FILE).decode()
    for line in text.splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:  # not whole
            continue
    return records
