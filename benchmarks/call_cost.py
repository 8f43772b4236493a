"""What the pipeline's extras cost: `python benchmarks/call_cost.py`, on the toy base model and a random LoRA.

The original model's portrait in the same batch (`compare`) against two calls, one with the LoRA and one without, with
the largest difference of their pictures; the map, and guidance with it, against a call of its own. All alternate in
one process.

Source: [ours].
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from adapters import active_adapters
from benchmarks.parts.drawing import load_pipeline
from benchmarks.parts.tables import markdown_table


PROMPT, TARGET = "a woman, a green jacket, a purple background", "blonde hair"
CALL = "a call"


def time_alternating(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The median of each call's times in seconds, after one round that is not timed."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def main(input_args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="Timed calls of each kind.")
    parser.add_argument("--num_images", type=int, default=4, help="Images a call.")
    parser.add_argument("--num_inference_steps", type=int, default=25)
    args = parser.parse_args(input_args)
    pipeline = load_pipeline("cpu")
    # Random weights, strong enough to be seen.
    torch.manual_seed(0)
    modules = ["to_q", "to_k", "to_v", "to_out.0"]
    pipeline.unet.add_adapter(LoraConfig(r=16, lora_alpha=4, target_modules=modules, init_lora_weights=False))

    def draw(**options: object) -> object:
        generator = [torch.Generator().manual_seed(i) for i in range(args.num_images)]
        shared = {"num_images_per_prompt": args.num_images, "num_inference_steps": args.num_inference_steps}
        return pipeline(PROMPT, generator=generator, output_type="np", **shared, **options)

    def reference() -> object:
        with active_adapters(pipeline.unet, None):
            return draw()

    together = draw(target_prompt=TARGET, compare=True)
    pairs = ((together.images, draw(target_prompt=TARGET)), (together.reference_images, reference()))
    largest = max(np.abs(own - alone.images).max() for own, alone in pairs)
    changed = np.abs(together.images - together.reference_images).max()
    print(
        f"compare against two calls: largest difference {largest:.1e} of [0, 1]; the two portraits differ by "
        f"{changed:.2f}"
    )
    calls = {
        CALL: lambda: draw(target_prompt=TARGET),
        "two calls, with the LoRA and without": lambda: (draw(target_prompt=TARGET), reference()),
        "`compare`": lambda: draw(target_prompt=TARGET, compare=True),
        "`return_sfcm`": lambda: draw(target_prompt=TARGET, return_sfcm=True),
        "`sfcm_guidance`": lambda: draw(target_prompt=TARGET, sfcm_guidance=1.0, adapter_in_unconditional=False),
    }
    medians = time_alternating(calls, args.repeats)
    print(f"{args.num_images} images, {args.num_inference_steps} steps, medians of {args.repeats} alternating calls")
    lines = [[name, f"{seconds:.2f}", f"{seconds / medians[CALL]:.2f}"] for name, seconds in medians.items()]
    print(markdown_table(["", "seconds", "of a call"], lines))


if __name__ == "__main__":
    main()
