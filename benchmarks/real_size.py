"""The whole way at real size: random weights of the published shapes, converted, asked about photographs, drawn with.

    python benchmarks/real_size.py                      # Janus-Pro-1B's shape: about 21 GB of disk
    python benchmarks/real_size.py --model 7b           # Janus-Pro-7B's: conversion alone, about 75 GB of disk
    python benchmarks/real_size.py --only draw-float32  # one stage
    python benchmarks/real_size.py --table              # what was measured so far, as tables

Every stage runs in a process of its own, so that its peak of resident memory is its own, and leaves a line in
``results-MODEL.jsonl``: a run that was killed goes on where it stopped. Times are wall times of one run.
"""

from __future__ import annotations

import json
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import click

QUESTION = "What is in this picture? Describe it in detail."
PROMPT = (
    "A close-up high-contrast photo of Sydney Opera House sitting next to Eiffel tower, under a blue night sky of "
    "roiling energy, exploding yellow stars, and radiating swirls of blue"
)
WIDTHS = {  # of the weights: folder, dtype, tokens answered, positions drawn
    "float32": ("bf16", "float32", 16, None),
    "bf16": ("bf16", "bfloat16", 4, 16),
    "8bit": ("8bit", "float32", 4, 16),
    "4bit": ("4bit", "float32", 4, 16),
}
Facts = dict[str, Any]


def folder_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def make_checkpoint(work: Path, model: str) -> Facts:
    from benchmarks.random_checkpoint import write_checkpoint

    source = work / f"janus-{model}-random"
    shutil.rmtree(source, ignore_errors=True)
    write_checkpoint(source, model, progress=True)
    return {"size": folder_size(source)}


def convert(work: Path, model: str, kind: str) -> Facts:
    from mlx_janus.weights.convert import ConvertOptions, Source, convert_checkpoint

    source = Source(work / f"janus-{model}-random", f"random {model}")
    bits, dtype = (
        (int(kind[0]), None)
        if kind.endswith("bit")
        else (None, "float32" if kind == "float32" else None)
    )
    done = convert_checkpoint(
        source, work / f"{model}-{kind}", ConvertOptions(bits=bits, dtype=dtype, overwrite=True)
    )
    if kind == "float32":  # the widest form, made for its memory alone
        shutil.rmtree(done.path)
    return {"size": done.size, "tensors": done.tensors}


def verify(work: Path, model: str, kind: str) -> Facts:
    from mlx_janus.weights.convert import Source
    from mlx_janus.weights.verify import verify_conversion

    source = Source(work / f"janus-{model}-random", f"random {model}")
    return {"tensors": verify_conversion(source, work / f"{model}-{kind}")}


def answer(work: Path, model: str, width: str) -> Facts:
    import mlx_janus
    from benchmarks.photos import photographs

    kind, dtype, tokens, _ = WIDTHS[width]
    name, photograph = next(iter(photographs().items()))
    janus = mlx_janus.load(work / f"{model}-{kind}", dtype=dtype)
    started = time.perf_counter()
    result = janus.generate_text(QUESTION, [photograph], max_tokens=tokens)
    return {
        "photograph": name,
        "prompt_tokens": result.prompt_tokens,
        "first_token_s": result.prompt_tokens / result.prompt_tps,
        "token_s": 1 / result.generation_tps,
        "tokens": len(result.tokens),
        "whole_call_s": time.perf_counter() - started,
        "mlx_peak": result.peak_memory,
    }


def draw(work: Path, model: str, width: str) -> Facts:
    import mlx.core as mx

    import mlx_janus

    kind, dtype, _, positions = WIDTHS[width]
    janus = mlx_janus.load(work / f"{model}-{kind}", dtype=dtype)
    started = time.perf_counter()
    marks = []
    for step in janus.stream_images(PROMPT, seed=0):
        marks.append(time.perf_counter())
        if step.images:
            step.images[0].save(work / f"{model}-{width}.png")
        elif step.index == positions:
            break
    drawn = marks[:positions] if positions else marks[:-1]
    steps = sorted(b - a for a, b in pairwise(drawn))
    facts = {
        "positions": len(drawn),
        "first_step_s": drawn[0] - started,
        "step_s": steps[len(steps) // 2],
        "mlx_peak": mx.get_peak_memory(),
    }
    return (
        facts
        if positions
        else {**facts, "vq_decode_s": marks[-1] - drawn[-1], "picture_s": marks[-1] - started}
    )


def decode(work: Path, model: str) -> Facts:
    """One picture's codes to pixels: what the activations take beside the codec's weights."""
    import mlx.core as mx

    import mlx_janus

    janus = mlx_janus.load(work / f"{model}-bf16", dtype="float32")
    mx.eval(janus.model.decoding_arrays())
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    started = time.perf_counter()
    mx.eval(
        janus.model.decode_image_tokens(
            mx.zeros((1, janus.config.generation.tokens), dtype=mx.int32)
        )
    )
    return {"decode_s": time.perf_counter() - started, "activations": mx.get_peak_memory() - before}


def stages(model: str) -> dict[str, Callable[[Path], Facts]]:
    found: dict[str, Callable[[Path], Facts]] = {
        "checkpoint": lambda work: make_checkpoint(work, model)
    }
    for kind in ("bf16", "8bit", "4bit", "float32"):
        found[f"convert-{kind}"] = lambda work, kind=kind: convert(work, model, kind)
    if model == "7b":
        return found
    found["verify-4bit"] = lambda work: verify(work, model, "4bit")
    found["vq-decode"] = lambda work: decode(work, model)
    for width in WIDTHS:
        found[f"answer-{width}"] = lambda work, width=width: answer(work, model, width)
        found[f"draw-{width}"] = lambda work, width=width: draw(work, model, width)
    return found


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )
    import psutil

    memory = psutil.virtual_memory().total / 2**30
    versions = ", ".join(f"{name} {version(name)}" for name in ("mlx", "mlx-lm"))
    return (
        f"{cpu}, {psutil.cpu_count()} cores, {memory:.0f} GiB, {platform.system()} {platform.machine()}, "
        f"Python {platform.python_version()}, {versions}"
    )


def run_stage(name: str, model: str, work: Path) -> None:
    """Child process: one stage, one JSON line on stdout."""
    import mlx_janus  # noqa: F401  # OpenBLAS before MLX

    started = time.perf_counter()
    facts = stages(model)[name](work)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    print(json.dumps({"stage": name, "wall_s": seconds, "peak_rss": peak, **facts}))


def print_tables(results: dict[str, Facts], model: str) -> None:
    def gb(value: float) -> str:
        return f"{value / 1e9:.2f} GB"

    print(f"Machine: {machine()}\n")
    print(f"| {model}: stage | wall time | peak resident memory | folder |\n|---|---|---|---|")
    for name, facts in results.items():
        if name.startswith(("checkpoint", "convert", "verify")):
            size = gb(facts["size"]) if "size" in facts else ""
            print(f"| {name} | {facts['wall_s']:.0f} s | {gb(facts['peak_rss'])} | {size} |")
    answers = {name: facts for name, facts in results.items() if name.startswith("answer")}
    if answers:
        print(
            "\n| answer about a photograph | prompt | first token | each further | MLX peak | peak resident |"
        )
        print("|---|---|---|---|---|---|")
    for name, facts in answers.items():
        print(
            f"| {name} | {facts['prompt_tokens']} tokens | {facts['first_token_s']:.1f} s | {facts['token_s']:.2f} s | "
            f"{gb(facts['mlx_peak'])} | {gb(facts['peak_rss'])} |"
        )
    draws = {name: facts for name, facts in results.items() if name.startswith("draw")}
    if draws:
        print(
            "\n| draw | positions | step, median | VQ decode | picture | MLX peak | peak resident |"
        )
        print("|---|---|---|---|---|---|---|")
    for name, facts in draws.items():
        decode = f"{facts['vq_decode_s']:.1f} s" if "vq_decode_s" in facts else ""
        picture = f"{facts['picture_s']:.0f} s" if "picture_s" in facts else ""
        print(
            f"| {name} | {facts['positions']} | {facts['step_s']:.3f} s | {decode} | {picture} | "
            f"{gb(facts['mlx_peak'])} | {gb(facts['peak_rss'])} |"
        )

    if decoded := results.get("vq-decode"):
        print(
            f"\nVQ decode alone: {decoded['decode_s']:.1f} s, activations {gb(decoded['activations'])}"
        )


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", type=click.Choice(["tiny", "1b", "7b"]), default="1b", show_default=True)
@click.option(
    "--work", type=click.Path(path_type=Path), default=Path("models/real-size"), show_default=True
)
@click.option(
    "--only", multiple=True, metavar="STAGE", help="Run these stages, again if they ran before."
)
@click.option("--table", is_flag=True, help="Print what was measured so far.")
@click.option("--stage", hidden=True)
def main(model: str, work: Path, only: tuple[str, ...], table: bool, stage: str | None) -> None:
    """Measure conversion, answering and drawing on random weights of a published shape."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    if stage:
        run_stage(stage, model, work)
        return
    if unknown := set(only) - set(stages(model)):
        raise click.UsageError(
            f"no stage {', '.join(sorted(unknown))}: there are {', '.join(stages(model))}."
        )
    work.mkdir(parents=True, exist_ok=True)
    log = work / f"results-{model}.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    results = {facts["stage"]: facts for facts in lines}
    for name in () if table else stages(model):
        if name in only or (not only and name not in results):
            click.echo(f"{name} ...", err=True)
            command = [
                sys.executable,
                __file__,
                "--model",
                model,
                "--work",
                str(work),
                "--stage",
                name,
            ]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            results[name] = json.loads(done.stdout.splitlines()[-1])
            with log.open("a") as file:
                file.write(json.dumps(results[name]) + "\n")
            click.echo(json.dumps(results[name]), err=True)
    print_tables(results, model)


if __name__ == "__main__":
    main()
