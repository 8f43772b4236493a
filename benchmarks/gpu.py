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
import json
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
from dataclasses import asdict, dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

PRECISIONS = ("float32", "tf32", "bf16", "fp16")
HALVES = ("bf16", "fp16")
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "xformers", "bitsandbytes")
START = 90  # seconds that a process may take until its first row
PATIENCE = {"cuda": 1, "cpu": 10}  # a CPU may take so many times as long
# Of the children: no network, and matrix products that sum in one order, so that two runs can be compared.
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
    Row("training/composed/8-bit AdamW", own("eight_bits")),
    Row("training/composed/xformers", own("xformers"), device="cuda"),
    *(Row(f"resume/{precision}", own("resume"), (precision,), limit=90) for precision in HALVES),
    *(Row(f"pipeline/{precision}", own("pipeline"), (precision,)) for precision in ("float32", *HALVES)),
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
    "training": "Training on the toy. `norm` and `cosine` are of stage 2's update of the LoRA, against float32's.",
    "resume": "Runs of both objectives that stop and go on; the largest difference of the LoRA's numbers, and of two "
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

    @property
    def verdict(self) -> str:
        if self.faults:
            return f"{FAILED}: {'; '.join(self.faults)}"
        return f"{NOT_HERE}: {self.missing}" if self.missing else OK


@dataclass(frozen=True)
class Outcome:
    """A row's line in the table."""

    name: str
    verdict: str
    cells: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        return self.verdict.startswith(FAILED)


@dataclass
class Bench:
    """What rows share."""

    device: str
    folder: Path  # for models and runs; other processes have the same one
    steps: int  # of each stage of a training, and timed ones
    # What a row leaves for the next ones of its process.
    kept: dict[str, Any] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------------------ in the process


def work(task: dict[str, Any]) -> None:
    """Run the rows of a task, and write the outcome of each as soon as it is there.

    A row that raises or takes too long ends the process; whoever started it goes on with the next row.
    """
    faulthandler.dump_traceback_later(START, exit=True)
    folder, rows = Path(task["folder"]), [Row(**{**row, "arguments": tuple(row["arguments"])}) for row in task["rows"]]
    bench = Bench(task["device"], folder.parent, task["steps"])
    functions = [pkgutil.resolve_name(row.function) for row in rows]
    if bench.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise SystemExit("torch sees no CUDA card; --device cpu runs what a CPU can")
    (folder / "started").touch()
    for row, function in zip(rows, functions, strict=True):
        limit = min(row.limit * PATIENCE[bench.device], task["deadline"] - time.time())
        if limit <= 0:
            return
        faulthandler.dump_traceback_later(limit, exit=True)
        start = time.perf_counter()
        result = function(bench, *row.arguments)
        outcome = Outcome(row.name, result.verdict, result.cells, time.perf_counter() - start)
        outcome_file(folder, row).write_text(json.dumps(asdict(outcome)), encoding="utf-8")
        print(describe(outcome), flush=True)
    faulthandler.cancel_dump_traceback_later()


def outcome_file(folder: Path, row: Row) -> Path:
    return folder / f"{row.name.replace('/', '-')}.json"


def describe(outcome: Outcome) -> str:
    cells = "".join(f", {name} {value}" for name, value in outcome.cells.items())
    return f"{outcome.name}: {outcome.verdict} ({outcome.seconds:.1f} s{cells})"


# ----------------------------------------------------------------------------------------------------------- around it


def run_rows(rows: Sequence[Row], device: str, steps: int, deadline: float, folder: Path) -> list[Outcome]:
    """The outcomes of rows that share a process; one that ends it is followed by a new process for the others.

    At the deadline, in seconds since the epoch, no row runs any more. What rows write lies in the folder's parent.
    """
    folder.mkdir()
    outcomes = [Outcome(row.name, f"{NOT_HERE}: {row.device} only") for row in rows if row.device not in ("", device)]
    left = [row for row in rows if row.device in ("", device)]
    while left and time.time() < deadline:
        task = {"rows": list(map(asdict, left)), "device": device, "steps": steps, "deadline": deadline}
        code, reason, started = run_process({**task, "folder": str(folder)}, folder)
        done = list(takewhile(lambda row: outcome_file(folder, row).is_file(), left))
        outcomes += [Outcome(**json.loads(outcome_file(folder, row).read_text(encoding="utf-8"))) for row in done]
        left = left[len(done) :]
        # A process that never came to a row would come to none the next time.
        ended = left[:1] if started else left
        outcomes += [Outcome(row.name, f"{FAILED}: {reason}") for row in ended]
        left = left[len(ended) :]
        if code != 0 and not ended:
            outcomes[-1] = replace(outcomes[-1], verdict=f"{FAILED}: all was done, then {reason}")
    outcomes += [Outcome(row.name, f"{FAILED}: no time was left for it") for row in left]
    order = [row.name for row in rows]
    return sorted(outcomes, key=lambda outcome: order.index(outcome.name))


def run_side_by_side(
    processes: Sequence[Sequence[str]], options: argparse.Namespace, deadline: float, folder: Path
) -> list[Outcome]:
    """The outcomes of the chosen rows of some sections; a CPU has no room for more than one process."""
    groups = [[row for row in options.rows if row.section in sections] for sections in processes]
    with ThreadPoolExecutor(1 if options.device == "cpu" else len(groups)) as pool:
        futures = [
            pool.submit(run_rows, rows, options.device, options.steps, deadline, folder / f"process-{rows[0].section}")
            for rows in groups
            if rows
        ]
        return [outcome for future in futures for outcome in future.result()]


def run_process(task: dict[str, Any], folder: Path) -> tuple[int, str, bool]:
    """Run a task in a process of its own: its exit status, why it ended, and whether it had come to its first row."""
    file, log = folder / "task.json", folder / "log.txt"
    file.write_text(json.dumps(task), encoding="utf-8")
    (folder / "started").unlink(missing_ok=True)
    environment = {**os.environ, **ENVIRONMENT}
    if task["device"] == "cpu":
        environment |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(Path(__file__).resolve()), "--task", str(file)]
    with log.open("w", encoding="utf-8") as errors:
        # What it says of its rows belongs to this process's progress, and the table alone to its output.
        code = subprocess.run(command, stdout=2, stderr=errors, env=environment).returncode
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    if code != 0:
        print("\n".join(lines[-40:]), file=sys.stderr, flush=True)
    return code, reason_of(lines, code), (folder / "started").exists()


def reason_of(lines: Sequence[str], code: int) -> str:
    """Why a process ended, from what it wrote."""
    if any(line.startswith("Timeout (") for line in lines):
        return "it took longer than it may"
    last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
    return f"status {code}: {' '.join(last.split())}"[:300].replace("|", "/")


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


def section_table(outcomes: Sequence[Outcome]) -> str:
    """A markdown table with all columns that any of its rows has."""
    columns = list(dict.fromkeys(name for outcome in outcomes for name in outcome.cells))
    lines = [["row", *columns, "s", "verdict"], ["---"] * (len(columns) + 3)]
    for own in outcomes:
        cells = [own.cells.get(name, "-") for name in columns]
        lines.append([", ".join(own.name.split("/")[1:]), *cells, f"{own.seconds:.1f}", own.verdict])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def report(outcomes: Sequence[Outcome], device: str, command: str, seconds: float) -> str:
    """All of it as markdown."""
    failed = [outcome.name for outcome in outcomes if outcome.failed]
    summary = f"{len(outcomes)} rows in {seconds:.0f} s, {len(failed)} failed" + "".join(f"\n- {n}" for n in failed)
    parts = ["# On a GPU", *describe_machine(device), f"`{command}`", summary]
    for section, text in SECTIONS.items():
        rows = [outcome for outcome in outcomes if outcome.name.split("/")[0] == section]
        if rows:
            parts += [f"## {section}", text, section_table(rows).rstrip()]
    return "\n\n".join(parts) + "\n"


def chosen_rows(names: Sequence[str] | None) -> list[Row]:
    """The rows whose names begin with one of these, part by part. Raises ValueError for a name that begins none's."""
    if names is None:
        return list(ROWS)
    own = {name: [row for row in ROWS if f"{row.name}/".startswith(f"{name}/")] for name in names}
    for name, rows in own.items():
        if not rows:
            raise ValueError(f"--rows {name}: no row's name begins so; {', '.join(SECTIONS)} are the sections")
    return [row for row in ROWS if any(row in rows for rows in own.values())]


def parse_args(input_args: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="Beginnings of names, as in training/paper; all.")
    parser.add_argument("--steps", type=int, default=6, help="Of each stage, and timed ones.")
    parser.add_argument("--minutes", type=float, help="After them no row runs any more; 7.5, and 75 on a CPU.")
    parser.add_argument("--output", type=Path, help="Write the tables to this file, too.")
    parser.add_argument("--task", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(input_args)
    if options.steps < 2:
        parser.error(f"--steps must be at least 2, got {options.steps}")
    if options.device == "cuda" and options.task is None and shutil.which("nvidia-smi") is None:
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
    if options.task is not None:
        work(json.loads(options.task.read_text(encoding="utf-8")))
        return 0
    command = shlex.join(["python", "benchmarks/gpu.py", *(sys.argv[1:] if input_args is None else input_args)])
    outcomes, start = [], time.time()
    with tempfile.TemporaryDirectory() as folder:
        for processes in PHASES:
            outcomes += run_side_by_side(processes, options, start + 60 * options.minutes, Path(folder))
            text = report(outcomes, options.device, command, time.time() - start)
            if options.output is not None:
                options.output.write_text(text, encoding="utf-8")
    print(text)
    return int(any(outcome.failed for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
