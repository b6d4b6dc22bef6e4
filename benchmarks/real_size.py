"""Convert, answer and generate at real size, with random weights of the published shapes.

    python benchmarks/real_size.py                      # Janus-Pro-1B's: about 21 GB of disk
    python benchmarks/real_size.py --model 7b           # only conversion: about 75 GB of disk
    python benchmarks/real_size.py --only draw-float32  # one stage
    python benchmarks/real_size.py --table              # the results so far, as tables

Every stage runs in its own process, so it has its own peak of resident memory, and appends a line
to ``results-MODEL.jsonl``. A killed run continues with the missing stages. Times are wall times of
one run.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import click

QUESTION = "What is in this picture? Describe it in detail."
PROMPT = (
    "A close-up high-contrast photo of Sydney Opera House sitting next to Eiffel tower, under a "
    "blue night sky of roiling energy, exploding yellow stars, and radiating swirls of blue"
)
WIDTHS = {  # folder, dtype, answered tokens, generated positions (None: all)
    "float32": ("bf16", "float32", 16, None),
    "bf16": ("bf16", "bfloat16", 4, 16),
    "8bit": ("8bit", "float32", 4, 16),
    "4bit": ("4bit", "float32", 4, 16),
}
Facts = dict[str, Any]


def folder_size(folder: Path) -> int:
    """Return the bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.iterdir())


def make_checkpoint(work: Path, model: str) -> Facts:
    """Write the source folder with random weights."""
    from benchmarks.random_checkpoint import write_checkpoint

    source = work / f"janus-{model}-random"
    shutil.rmtree(source, ignore_errors=True)
    write_checkpoint(source, model, progress=True)
    return {"size": folder_size(source)}


def convert(work: Path, model: str, kind: str) -> Facts:
    """Convert the source to a kind: bits or a float type."""
    from mlx_janus.weights.convert import ConvertOptions, Source, convert_checkpoint

    source = Source(work / f"janus-{model}-random", f"random {model}")
    bits = int(kind[0]) if kind.endswith("bit") else None
    dtype = "float32" if kind == "float32" else None
    options = ConvertOptions(bits=bits, dtype=dtype, overwrite=True)
    done = convert_checkpoint(source, work / f"{model}-{kind}", options)
    if kind == "float32":  # only its peak memory is of interest
        shutil.rmtree(done.path)
    return {"size": done.size, "tensors": done.tensors}


def verify(work: Path, model: str, kind: str) -> Facts:
    """Compare a conversion with its source."""
    from mlx_janus.weights.convert import Source
    from mlx_janus.weights.verify import verify_conversion

    source = Source(work / f"janus-{model}-random", f"random {model}")
    return {"tensors": verify_conversion(source, work / f"{model}-{kind}")}


def answer(work: Path, model: str, width: str) -> Facts:
    """Answer a question about a photograph."""
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
    """Generate an image, or its first positions."""
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
    if positions is None:
        facts["vq_decode_s"] = marks[-1] - drawn[-1]
        facts["picture_s"] = marks[-1] - started
    return facts


def decode(work: Path, model: str) -> Facts:
    """Decode the tokens of one image; measure the activations without the codec's weights."""
    import mlx.core as mx

    import mlx_janus

    janus = mlx_janus.load(work / f"{model}-bf16", dtype="float32")
    mx.eval(janus.model.decoding_arrays())
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    started = time.perf_counter()
    tokens = mx.zeros((1, janus.config.generation.tokens), dtype=mx.int32)
    mx.eval(janus.model.decode_image_tokens(tokens))
    return {"decode_s": time.perf_counter() - started, "activations": mx.get_peak_memory() - before}


def stages(model: str) -> dict[str, Callable[[Path], Facts]]:
    """Return the stages of a model, by name."""
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


def run_stage(name: str, model: str, work: Path) -> None:
    """Run one stage in a child process; print one JSON line."""
    import mlx_janus  # noqa: F401  # OpenBLAS before MLX

    started = time.perf_counter()
    facts = stages(model)[name](work)
    seconds = time.perf_counter() - started
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss
    peak = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"stage": name, "wall_s": seconds, "peak_rss": peak, **facts}))


def print_tables(results: dict[str, Facts], model: str) -> None:
    """Print the results as Markdown tables."""
    from benchmarks.machine import machine

    print(f"Machine: {machine()}\n")
    print(f"| {model}: stage | wall time | peak resident memory | folder |\n|---|---|---|---|")
    for name, facts in results.items():
        if name.startswith(("checkpoint", "convert", "verify")):
            size = _gb(facts["size"]) if "size" in facts else ""
            print(f"| {name} | {facts['wall_s']:.0f} s | {_gb(facts['peak_rss'])} | {size} |")
    _print_answers({name: facts for name, facts in results.items() if name.startswith("answer")})
    _print_images({name: facts for name, facts in results.items() if name.startswith("draw")})
    if decoded := results.get("vq-decode"):
        activations = _gb(decoded["activations"])
        print(f"\nVQ decode by itself: {decoded['decode_s']:.1f} s, activations {activations}")


def _print_answers(answers: dict[str, Facts]) -> None:
    if not answers:
        return
    print("\n| answer about a photograph | prompt | first token | each further ", end="")
    print("| MLX peak | peak resident |\n|---|---|---|---|---|---|")
    for name, facts in answers.items():
        print(
            f"| {name} | {facts['prompt_tokens']} tokens | {facts['first_token_s']:.1f} s "
            f"| {facts['token_s']:.2f} s | {_gb(facts['mlx_peak'])} | {_gb(facts['peak_rss'])} |"
        )


def _print_images(draws: dict[str, Facts]) -> None:
    if not draws:
        return
    print("\n| generate | positions | step, median | VQ decode | image ", end="")
    print("| MLX peak | peak resident |\n|---|---|---|---|---|---|---|")
    for name, facts in draws.items():
        decode = f"{facts['vq_decode_s']:.1f} s" if "vq_decode_s" in facts else ""
        image = f"{facts['picture_s']:.0f} s" if "picture_s" in facts else ""
        print(
            f"| {name} | {facts['positions']} | {facts['step_s']:.3f} s | {decode} | {image} "
            f"| {_gb(facts['mlx_peak'])} | {_gb(facts['peak_rss'])} |"
        )


def _gb(value: float) -> str:
    return f"{value / 1e9:.2f} GB"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", type=click.Choice(["tiny", "1b", "7b"]), default="1b", show_default=True)
@click.option(
    "--work", type=click.Path(path_type=Path), default=Path("models/real-size"), show_default=True
)
@click.option(
    "--only",
    multiple=True,
    metavar="STAGE",
    help="Run this stage, even if it ran before; may be repeated.",
)
@click.option("--table", is_flag=True, help="Print the results so far.")
@click.option("--stage", hidden=True)
def main(model: str, work: Path, only: tuple[str, ...], table: bool, stage: str | None) -> None:
    """Measure conversion, answers and images with random weights of a published shape."""
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
            command = [sys.executable, __file__, "--model", model]
            command += ["--work", str(work), "--stage", name]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            results[name] = json.loads(done.stdout.splitlines()[-1])
            with log.open("a") as file:
                file.write(json.dumps(results[name]) + "\n")
            click.echo(json.dumps(results[name]), err=True)
    print_tables(results, model)


if __name__ == "__main__":
    main()
