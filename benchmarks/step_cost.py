"""What a step of stage 2 costs against a plain LoRA step of the same trainer, at as many rows with gradient.

`python benchmarks/step_cost.py` measures the toy base model, rows alternating in one process, and counts memory at
Stable Diffusion 1.5's shapes; `--stable_diffusion FOLDER` times that configuration instead, with the random weights of
`benchmarks/random_stable_diffusion.py`. On a machine with a GPU both run there.

A step of composed alignment is of two kinds: one makes the targets of its batch, the other finds them made. Both are
timed, and what a step costs on average follows for each `--composed_target_reuse`; the flag's default is also measured
over whole cycles.

Source: [ours].
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train_spf_portrait_lora as trainer  # noqa: E402
from benchmarks.cache_cost import make_stage1, now, prepare, timed_step, trained_parameters  # noqa: E402
from benchmarks.estimate_memory import (  # noqa: E402
    LiveBytes,
    alignment_backward,
    composed_backward,
    diffusion_backward,
    make_models,
    steps_peak,
    without_content,
)
from toy_portraits.recipe import FLAGS, training_flags  # noqa: E402
from training.arguments import uses_enhancement  # noqa: E402


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


FINDS = {"composed_target_reuse": 2}
ROWS = {
    PLAIN: Row(stage=1),
    MADE: Row(changes={"composed_target_reuse": 1}),
    FOUND: Row(changes=FINDS),
    "composed, targets made, teacher_base_weight 0": Row(
        changes={"composed_target_reuse": 1, "teacher_base_weight": 0.0}
    ),
    "composed, targets made, single_pass": Row(changes={"composed_target_reuse": 1, "dual_path": "single_pass"}),
    "paper": Row(PAPER),
    "paper, single_pass": Row(PAPER, {"dual_path": "single_pass"}),
    "paper, without enhancement": Row(PAPER, {"enhancement_loss": "none"}),
    "plain LoRA, checkpointing": Row(CHECKPOINTING, stage=1, of="plain LoRA, checkpointing"),
    "composed, targets made, checkpointing": Row(
        CHECKPOINTING, {"composed_target_reuse": 1}, of="plain LoRA, checkpointing"
    ),
    "composed, targets found, checkpointing": Row(CHECKPOINTING, FINDS, of="plain LoRA, checkpointing"),
    "paper, checkpointing": Row(f"{PAPER} {CHECKPOINTING}", of="plain LoRA, checkpointing"),
    "plain LoRA, nothing cached": Row(UNCACHED, stage=1, of="plain LoRA, nothing cached"),
    "composed, targets made, nothing cached": Row(
        UNCACHED, {"composed_target_reuse": 1}, of="plain LoRA, nothing cached"
    ),
    "composed, targets found, nothing cached": Row(UNCACHED, FINDS, of="plain LoRA, nothing cached"),
}


# ------------------------------------------------------------------------------------------------------------- running


def make_runs(names: Sequence[str], flags: Sequence[str], steps: int) -> dict[str, trainer.Run]:
    """A run for each row; those with the same flags share models, LoRA and optimizer."""
    prepared: dict[str, trainer.Run] = {}
    runs = {}
    for name in names:
        row = ROWS[name]
        if row.flags not in prepared:
            prepared[row.flags] = prepare([*flags, *shlex.split(row.flags)], steps)
        run = prepared[row.flags]
        runs[name] = replace(run, args=argparse.Namespace(**{**vars(run.args), **row.changes}), targets={})
    return runs


def make_toy_runs(names: Sequence[str], target: str, steps: int, output_dir: Path) -> dict[str, trainer.Run]:
    """Runs of the toy base model, all from one LoRA of stage 1."""
    flags = [*training_flags(target), "--report_to", "none", "--num_validation_images", "0"]
    flags += ["--num_alignment_images", str(BATCH), "--alignment_inference_steps", "2", "--sfcm_noise_samples", "1"]
    earlier = make_stage1(target, output_dir / "earlier")
    flags += ["--stage1_steps", "0", "--stage1_lora_path", str(earlier), "--stage2_steps", str(steps)]
    return make_runs(names, [*flags, "--output_dir", str(output_dir / "run")], steps)


def make_big_runs(model: Path, target: str, side: int, batch: int, steps: int, output_dir: Path) -> dict[str, Any]:
    """Runs of Stable Diffusion 1.5's configuration: all rows that share one."""
    flags = ["--pretrained_model_name_or_path", str(model), "--clip_model_name_or_path", str(model / "clip")]
    flags += ["--train_data_dir", str(ROOT / "toy_portraits" / target), "--max_train_samples", str(batch)]
    flags += ["--resolution", str(side), "--train_batch_size", str(batch), "--report_to", "none"]
    flags += ["--num_validation_images", "0", "--num_alignment_images", "1", "--alignment_inference_steps", "1"]
    flags += ["--sfcm_noise_samples", "1", "--output_dir", str(output_dir)]
    names = [name for name, row in ROWS.items() if not row.flags]
    return make_runs(names, [*flags, "--stage1_steps", "1", "--stage2_steps", str(steps)], steps)


def make_targets(run: trainer.Run, step: int) -> None:
    """Make and keep the composed targets of a step without accumulation."""
    with torch.no_grad(), trainer.composed_terms(run, step):
        pass


def alternate(runs: dict[str, trainer.Run], steps: int) -> dict[str, list[float]]:
    """Seconds of `steps` steps of each run, one of each in turn, after one that is not timed."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(steps + 1):
        for name, run in runs.items():
            step = run.args.stage1_steps + i
            if ROWS[name].found:
                make_targets(run, step)
            seconds, _ = timed_step(run, step, ROWS[name].stage)
            if i > 0:
                times[name].append(seconds)
    return times


def alternate_cycle(run: trainer.Run) -> tuple[float, float]:
    """Mean seconds of a plain and of a composed step over a whole cycle of the run's targets, one of each in turn."""
    times: dict[int, list[float]] = {1: [], 2: []}
    run.targets = {}
    for step in range(trainer.KEPT_TARGETS * run.args.composed_target_reuse):
        for stage, values in times.items():
            values.append(timed_step(run, step, stage)[0])
    return statistics.mean(times[1]), statistics.mean(times[2])


# -------------------------------------------------------------------------------------------------------------- shares


@contextmanager
def timing(owner: Any, name: str, clock: dict[str, list[float]], label: str) -> Iterator[None]:
    """Inside, each call of `owner.name` adds its seconds to the clock."""
    function = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = now()
        try:
            return function(*args, **kwargs)
        finally:
            clock.setdefault(label, []).append(now() - start)

    with patch.object(owner, name, timed):
        yield


def shares(run: trainer.Run, row: Row, steps: int) -> dict[str, float]:
    """What parts of a step take, as shares of its time; a GPU is waited for after each."""
    owners = [
        (trainer, "draw_batch", "drawing the batch"),
        (trainer, "composed_predictions", "reference and teacher"),
        (run.unet, "forward", "UNet, all forwards"),
        (trainer, "text_consistent_loss", "text-consistent loss, forward"),
        (trainer, "fine_grained_loss", "fine-grained loss, forward"),
        (trainer, "enhancement_loss", "enhancement loss, forward"),
        (run.accelerator, "backward", "backward"),
        (run.accelerator, "clip_grad_norm_", "norm of the gradient"),
        (run.optimizer, "step", "optimizer"),
    ]
    found: dict[str, list[float]] = {}
    for step in range(1, steps + 1):
        if row.found:
            make_targets(run, step)
        clock: dict[str, list[float]] = {}
        with ExitStack() as stack:
            for owner, name, label in owners:
                stack.enter_context(timing(owner, name, clock, label))
            seconds, _ = timed_step(run, step, row.stage)
        for label, values in clock.items():
            found.setdefault(label, []).append(sum(values) / seconds)
    return {label: statistics.median(values) for label, values in found.items()}


# -------------------------------------------------------------------------------------------------------------- memory


def peak_bytes(run: trainer.Run, row: Row, step: int) -> int:
    """Most bytes alive at once in a step, with the UNet, what the row's losses need besides, and the kept targets."""
    if row.found:
        make_targets(run, step)
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        timed_step(run, step, row.stage)
        return torch.cuda.max_memory_allocated()
    counter = LiveBytes()
    enhances = row.stage == 2 and uses_enhancement(run.args, run.args)
    modules = [run.unet, run.decoder, run.clip] if enhances else [run.unet]
    state = [value for values in run.optimizer.state.values() for value in values.values()]
    held = [*state, *run.targets.values(), *(p for module in modules for p in module.parameters())]
    for tensor in held:
        counter.count(tensor)
    with counter:
        trainer.train_step(run, row.stage, step, run.optimizer, trained_parameters(run))
    return counter.peak


def count_stable_diffusion(batch: int) -> dict[str, tuple[int, int]]:
    """Peak bytes of steps at Stable Diffusion 1.5's shapes, 512x512 in bfloat16, without and with checkpointing."""
    plain = partial(diffusion_backward, enhance=False)
    steps: dict[str, tuple[str, list[Callable]]] = {
        PLAIN: (f"--stage2_objective paper --train_batch_size {batch} --enhancement_loss none", [plain]),
        MADE: (f"--train_batch_size {batch}", [composed_backward]),
        FOUND: (f"--train_batch_size {batch}", [plain]),
        "paper": (
            f"--stage2_objective paper --train_batch_size {batch // 2}",
            [alignment_backward, partial(diffusion_backward, enhance=True)],
        ),
        "paper, without enhancement": (
            f"--stage2_objective paper --train_batch_size {batch // 2} --enhancement_loss none",
            [alignment_backward, plain],
        ),
    }
    peaks = {}
    for name, (flags, terms) in steps.items():
        both = []
        for checkpointing in ("", " --gradient_checkpointing"):
            models = make_models(flags + checkpointing)
            with without_content(models.unet, models.vae, models.clip):
                both.append(steps_peak(models, terms=terms))
        peaks[name] = tuple(both)
    return peaks


# -------------------------------------------------------------------------------------------------------------- report


def print_table(times: dict[str, list[float]], peaks: dict[str, int]) -> None:
    """A row for each kind of step, beside the plain one it is compared with."""
    print("| step | median, ms | quartiles, ms | of plain | peak memory of plain |")
    print("| --- | --- | --- | --- | --- |")
    for name, values in times.items():
        of = ROWS[name].of
        median, low, high = statistics.median(values), *quartiles(values)
        ratio = median / statistics.median(times[of]) if of in times else float("nan")
        memory = f"{peaks[name] / peaks[of]:.2f}" if name in peaks and of in peaks else "-"
        cells = f"{1000 * median:.0f} | {1000 * low:.0f} to {1000 * high:.0f} | {ratio:.2f} | {memory}"
        print(f"| {name} | {cells} |", flush=True)


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The first and the third; a single value is both."""
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def print_reuses(times: dict[str, list[float]]) -> None:
    """What a composed step costs on average, by how often each target is learned from."""
    plain, made, found = (statistics.median(times[name]) for name in (PLAIN, MADE, FOUND))
    print("\n| `--composed_target_reuse` | step on average, of plain |\n| --- | --- |")
    for reuse in REUSES:
        print(f"| {reuse} | {(made + (reuse - 1) * found) / reuse / plain:.2f} |")


def print_shares(runs: dict[str, trainer.Run], names: Sequence[str], steps: int) -> None:
    for name in names:
        parts = shares(runs[name], ROWS[name], steps)
        print(f"\n{name}: " + ", ".join(f"{label} {share:.1%}" for label, share in parts.items()), flush=True)


def describe_machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU time of {torch.get_num_threads()} thread(s)"


def measure_toy(options: argparse.Namespace) -> None:
    names = [name for name in ROWS if name in options.rows]
    names = [name for name in ROWS if name in {*names, *(ROWS[own].of for own in names)}]
    with tempfile.TemporaryDirectory() as folder:
        runs = make_toy_runs(names, options.target, options.steps + 2, Path(folder))
        times = alternate(runs, options.steps)
        peaks = {name: peak_bytes(run, ROWS[name], options.steps + 1) for name, run in runs.items()}
        measured = f"{BATCH} rows with gradient, {options.steps} steps of each row, {describe_machine()}"
        print(f"\nToy base model, {measured}\n")
        print_table(times, peaks)
        if {PLAIN, MADE, FOUND} <= set(names):
            print_reuses(times)
        print_shares(runs, [name for name in (PLAIN, MADE, FOUND, "paper") if name in names], options.share_steps)
        if options.cycles and PLAIN in names:
            plain, composed = alternate_cycle(runs[PLAIN])
            reuse = runs[PLAIN].args.composed_target_reuse
            print(f"\nMeasured over a cycle with the default, {reuse}: {composed / plain:.2f} of plain")


def measure_stable_diffusion(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        runs = make_big_runs(
            options.stable_diffusion, options.target, options.side, options.batch, options.steps + 1, Path(folder)
        )
        times = alternate(runs, options.steps)
    size = f"{options.batch} rows of {options.side}x{options.side}"
    print(f"\nStable Diffusion 1.5's configuration, {size}, {options.steps} steps of each row, {describe_machine()}\n")
    print_table(times, {})
    print_reuses(times)


def print_counted(batch: int) -> None:
    peaks = count_stable_diffusion(batch)
    print(f"\nStable Diffusion 1.5's shapes, {batch} rows of 512x512 with gradient, bfloat16, counted\n")
    print("| step | GiB | of plain | checkpointing, GiB | of plain |\n| --- | --- | --- | --- | --- |")
    for name, both in peaks.items():
        cells = (f"{peak / 2**30:.2f} | {peak / plain:.2f}" for peak, plain in zip(both, peaks[PLAIN], strict=True))
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main(input_args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=("blonde_hair", "red_hat", "striped_shirt"), default="blonde_hair")
    parser.add_argument("--steps", type=int, default=20, help="Timed steps of each row, after one that is not.")
    parser.add_argument("--share_steps", type=int, default=5, help="Steps that the shares are medians of.")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help="All, or some.")
    parser.add_argument("--cycles", action=argparse.BooleanOptionalAction, default=True, help="Measure a cycle, too.")
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
