"""Does everything work on a GPU, and what does it cost? `python benchmarks/gpu.py`, at most 8 minutes on one card.

The rows of `ROWS` run in processes of their own and end up in tables. A row fails when what it measures lies outside
of its tolerance, when it raises, or when it takes longer than it may; the others still run, and the exit status is
then 1. What a row does stands in `benchmarks/gpu_rows.py`.

`--device cpu` runs all that a CPU can, on the toy base model alone. Nothing is asked from a network.

Source: [ours].
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib.metadata
import multiprocessing
import os
import pkgutil
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

PRECISIONS = ("float32", "tf32", "bf16", "fp16")
HALVES = ("bf16", "fp16")
DTYPES = ("float32", *HALVES)
# The rows on the toy: a part of their names, and the base.
TOYS = {"": "sd", "SDXL/": "sdxl", "SD3/": "sd3"}
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "xformers", "bitsandbytes")
START, END = 90, 30  # seconds that a process may take until its first row, and after its last one
PATIENCE = {"cuda": 1, "cpu": 10}  # a CPU may take so many times as long
# No network, and matrix products that sum in one order, so that two runs can be compared. Libraries read it when they
# are imported, which only the children do.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
OK, FAILED, NOT_HERE = "ok", "FAILED", "not here"


@dataclass(frozen=True)
class Model:
    """A base model whose steps are timed: size of the portraits, as they are or tiny, and precision."""

    side: int  # pixels of its portraits
    presets: tuple[int, ...]  # GB of the cards whose presets in the README are measured with it
    device: str = "cuda"
    steps: tuple[tuple[str, str], ...] = (("full", "bf16"), ("full", "fp16"), ("tiny", "fp16"))


# Another model is a line here, and one of WRITERS in benchmarks/gpu_rows.py.
MODELS = {
    "Stable Diffusion 1.5": Model(side=512, presets=(8, 12, 16, 24)),
    "toy": Model(side=64, presets=(8, 24), device="cpu", steps=(("full", "bf16"),)),
}


@dataclass(frozen=True)
class Row:
    """One row of a table."""

    name: str  # parts separated by "/"; the first is the section
    function: str  # "module:name", called with the `Bench` and the arguments
    arguments: tuple[Any, ...] = ()
    limit: int = 60  # seconds
    device: str = ""  # the only one it runs on

    @property
    def section(self) -> str:
        return self.name.split("/")[0]


def own(name: str) -> str:
    return f"benchmarks.gpu_rows:{name}"


STEPS = ("plain LoRA", "composed, targets made", "composed, targets found", "paper")
ROWS = [
    *(
        Row(f"training/{objective}/{precision}", own("training"), (objective, precision))
        for objective in ("composed", "paper")
        for precision in PRECISIONS
    ),
    Row("training/composed/8-bit AdamW", own("option"), ("bitsandbytes",)),
    Row("training/composed/xformers", own("option"), ("xformers",), device="cuda"),
    *(
        Row(f"training/SDXL/{objective}/{precision}", own("training"), (objective, precision, "sdxl"))
        for objective in ("composed", "paper")
        for precision in DTYPES
    ),
    *(Row(f"training/SDXL/VAE/{precision}", own("vae"), (precision,)) for precision in HALVES),
    *(
        Row(f"training/{name}pictures, {kind}/{precision}", own("validation"), (precision, flags, base), device="cuda")
        for name, base in list(TOYS.items())[1:]
        for kind, flags in {"models lent": "", "models kept": "--no-cache_latents --no-cache_text_embeddings"}.items()
        for precision in HALVES
    ),
    *(Row(f"training/SD3/{precision}", own("training"), ("composed", precision, "sd3")) for precision in DTYPES),
    *(
        Row(f"resume/{name}{precision}", own("resume"), (precision, base), limit=90)
        for name, base in TOYS.items()
        for precision in HALVES
    ),
    *(
        Row(f"pipeline/{name}{precision}", own("pipeline"), (precision, "", base))
        for name, base in TOYS.items()
        for precision in DTYPES
    ),
    Row("pipeline/fp16/model offload", own("pipeline"), ("fp16", "offload"), device="cuda"),
    Row("pipeline/fp16/sequential offload", own("pipeline"), ("fp16", "sequential"), device="cuda"),
    Row("pipeline/fp16/torch.compile", own("pipeline"), ("fp16", "compile"), limit=150),
    *(Row(f"models/{name}", own("weights"), (name,), 120, model.device) for name, model in MODELS.items()),
    *(
        Row(f"memory/{name}/{card} GB", own("preset"), (name, card), limit=120, device=model.device)
        for name, model in MODELS.items()
        for card in model.presets
    ),
    *(
        Row(f"steps/{name}/{size}/{precision}/{step}", own("step"), (name, size, precision, step), 90, model.device)
        for name, model in MODELS.items()
        for size, precision in model.steps
        for step in STEPS
    ),
]
# What stands above the table of each section.
SECTIONS = {
    "training": "Training on the toy, or on that of SDXL or SD3. `norm` and `cosine` are of stage 2's update of the "
    "LoRA, against float32's. SDXL's VAE is in float32 where the others are in fp16; `decoded` is the largest "
    "difference of what it makes while pictures are drawn, in autocast, from what it makes alone.",
    "resume": "Runs of all objectives that stop and go on; the largest difference of the LoRA's numbers, and of two "
    "runs that nothing stopped.",
    "pipeline": "The pipeline on the toy against float32 on the CPU: differences of pixels and of maps in [0, 1], "
    "largest and mean. `halves` compares `compare` with two separate calls of the same kind.",
    "models": "Base models in the configuration of the published ones, with random weights.",
    "memory": "A whole small training with each preset of the README, on so much memory as its card has, less 1 GB "
    "for CUDA's context.",
    "steps": "A step of 8 rows with gradient; medians. `host ms` is the time until Python has told the GPU all it is "
    "to do. Where the GPU is slower, the queue between them fills up and the host waits, so its own pace is what the "
    "tiny rows show (portraits of 64x64).",
}
# Sections that share a process, for importing the libraries takes seconds; the processes of the first phase run side
# by side, for they time nothing, and that of the second alone.
PHASES = ((("training", "resume"), ("pipeline",), ("models",)), (("memory", "steps"),))


@dataclass
class Result:
    """What a row has found: cells by column, what is wrong, and what it would have needed to be measured."""

    cells: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    missing: str = ""
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        if self.faults:
            return f"{FAILED}: {'; '.join(self.faults)}"
        return f"{NOT_HERE}: {self.missing}" if self.missing else OK


@dataclass
class Bench:
    """What rows share."""

    device: str
    folder: Path  # for models and runs; other processes have the same one
    steps: int  # of each stage of a training, and timed ones
    # What a row leaves for the next ones of its process.
    kept: dict[Any, Any] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------------------- the processes


def work(rows: Sequence[Row], bench: Bench, results: Connection, log: Path) -> None:
    """In a process of its own: send None once the first row can begin, then the result of each row.

    A row that raises ends the process; whoever started it goes on with the next row.
    """
    with log.open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    functions = [pkgutil.resolve_name(row.function) for row in rows]
    if bench.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise SystemExit("torch sees no CUDA card; --device cpu runs what a CPU can")
    results.send(None)
    for row, function in zip(rows, functions, strict=True):
        # Where it hangs, in the log, before it is killed.
        faulthandler.dump_traceback_later(0.9 * row.limit * PATIENCE[bench.device])
        start = time.perf_counter()
        result = function(bench, *row.arguments)
        result.seconds = time.perf_counter() - start
        results.send(result)
    faulthandler.cancel_dump_traceback_later()


def run_rows(rows: Sequence[Row], bench: Bench, deadline: float, log: Path) -> dict[str, Result]:
    """The results of rows that share a process; one that ends it is followed by a new process for the others.

    At the deadline, in seconds since the epoch, no row runs any more.
    """
    results = {row.name: Result(missing=f"{row.device} only") for row in rows}

    def keep(row: Row, result: Result) -> None:
        results[row.name] = result
        cells = "".join(f", {column} {value}" for column, value in result.cells.items())
        print(f"{row.name}: {result.verdict} ({result.seconds:.1f} s{cells})", file=sys.stderr, flush=True)

    left, context = [row for row in rows if row.device in ("", bench.device)], multiprocessing.get_context("spawn")
    while left and time.time() < deadline:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(left, bench, sender, log))
        process.start()
        sender.close()  # the process alone holds it, so that its end is noticed
        started, last, reason = False, left[0], ""
        try:
            while left:
                limit = left[0].limit * PATIENCE[bench.device] if started else START
                if not receiver.poll(max(0, min(limit, deadline - time.time()))):
                    reason = "it took longer than it may"
                    break
                result = receiver.recv()
                if started:
                    last = left.pop(0)
                    keep(last, result)
                started = True
        except EOFError:
            pass  # why it ended, its status and its log tell
        process.join(0 if reason else END)
        if process.exitcode is None:
            process.kill()
            process.join()
            reason = reason or "it did not end"
        if reason or left or process.exitcode != 0:
            said = last_words(log)
            reason = reason or f"status {process.exitcode}: {said}"[:300]
            # A process that never came to a row would come to none the next time.
            ended, left = (left[:1], left[1:]) if started else (left, [])
            for row in ended:
                keep(row, Result(faults=[reason]))
            if not ended:
                keep(last, replace(results[last.name], faults=[f"all was done, then {reason}"]))
    return results | {row.name: Result(faults=["no time was left for it"]) for row in left}


def last_words(log: Path) -> str:
    """The last line that a process wrote; more of them are printed."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    print("\n".join(lines[-40:]), file=sys.stderr, flush=True)
    last = next((line for line in reversed(lines) if line.strip()), "it said nothing")
    return " ".join(last.split()).replace("|", "/")


def run_side_by_side(
    processes: Sequence[Sequence[str]], rows: Sequence[Row], bench: Bench, deadline: float
) -> dict[str, Result]:
    """The results of the rows of some sections; a CPU has no room for more than one process."""
    groups = [[row for row in rows if row.section in sections] for sections in processes]
    with ThreadPoolExecutor(1 if bench.device == "cpu" else len(groups)) as pool:
        logs = [bench.folder / f"{sections[0]}.log" for sections in processes]
        found = pool.map(lambda group, log: run_rows(group, bench, deadline, log), groups, logs)
        return {name: result for results in found for name, result in results.items()}


# -------------------------------------------------------------------------------------------------------------- report


def describe_machine(device: str) -> list[str]:
    """The card and its driver, and the versions of what runs on it."""
    card = f"CPU, {os.cpu_count()} cores"
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        card = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
        card = "{}, driver {}, {}".format(*map(str.strip, card.split(",")))
    versions = [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        found = list(importlib.metadata.distributions(name=name))
        versions.append(f"{name} {found[0].version}" if found else f"no {name}")
    return [card, ", ".join(versions)]


def section_table(results: dict[str, Result]) -> str:
    """A markdown table with all columns that any of its rows has."""
    from benchmarks.parts.tables import markdown_table

    columns = list(dict.fromkeys(name for result in results.values() for name in result.cells))
    lines = []
    for name, own in results.items():
        cells = [own.cells.get(column, "-") for column in columns]
        lines.append([", ".join(name.split("/")[1:]), *cells, f"{own.seconds:.1f}", own.verdict])
    return markdown_table(["row", *columns, "s", "verdict"], lines)


def report(results: dict[str, Result], device: str, command: str, seconds: float) -> str:
    """All of it as markdown."""
    failed = [name for name, result in results.items() if result.faults]
    summary = f"{len(results)} rows in {seconds:.0f} s, {len(failed)} failed" + "".join(f"\n- {n}" for n in failed)
    parts = ["# On a GPU", *describe_machine(device), f"`{command}`", summary]
    for section, text in SECTIONS.items():
        rows = {name: result for name, result in results.items() if name.split("/")[0] == section}
        if rows:
            parts += [f"## {section}", text, section_table(rows).rstrip()]
    return "\n\n".join(parts) + "\n"


def chosen_rows(names: Sequence[str] | None) -> list[Row]:
    """The rows whose names begin with one of these, part by part. Raises ValueError for a name that begins none's."""
    if names is None:
        return list(ROWS)
    for name in names:
        if not any(f"{row.name}/".startswith(f"{name}/") for row in ROWS):
            raise ValueError(f"--rows {name}: no row's name begins so; {', '.join(SECTIONS)} are the sections")
    return [row for row in ROWS if f"{row.name}/".startswith(tuple(f"{name}/" for name in names))]


def parse_args(input_args: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="Beginnings of names, as in training/paper; all.")
    parser.add_argument("--steps", type=int, default=6, help="Of each stage, and timed ones.")
    parser.add_argument("--minutes", type=float, help="After them no row runs any more; 7.5, and 75 on a CPU.")
    parser.add_argument("--output", type=Path, help="Write the tables to this file, too.")
    options = parser.parse_args(input_args)
    if options.steps < 2:
        parser.error(f"--steps must be at least 2, got {options.steps}")
    if options.device == "cuda" and shutil.which("nvidia-smi") is None:
        parser.error("--device cuda: nvidia-smi is not there, so no CUDA card is; --device cpu runs what a CPU can")
    if options.minutes is None:
        options.minutes = 7.5 * PATIENCE[options.device]
    try:
        options.rows = chosen_rows(options.rows)
    except ValueError as error:
        parser.error(str(error))
    return options


def main(input_args: Sequence[str] | None = None) -> int:
    """The exit status: 1 if a row failed."""
    options = parse_args(input_args)
    os.environ |= ENVIRONMENT
    if options.device == "cpu":
        os.environ |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    command = shlex.join(["python", "benchmarks/gpu.py", *(sys.argv[1:] if input_args is None else input_args)])
    results, start = {}, time.time()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options.device, Path(folder), options.steps)
        for processes in PHASES:
            results |= run_side_by_side(processes, options.rows, bench, start + 60 * options.minutes)
            text = report(results, options.device, command, time.time() - start)
            if options.output is not None:
                options.output.write_text(text, encoding="utf-8")
    print(text)
    return int(any(result.faults for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
