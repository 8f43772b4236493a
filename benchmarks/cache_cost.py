"""What the caches are worth: the time of a stage-2 step with and without each, alternating in one process.

`python benchmarks/cache_cost.py` measures on the toy base model. The losses of all runs are compared as well.
Source: [ours].
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_spf_portrait_lora as trainer  # noqa: E402
from toy_portraits.recipe import training_flags  # noqa: E402
from toy_portraits.world import TARGETS  # noqa: E402
from training.arguments import flat, parse_args  # noqa: E402
from training.inputs import check_inputs  # noqa: E402


CACHES = {
    "both cached": [],
    "latents in each step": ["--no-cache_latents"],
    "text embeddings in each step": ["--no-cache_text_embeddings"],
    "neither cached": ["--no-cache_latents", "--no-cache_text_embeddings"],
}


def prepare(flags: list[str], steps: int, stage: int = 2) -> trainer.Run:
    """A run at the start of a stage of so many steps."""
    given = parse_args(flags)
    args = argparse.Namespace(**flat(given))
    accelerator = trainer.make_accelerator(args)
    run = trainer.prepare_run(args, check_inputs(given), accelerator)
    run.response_unet = accelerator.prepare(run.unet)
    if stage == 2:
        trainer.start_stage2(run)
    trainer.prepare_optimizer(run, trained_parameters(run), steps, "constant")
    trainer.start_reading(run, steps)
    return run


def trained_parameters(run: trainer.Run) -> list[torch.nn.Parameter]:
    return [parameter for parameter in run.unet.parameters() if parameter.requires_grad]


def timed_step(run: trainer.Run, step: int, stage: int = 2) -> tuple[float, dict[str, float]]:
    """Seconds and losses of a step, by `now`."""
    parameters = trained_parameters(run)
    start = now()
    losses = trainer.train_step(run, stage, step, run.optimizer, parameters)
    return now() - start, losses


def now() -> float:
    """Seconds: the wall clock's, once a GPU has done all that it was given; without one, of this process's CPU time.

    The latter does not count what other programs on the machine take.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def main(input_args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=list(TARGETS), default="blonde_hair")
    parser.add_argument("--stage2_objective", choices=("composed", "paper", "both"), default="both")
    parser.add_argument("--steps", type=int, default=30, help="Timed steps of each run, after one that is not.")
    options = parser.parse_args(input_args)

    with tempfile.TemporaryDirectory() as output_dir:
        flags = training_flags(options.target) + ["--output_dir", output_dir, "--report_to", "none"]
        flags += ["--stage1_steps", "0", "--stage2_steps", str(options.steps + 1), "--num_validation_images", "0"]
        flags += ["--stage2_objective", options.stage2_objective, "--num_alignment_images", "8"]
        flags += ["--alignment_inference_steps", "4", "--composed_init", "stage1"]
        flags += ["--stage1_lora_path", str(make_stage1(options.target, Path(output_dir) / "earlier"))]
        runs = {name: prepare(flags + extra, options.steps + 1) for name, extra in CACHES.items()}
        times: dict[str, list[float]] = {name: [] for name in runs}
        differences = dict.fromkeys(runs, 0.0)
        for step in range(options.steps + 1):
            losses = {}
            for name, run in runs.items():
                seconds, losses[name] = timed_step(run, step)
                times[name].append(seconds)
            for name, values in losses.items():
                for loss, value in values.items():
                    first = losses["both cached"][loss]
                    differences[name] = max(differences[name], abs(value - first) / max(abs(first), 1e-8))
    base = statistics.median(times["both cached"][1:])
    print(f"objective {options.stage2_objective}, {options.steps} steps each, alternating")
    print("| caches | median step, ms | of both cached | largest relative difference of a loss |")
    print("| --- | --- | --- | --- |")
    for name, values in times.items():
        median = statistics.median(values[1:])
        print(f"| {name} | {1000 * median:.0f} | {median / base:.2f} | {differences[name]:.1e} |")


def make_stage1(target: str, output_dir: Path) -> Path:
    """A LoRA of four steps, since composed alignment needs a teacher."""
    flags = training_flags(target) + ["--output_dir", str(output_dir), "--report_to", "none"]
    trainer.main(flags + ["--stage1_steps", "4", "--stage2_steps", "0", "--num_validation_images", "0"])
    return output_dir


if __name__ == "__main__":
    main()
