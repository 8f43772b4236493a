"""What a step of stage 2 costs against a plain LoRA step of the same trainer, at as many rows with gradient.

`python benchmarks/step_cost.py` measures the toy base model, rows alternating in one process, and counts memory at
Stable Diffusion 1.5's shapes; `--stable_diffusion FOLDER` times that configuration instead, with the random weights of
`benchmarks/random_stable_diffusion.py`. On a machine with a GPU both run there.

A step of composed alignment is of two kinds: one makes the targets of its batch, the other finds them made. Both are
timed, and what a step costs on average follows for each `--composed_target_reuse`.

Source: [ours].
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.estimate_memory import (
    GIB,
    LiveBytes,
    alignment_backward,
    composed_backward,
    diffusion_backward,
    make_models,
    steps_peak,
    without_content,
)
from benchmarks.parts import trainer
from benchmarks.parts.tables import markdown_table
from benchmarks.parts.trainer import Run
from toy_portraits.recipe import FLAGS, HERE, training_flags
from toy_portraits.world import TARGETS


PLAIN, MADE, FOUND = "plain LoRA", "composed, targets made", "composed, targets found"
REUSES = (1, 2, 3, 4)
BATCH = int(FLAGS[FLAGS.index("--train_batch_size") + 1])
# What needs a run of its own. The paper's objective has a row with gradient of each of two kinds for every row of a
# batch, so it has half of the batch.
PAPER = f"--stage2_objective paper --train_batch_size {BATCH // 2}"
UNCACHED, CHECKPOINTING = "--no-cache_latents --no-cache_text_embeddings", "--gradient_checkpointing"


@dataclass(frozen=True)
class Row:
    """One kind of step.

    Attributes:
        flags: of the run it is a step of; rows with the same flags share a run.
        changes: other values of flags that nothing but the step asks for.
        stage: of the step. A plain LoRA step is one of stage 1, here with stage 1's LoRA, switched off, beside it.
        of: the row that it is compared with.
    """

    flags: str = ""
    changes: dict[str, Any] = field(default_factory=dict)
    stage: int = 2
    of: str = PLAIN

    @property
    def found(self) -> bool:
        """Whether the composed targets are there before the step."""
        return self.changes.get("composed_target_reuse", 1) > 1


def kinds(name: str, flags: str) -> dict[str, Row]:
    """The plain and the composed steps of runs with these flags."""
    plain = f"{PLAIN}{name}"
    made, found = ({"composed_target_reuse": reuse} for reuse in (1, 2))
    rows = {PLAIN: Row(flags, stage=1, of=plain), MADE: Row(flags, made, of=plain), FOUND: Row(flags, found, of=plain)}
    return {kind + name: row for kind, row in rows.items()}


ROWS = {
    **kinds("", ""),
    f"{MADE}, teacher_base_weight 0": Row(changes={"composed_target_reuse": 1, "teacher_base_weight": 0.0}),
    f"{MADE}, single_pass": Row(changes={"composed_target_reuse": 1, "dual_path": "single_pass"}),
    "paper": Row(PAPER),
    "paper, single_pass": Row(PAPER, {"dual_path": "single_pass"}),
    "paper, without enhancement": Row(PAPER, {"enhancement_loss": "none"}),
    **kinds(", checkpointing", CHECKPOINTING),
    "paper, checkpointing": Row(f"{PAPER} {CHECKPOINTING}", of=f"{PLAIN}, checkpointing"),
    **kinds(", nothing cached", UNCACHED),
}


# ------------------------------------------------------------------------------------------------------------- running


def make_runs(names: Sequence[str], flags: Sequence[str], steps: int) -> dict[str, Run]:
    """A run for each row; those with the same flags share models, LoRA and optimizer."""
    prepared: dict[str, Run] = {}
    for row in (ROWS[name] for name in names):
        if row.flags not in prepared:
            prepared[row.flags] = trainer.prepare([*flags, *shlex.split(row.flags)], steps)
    return {name: trainer.with_flags(prepared[ROWS[name].flags], ROWS[name].changes) for name in names}


def make_toy_runs(target: str, steps: int, output_dir: Path) -> dict[str, Run]:
    """Runs of the toy base model, all from one LoRA of stage 1."""
    flags = [*training_flags(target), "--report_to", "none", "--num_validation_images", "0"]
    flags += ["--num_alignment_images", str(BATCH), "--alignment_inference_steps", "2", "--sfcm_noise_samples", "1"]
    earlier = trainer.make_stage1(target, output_dir / "earlier")
    flags += ["--stage1_steps", "0", "--stage1_lora_path", str(earlier), "--stage2_steps", str(steps)]
    return make_runs(list(ROWS), [*flags, "--output_dir", str(output_dir / "run")], steps)


def make_big_runs(options: argparse.Namespace, steps: int, output_dir: Path) -> dict[str, Run]:
    """Runs of Stable Diffusion 1.5's configuration: all rows that share one."""
    model, batch = options.stable_diffusion, str(options.batch)
    flags = ["--pretrained_model_name_or_path", str(model), "--clip_model_name_or_path", str(model / "clip")]
    flags += ["--train_data_dir", str(HERE / options.target), "--max_train_samples", batch]
    flags += ["--resolution", str(options.side), "--train_batch_size", batch, "--report_to", "none"]
    flags += ["--num_validation_images", "0", "--num_alignment_images", "1", "--alignment_inference_steps", "1"]
    flags += ["--sfcm_noise_samples", "1", "--output_dir", str(output_dir)]
    names = [name for name, row in ROWS.items() if not row.flags]
    return make_runs(names, [*flags, "--stage1_steps", "1", "--stage2_steps", str(steps)], steps)


def before_step(run: Run, row: Row, step: int) -> None:
    if row.found:
        trainer.make_targets(run, step)


def alternate(runs: dict[str, Run], steps: int) -> dict[str, list[float]]:
    """Seconds of `steps` steps of each run, one of each in turn, after one that is not timed."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(steps + 1):
        for name, run in runs.items():
            step = trainer.first_step(run) + i
            before_step(run, ROWS[name], step)
            times[name].append(trainer.timed_step(run, step, ROWS[name].stage)[0])
    return {name: values[1:] for name, values in times.items()}


def shares(run: Run, row: Row, steps: int) -> dict[str, float]:
    """What parts of a step take, as shares of its time; a GPU is waited for after each."""
    found: dict[str, list[float]] = {}
    for step in range(1, steps + 1):
        before_step(run, row, step)
        clock: dict[str, float] = {}
        with trainer.timing_parts(run, clock):
            seconds, _ = trainer.timed_step(run, step, row.stage)
        for label, value in clock.items():
            found.setdefault(label, []).append(value / seconds)
    return {label: statistics.median(values) for label, values in found.items()}


# -------------------------------------------------------------------------------------------------------------- memory


def peak_bytes(run: Run, row: Row, step: int) -> int:
    """Most bytes alive at once in a step, with the UNet, what the row's losses need besides, and the kept targets."""
    before_step(run, row, step)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        trainer.take_step(run, step, row.stage)
        return torch.cuda.max_memory_allocated()
    counter = LiveBytes()
    for tensor in trainer.held_tensors(run, row.stage):
        counter.count(tensor)
    with counter:
        trainer.take_step(run, step, row.stage)
    return counter.peak


def count_stable_diffusion(batch: int, names: Sequence[str] | None = None) -> dict[str, tuple[int, int]]:
    """Peak bytes of steps at Stable Diffusion 1.5's shapes, 512x512 in bfloat16, without and with checkpointing."""
    plain = partial(diffusion_backward, enhance=False)
    whole, half = f"--train_batch_size {batch}", f"--stage2_objective paper --train_batch_size {batch // 2}"
    steps: dict[str, tuple[str, list[Callable]]] = {
        PLAIN: (f"--stage2_objective paper --enhancement_loss none {whole}", [plain]),
        MADE: (whole, [composed_backward]),
        FOUND: (whole, [plain]),
        "paper": (half, [alignment_backward, partial(diffusion_backward, enhance=True)]),
        "paper, without enhancement": (f"{half} --enhancement_loss none", [alignment_backward, plain]),
    }
    peaks = {}
    for name in names or steps:
        (flags, terms), both = steps[name], []
        for checkpointing in ("", f" {CHECKPOINTING}"):
            models = make_models(flags + checkpointing)
            with without_content(models.unet, models.vae, models.clip):
                both.append(steps_peak(models, terms=terms))
        peaks[name] = tuple(both)
    return peaks


# -------------------------------------------------------------------------------------------------------------- report


def print_table(times: dict[str, list[float]], peaks: dict[str, int]) -> None:
    """A row for each kind of step, beside the plain one it is compared with."""
    lines = []
    for name, values in times.items():
        # A single value is both quartiles.
        low, median, high = statistics.quantiles(values * (1 + (len(values) == 1)), n=4, method="inclusive")
        of = ROWS[name].of
        ratio = f"{median / statistics.median(times[of]):.2f}"
        memory = f"{peaks[name] / peaks[of]:.2f}" if name in peaks else "-"
        lines.append([name, f"{1000 * median:.0f}", f"{1000 * low:.0f} to {1000 * high:.0f}", ratio, memory])
    print(markdown_table(["step", "median, ms", "quartiles, ms", "of plain", "peak memory of plain"], lines))


def print_reuses(times: dict[str, list[float]]) -> None:
    """What a composed step costs on average, by how often each target is learned from."""
    plain, made, found = (statistics.median(times[name]) for name in (PLAIN, MADE, FOUND))
    lines = [[str(reuse), f"{(made + (reuse - 1) * found) / reuse / plain:.2f}"] for reuse in REUSES]
    print(markdown_table(["`--composed_target_reuse`", "step on average, of plain"], lines))


def describe_machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU time of {torch.get_num_threads()} thread(s)"


def measure_toy(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        runs = make_toy_runs(options.target, options.steps + 2, Path(folder))
        times = alternate(runs, options.steps)
        peaks = {name: peak_bytes(run, ROWS[name], options.steps + 1) for name, run in runs.items()}
        measured = f"{BATCH} rows with gradient, {options.steps} steps of each row, {describe_machine()}"
        print(f"\nToy base model, {measured}\n")
        print_table(times, peaks)
        print_reuses(times)
        for name in (PLAIN, MADE, FOUND, "paper"):
            parts = shares(runs[name], ROWS[name], options.share_steps)
            print(f"\n{name}: " + ", ".join(f"{label} {share:.1%}" for label, share in parts.items()), flush=True)


def measure_stable_diffusion(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        times = alternate(make_big_runs(options, options.steps + 1, Path(folder)), options.steps)
    size = f"{options.batch} rows of {options.side}x{options.side}"
    print(f"\nStable Diffusion 1.5's configuration, {size}, {options.steps} steps of each row, {describe_machine()}\n")
    print_table(times, {})
    print_reuses(times)


def print_counted(batch: int) -> None:
    peaks = count_stable_diffusion(batch)
    print(f"\nStable Diffusion 1.5's shapes, {batch} rows of 512x512 with gradient, bfloat16, counted\n")
    lines = []
    for name, both in peaks.items():
        cells = [(f"{own / GIB:.2f}", f"{own / plain:.2f}") for own, plain in zip(both, peaks[PLAIN], strict=True)]
        lines.append([name, *cells[0], *cells[1]])
    print(markdown_table(["step", "GiB", "of plain", "checkpointing, GiB", "of plain"], lines))


def main(input_args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=TARGETS, default="blonde_hair")
    parser.add_argument("--steps", type=int, default=20, help="Timed steps of each row, after one that is not.")
    parser.add_argument("--share_steps", type=int, default=5, help="Steps that the shares are medians of.")
    parser.add_argument("--counted", action=argparse.BooleanOptionalAction, default=True, help="Count memory, too.")
    parser.add_argument("--stable_diffusion", type=Path, metavar="FOLDER", help="Time this model instead.")
    parser.add_argument("--side", type=int, default=256, help="Of its portraits, in pixels.")
    parser.add_argument("--batch", type=int, default=5, help="Its rows; of 5 exactly 2 ask for the target.")
    options = parser.parse_args(input_args)
    if min(options.steps, options.share_steps) < 1:
        parser.error("--steps and --share_steps must be at least 1")
    if options.stable_diffusion is not None:
        measure_stable_diffusion(options)
        return
    measure_toy(options)
    if options.counted:
        print_counted(4)


if __name__ == "__main__":
    main()
