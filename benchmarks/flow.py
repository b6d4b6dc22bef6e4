"""Convert and draw with a JanusFlow of the published shape, beside the same loop on torch.

    python benchmarks/flow.py                             # about 9 GB of disk
    python benchmarks/flow.py --torch venv/bin/python     # also on torch, of another environment
    python benchmarks/flow.py --table                     # the results so far

Weights are random, and have the published names, shapes and types. Every step is computed in two
ways from the same latents, one after the other: with the kept prompt, and with the prompt read
again, as the published code does. Every stage runs in its own process and appends a line to
``results.jsonl``, so a killed run continues. The environment of ``--torch`` needs torch,
transformers and safetensors.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for a run as a bare script

from benchmarks.stages import Facts, read_results, report_stage, run_stages

if TYPE_CHECKING:
    import mlx.core as mx

    from mlx_janus.decode.flow import FlowDrawing
    from mlx_janus.models.janus import JanusModel

STEPS = 30  # steps of an image; the first of them are done
PROMPTS = {
    "short": "A stunning princess from kabul in red, white traditional clothing, blue eyes, brown "
    "hair",
    "long": "The skyline of a harbour at dawn: fishing boats come in between the moles, gulls "
    "follow them, "
    "nets hang over the railings, men in yellow coats throw ropes to a boy on the quay, and above "
    "the market hall with its green roof a crane swings a crate of ice. In the foreground a woman "
    "sits on a bollard, reads a newspaper and drinks coffee from a tin cup. The light is low and "
    "warm, the water is dark, with long reflections of the lamps that still burn. It is painted in "
    "oil on a wide canvas, with a loose brush, thick in the lights and thin in the shadows.",
}
Times = list[list[float]]  # of each step: wall time and CPU time, in seconds


def checkpoint(work: Path, model: str) -> Facts:
    """Write the two published folders, or copy the tiny ones of the tests."""
    from tqdm import tqdm

    from benchmarks.published_flow import FIXTURES, download_bytes, write_flow_checkpoint

    for folder in (work / "source", work / "vae"):
        shutil.rmtree(folder, ignore_errors=True)
    if model == "tiny":
        shutil.copytree(FIXTURES / "janusflow", work / "source")
        shutil.copytree(FIXTURES / "sdxl-vae", work / "vae")
    else:
        with tqdm(total=download_bytes(), unit="B", unit_scale=True) as bar:
            write_flow_checkpoint(work / "source", work / "vae", bar.update)
    return {"size": _folder_size(work / "source") + _folder_size(work / "vae")}


def convert(work: Path) -> Facts:
    """Convert the folders into one."""
    from mlx_janus.weights.convert import ConvertOptions, Source, convert_checkpoint
    from mlx_janus.weights.vae_files import VAESource

    source = Source(work / "source", "random", vae=VAESource(work / "vae", "random"))
    done = convert_checkpoint(source, work / "converted", ConvertOptions(overwrite=True))
    return {"size": done.size, "tensors": done.tensors}


def draw(work: Path, prompt: str, steps: int, threads: int) -> Facts:
    """Time steps of one image, and measure memory; write the task for torch."""
    import mlx.core as mx
    import numpy as np

    import mlx_janus
    from mlx_janus.decode.flow import seed_noise
    from mlx_janus.weights.footprint import task_memory

    janus = mlx_janus.load(work / "converted", dtype="float32")
    options = janus.pathway.options({"steps": STEPS})
    noise = seed_noise(0, janus.config.generation.latent_shape)[None]
    ids = janus.pathway.prompt_ids(PROMPTS[prompt])
    task = {"ids": ids, "steps": STEPS, "done": steps, "cfg_weight": options.cfg_weight}
    (work / f"task-{prompt}.json").write_text(json.dumps(task | {"threads": threads}))
    np.save(work / f"noise-{prompt}.npy", np.array(noise))
    pad = janus.prompts.special.pad
    mx.eval(janus.model.drawing_arrays(), janus.model.embed_text(mx.array([[pad]])))
    facts, drawing = _draw_steps(janus.model, ids[:-1], pad, noise, options, steps)
    embedding = janus.model.language_model.model.embed_tokens.weight.nbytes
    facts |= {"tokens": len(ids), "mlx_peak": facts["mlx_peak"] - embedding}
    np.save(work / f"ours-{prompt}.npy", np.array(drawing.latents))
    return facts | {"computed": task_memory(janus.config, "float32")["draw"]}


def decode(work: Path) -> Facts:
    """Time the decoding of one image, and measure its memory without other weights."""
    import mlx.core as mx

    import mlx_janus
    from mlx_janus.weights.footprint import task_memory

    janus = mlx_janus.load(work / "converted", dtype="float32")
    mx.eval(janus.model.decoding_arrays())
    mx.clear_cache()
    mx.reset_peak_memory()
    started = _clock()
    mx.eval(janus.model.vae(mx.zeros((1, *janus.config.generation.latent_shape))))
    facts = {"decode": _since(started), "mlx_peak": mx.get_peak_memory()}
    return facts | {"computed": task_memory(janus.config, "float32")["decode"]}


def _draw_steps(
    model: JanusModel,
    prompt: Sequence[int],
    pad: int,
    noise: mx.array,
    options: Any,
    steps: int,
) -> tuple[Facts, FlowDrawing]:
    """Do the first steps of an image in both ways; return their times, and the drawing."""
    import mlx.core as mx

    from mlx_janus.decode.flow import FlowDrawing

    started = _clock()
    drawing = FlowDrawing(model, [prompt], pad, noise, options)
    mx.eval([layer.state for layer in drawing._cache])
    facts: Facts = {"prompt": _since(started), "kept": [], "whole": []}
    for _ in range(steps):
        started = _clock()
        mx.eval(_velocity_of_whole(drawing, prompt, pad))
        facts["whole"].append(_since(started))
        mx.clear_cache()
        mx.reset_peak_memory()
        started = _clock()
        drawing.step()
        facts["kept"].append(_since(started))
        facts["mlx_peak"] = mx.get_peak_memory()
        click.echo(facts, err=True)
    return facts, drawing


def _velocity_of_whole(drawing: FlowDrawing, prompt: Sequence[int], pad: int) -> mx.array:
    """Return the guided velocity of a drawing's next step; the prompt is read with it."""
    import mlx.core as mx

    from mlx_janus.decode.flow import _pass_mask, flow_velocity
    from mlx_janus.decode.sampling import guide

    model = drawing._model
    read = len(prompt)
    empty = [prompt[0], *[pad] * (read - 1)]
    length = read + drawing._positions
    keys = mx.arange(length)
    of_text = mx.broadcast_to(keys <= keys[:read, None], (2, 1, read, length))
    of_image = _pass_mask(read, drawing._positions, 1, 2)
    assert of_image is not None
    mask = mx.concatenate([of_text, of_image], axis=2)

    class Whole:
        """The model, whose language model reads the prompt before each sequence."""

        def __getattr__(self, name: str) -> Any:
            return getattr(model, name)

        def hidden_states(self, sequence: mx.array, *_: Any) -> mx.array:
            text = model.embed_text(mx.array([prompt, empty]))
            joined = mx.concatenate([text, sequence], axis=1)
            return model.hidden_states(joined, model.make_cache(length), mask)[:, read:]

    latents = mx.concatenate([drawing.latents] * 2)
    time = drawing._times[drawing.steps_done][None]
    velocity = flow_velocity(Whole(), latents, time, [])  # type: ignore[arg-type]
    return guide(*mx.split(velocity, 2), drawing.options.cfg_weight)


def on_torch(work: Path, prompt: str, python: str) -> Facts:
    """Run the same steps on torch, and compare the latents."""
    import numpy as np

    script = Path(__file__).with_name("flow_torch.py")
    command = [python, str(script), str(work / "source"), str(work), prompt]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    facts: Facts = json.loads(done.stdout.splitlines()[-1])
    ours, theirs = (np.load(work / f"{side}-{prompt}.npy") for side in ("ours", "torch"))
    difference = np.sqrt(np.mean((ours - theirs) ** 2) / np.mean(theirs**2))
    return facts | {"difference": float(difference)}


def print_tables(results: dict[str, Facts]) -> None:
    """Print the results as Markdown tables."""
    from benchmarks.machine import machine

    print(f"Machine: {machine()}\n")
    print("| stage | wall time | peak resident memory | folder |\n|---|---|---|---|")
    for name, facts in results.items():
        size = _gb(facts["size"]) if "size" in facts else ""
        print(f"| {name} | {facts['wall_s']:.0f} s | {_gb(facts['peak_rss'])} | {size} |")
    for prompt in PROMPTS:
        if f"draw-{prompt}" in results:
            _print_steps(results[f"draw-{prompt}"], results.get(f"torch-{prompt}"))
    print("\n| MLX's peak | measured | computed |\n|---|---|---|")
    for name, facts in results.items():
        if "mlx_peak" in facts:
            print(f"| {name} | {_gb(facts['mlx_peak'])} | {_gb(facts['computed'])} |")
    if "decode" in results:
        print(f"\nDecoding an image: {_seconds([results['decode']['decode']])}")


def _print_steps(ours: Facts, theirs: Facts | None) -> None:
    """Print the times of a step for one prompt, ours and torch's, and their ratios."""
    print(f"\nA step after a prompt of {ours['tokens']} tokens, median: wall time (CPU time).\n")
    print("| prompt | mlx_janus | torch | times as fast, by CPU time |\n|---|---|---|---|")
    for kind, title in (("kept", "kept"), ("whole", "read again")):
        shown = _seconds(theirs[kind]) if theirs else ""
        ratio = f"{_cpu(theirs[kind]) / _cpu(ours[kind]):.2f}" if theirs else ""
        print(f"| {title} | {_seconds(ours[kind])} | {shown} | {ratio} |")
    gains = [
        f"{_cpu(side['whole']) / _cpu(side['kept']):.2f}" if side else "" for side in (ours, theirs)
    ]
    print(f"| kept, times as fast | {gains[0]} | {gains[1]} | |")
    if theirs:
        print(
            f"\ntorch {theirs['torch']}, transformers {theirs['transformers']}. The latents differ "
            f"by {theirs['difference']:.1e}, relative rms."
        )


def _cpu(times: Times) -> float:
    """Return the median CPU time."""
    return median(cpu for _, cpu in times)


def _seconds(times: Times) -> str:
    """Return the median wall time and CPU time as text."""
    return f"{median(wall for wall, _ in times):.2f} s ({_cpu(times):.2f} s)"


def _clock() -> tuple[float, float]:
    """Return wall time and the CPU time of this process, in seconds."""
    return time.perf_counter(), time.process_time()


def _since(started: tuple[float, float]) -> list[float]:
    """Return the seconds since a reading of ``_clock``: wall time and CPU time."""
    return [now - then for now, then in zip(_clock(), started, strict=True)]


def _folder_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _gb(value: float) -> str:
    return f"{value / 1e9:.2f} GB"


def run_stage(stage: str, work: Path, model: str, steps: int, threads: int, python: str) -> None:
    """Run one stage in a child process; print one JSON line."""
    import mlx_janus  # noqa: F401  # OpenBLAS before MLX

    kind, _, prompt = stage.partition("-")
    run = {
        "checkpoint": lambda: checkpoint(work, model),
        "convert": lambda: convert(work),
        "decode": lambda: decode(work),
        "draw": lambda: draw(work, prompt, steps, threads),
        "torch": lambda: on_torch(work, prompt, python),
    }
    report_stage(stage, run[kind])


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", type=click.Choice(["1.3b", "tiny"]), default="1.3b", show_default=True)
@click.option(
    "--work", type=click.Path(path_type=Path), default=Path("models/flow"), show_default=True
)
@click.option("--steps", type=click.IntRange(1, STEPS), default=3, show_default=True)
@click.option(
    "--threads",
    type=click.IntRange(min=0),
    default=0,
    help="Threads of torch; set OPENBLAS_NUM_THREADS for ours. 0, the default: torch's own choice.",
)
@click.option("--torch", "python", metavar="PYTHON", help="An interpreter that has torch.")
@click.option("--only", multiple=True, metavar="STAGE", help="Run this stage again; repeatable.")
@click.option("--table", is_flag=True, help="Print the results so far.")
@click.option("--stage", hidden=True)
def main(
    model: str,
    work: Path,
    steps: int,
    threads: int,
    python: str | None,
    only: tuple[str, ...],
    table: bool,
    stage: str | None,
) -> None:
    """Measure conversion, steps and memory of a JanusFlow with random weights."""
    if stage:
        run_stage(stage, work, model, steps, threads, python or "")
        return
    work.mkdir(parents=True, exist_ok=True)
    log = work / "results.jsonl"
    if table:
        print_tables(read_results(log))
        return
    command = [__file__, "--model", model, "--work", str(work)]
    command += ["--steps", str(steps), "--threads", str(threads)]
    sides = ["draw"]
    if python:
        command += ["--torch", python]
        sides.append("torch")
    names = ["checkpoint", "convert", "decode"]
    names += [f"{side}-{prompt}" for prompt in PROMPTS for side in sides]
    print_tables(run_stages(names, command, log, only))


if __name__ == "__main__":
    main()
