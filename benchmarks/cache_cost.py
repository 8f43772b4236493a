"""What the caches are worth: the time of a stage-2 step with and without each, alternating in one process.

`python benchmarks/cache_cost.py` measures on the toy base model. The losses of all runs are compared as well.
Source: [ours].
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.parts.tables import markdown_table
from benchmarks.parts.trainer import make_stage1, prepare, timed_step
from toy_portraits.recipe import training_flags
from toy_portraits.world import TARGETS


BOTH = "both cached"
CACHES = {
    BOTH: [],
    "latents in each step": ["--no-cache_latents"],
    "text embeddings in each step": ["--no-cache_text_embeddings"],
    "neither cached": ["--no-cache_latents", "--no-cache_text_embeddings"],
}


def main(input_args: Sequence[str] | None = None) -> None:
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
            found = {name: timed_step(run, step) for name, run in runs.items()}
            for name, (seconds, losses) in found.items():
                times[name].append(seconds)
                for loss, first in found[BOTH][1].items():
                    difference = abs(losses[loss] - first) / max(abs(first), 1e-8)
                    differences[name] = max(differences[name], difference)
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    print(f"objective {options.stage2_objective}, {options.steps} steps each, alternating")
    header = ["caches", "median step, ms", "of both cached", "largest relative difference of a loss"]
    lines = [
        [name, f"{1000 * median:.0f}", f"{median / medians[BOTH]:.2f}", f"{differences[name]:.1e}"]
        for name, median in medians.items()
    ]
    print(markdown_table(header, lines))


if __name__ == "__main__":
    main()
