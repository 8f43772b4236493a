"""What steps of a training, calls of the pipeline and switches cost, rows alternating in one process.

- `python benchmarks/cost.py steps`: kinds of steps of stage 2 on the toy base model, with caches and without, against
  a plain LoRA step of the same trainer at as many rows with gradient. A composed step makes the targets of its batch,
  or finds them made; what it costs on average follows for each `--composed_target_reuse`. `--flags` names another
  model, as that of `benchmarks/random_stable_diffusion.py`. Where the time goes, `python -m cProfile -s cumulative`
  says; what a step needs of memory, `benchmarks/estimate_memory.py`.
- `python benchmarks/cost.py calls`: the original model's portrait in the same batch (`compare`), the map, and guidance
  with it, against a call; the toy base model with a random LoRA.
- `python benchmarks/cost.py switches`: adapters on and off, the dropout of the one in training, and the capture of
  cross-attention, with the layers found once, as the training does, and found anew. A UNet of Stable Diffusion 1.5's
  size without weights; nothing is computed.

Source: [ours].
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from adapters import Adapters, active_adapters
from attention_processors import CrossAttentionCapture, capture_cross_attention
from benchmarks.parts import trainer
from benchmarks.parts.drawing import load_pipeline
from benchmarks.parts.tables import markdown_table
from benchmarks.parts.trainer import Run
from benchmarks.random_stable_diffusion import make_unet
from toy_portraits.recipe import FLAGS, training_flags


def alternate(rows: dict[str, Callable[[int], float]], rounds: int) -> dict[str, list[float]]:
    """The seconds that each row says it took, one of each in turn, after a round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in rows}
    for i in range(rounds + 1):
        for name, take in rows.items():
            times[name].append(take(i))
    return {name: values[1:] for name, values in times.items()}


def seconds_of(function: Callable[[], object], _: int = 0) -> float:
    start = trainer.now()
    function()
    return trainer.now() - start


def print_times(times: dict[str, list[float]], of: dict[str, str] | None = None) -> None:
    """A line for each row, set against the first one, or the one that `of` names."""
    lines = []
    for name, values in times.items():
        low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
        ratio = median / statistics.median(times[of[name] if of else next(iter(times))])
        lines.append([name, f"{1000 * median:.4g}", f"{1000 * low:.4g} to {1000 * high:.4g}", f"{ratio:.2f}"])
    print(markdown_table(["", "median, ms", "quartiles, ms", "of the first of its kind"], lines))


# --------------------------------------------------------------------------------------------------------------- steps


PLAIN, MADE, FOUND = "plain LoRA", "composed, targets made", "composed, targets found"
BATCH = int(FLAGS[FLAGS.index("--train_batch_size") + 1])
# The paper's objective has a row with gradient of each of two kinds for every row of a batch, so half of the batch.
PAPER = f"--stage2_objective paper --train_batch_size {BATCH // 2}"
BOTH, CHECKPOINTING = "--stage2_objective both", "--gradient_checkpointing"
DRAWN, FEWER_LAYERS = "--enhancement_weighting drawn", "--alignment_layers phrase_map"
NO_LATENTS, NO_PROMPTS = "--no-cache_latents", "--no-cache_text_embeddings"


@dataclass(frozen=True)
class Step:
    """One kind of step.

    Attributes:
        flags: of the run it is a step of; kinds with the same flags share a run.
        changes: other values of flags that nothing but the step asks for.
        stage: of the step. A plain LoRA step is one of stage 1, here with stage 1's LoRA, switched off, beside it.
        of: the kind that it is compared with.
    """

    flags: str = ""
    changes: dict[str, Any] = field(default_factory=dict)
    stage: int = 2
    of: str = PLAIN

    def seconds(self, run: Run, number: int) -> float:
        self.before(run, number)
        return seconds_of(partial(trainer.take_step, run, number, self.stage))

    def before(self, run: Run, number: int) -> None:
        """What the step finds done, and does not pay for."""
        if self.changes.get("composed_target_reuse", 1) > 1:
            trainer.make_targets(run, number)


def kinds(name: str, flags: str) -> dict[str, Step]:
    """The plain and the composed steps of runs with these flags."""
    plain = f"{PLAIN}{name}"
    made, found = (Step(flags, {"composed_target_reuse": reuse}, of=plain) for reuse in (1, 2))
    return {plain: Step(flags, stage=1, of=plain), f"{MADE}{name}": made, f"{FOUND}{name}": found}


STEPS = {
    **kinds("", ""),
    f"{MADE}, teacher_base_weight 0": Step(changes={"composed_target_reuse": 1, "teacher_base_weight": 0.0}),
    f"{MADE}, single_pass": Step(changes={"composed_target_reuse": 1, "dual_path": "single_pass"}),
    "paper": Step(PAPER),
    "paper, single_pass": Step(PAPER, {"dual_path": "single_pass"}),
    "paper, drawn": Step(f"{PAPER} {DRAWN}"),
    "paper, phrase_map": Step(f"{PAPER} {FEWER_LAYERS}"),
    "paper, drawn, phrase_map": Step(f"{PAPER} {DRAWN} {FEWER_LAYERS}"),
    "paper, without enhancement": Step(PAPER, {"enhancement_loss": "none"}),
    "paper, without enhancement, phrase_map": Step(f"{PAPER} {FEWER_LAYERS}", {"enhancement_loss": "none"}),
    **kinds(", checkpointing", CHECKPOINTING),
    "paper, checkpointing": Step(f"{PAPER} {CHECKPOINTING}", of=f"{PLAIN}, checkpointing"),
    **kinds(", nothing cached", f"{NO_LATENTS} {NO_PROMPTS}"),
    "both": Step(BOTH, of="both"),
    "both, no latents cached": Step(f"{BOTH} {NO_LATENTS}", of="both"),
    "both, no prompts cached": Step(f"{BOTH} {NO_PROMPTS}", of="both"),
    "both, nothing cached": Step(f"{BOTH} {NO_LATENTS} {NO_PROMPTS}", of="both"),
}


# By flag, the step that one of so many is, and what the others are.
ONE_OF = {
    "`--composed_target_reuse`": (MADE, FOUND),
    "`--enhancement_every`": ("paper", "paper, without enhancement"),
    "`--enhancement_every`, with drawn and phrase_map": (
        "paper, drawn, phrase_map", "paper, without enhancement, phrase_map",
    ),
}  # fmt: skip


def make_runs(names: Sequence[str], flags: Sequence[str], steps: int) -> dict[str, Run]:
    """A run for each kind of step; those with the same flags share models, LoRA and optimizer."""
    flags = [*flags, "--stage1_steps", "1", "--stage2_steps", str(steps), "--num_validation_images", "0"]
    flags += ["--alignment_inference_steps", "1", "--sfcm_noise_samples", "1", "--report_to", "none"]
    prepared: dict[str, Run] = {}
    for own in (STEPS[name].flags for name in names):
        if own not in prepared:
            prepared[own] = trainer.prepare([*flags, *shlex.split(own)], steps)
    return {name: trainer.with_flags(prepared[STEPS[name].flags], STEPS[name].changes) for name in names}


def measure_steps(options: argparse.Namespace) -> None:
    asked = [step for name, step in STEPS.items() if name.startswith(tuple(options.rows))]
    chosen = {name: step for name, step in STEPS.items() if step in asked or name in {own.of for own in asked}}
    flags = [*training_flags("blonde_hair"), "--num_alignment_images", str(BATCH), *shlex.split(options.flags)]
    with tempfile.TemporaryDirectory() as folder:
        runs = make_runs(list(chosen), [*flags, "--output_dir", folder], options.rounds + 2)
        # The first step is stage 1's.
        rows = {name: lambda i, name=name: STEPS[name].seconds(runs[name], i + 1) for name in chosen}
        times = alternate(rows, options.rounds)
    print_times(times, {name: step.of for name, step in chosen.items()})
    for flag, (dear, cheap) in ONE_OF.items():
        if {PLAIN, dear, cheap} <= chosen.keys():
            print_averages(times, flag, dear, cheap)


def print_averages(times: dict[str, list[float]], flag: str, dear: str, cheap: str) -> None:
    """What a step costs on average where one of so many is the dear one, of a plain step."""
    plain, rare, usual = (statistics.median(times[name]) for name in (PLAIN, dear, cheap))
    lines = [[str(every), f"{(rare + (every - 1) * usual) / every / plain:.2f}"] for every in (1, 2, 3, 4)]
    print(markdown_table([flag, "step on average, of plain"], lines))


# --------------------------------------------------------------------------------------------------------------- calls


PROMPT, TARGET = "a woman, a green jacket, a purple background", "blonde hair"


def measure_calls(options: argparse.Namespace) -> None:
    pipeline = load_pipeline("cpu")
    # Random weights, strong enough to be seen.
    torch.manual_seed(0)
    modules = ["to_q", "to_k", "to_v", "to_out.0"]
    pipeline.unet.add_adapter(LoraConfig(r=16, lora_alpha=4, target_modules=modules, init_lora_weights=False))
    count, steps = options.num_images, options.num_inference_steps

    def draw(adapter: str | None = "default", **extra: Any) -> Any:
        shared = {"num_images_per_prompt": count, "num_inference_steps": steps, "output_type": "np"}
        with active_adapters(pipeline.unet, adapter):
            return pipeline(
                PROMPT, generator=[torch.Generator().manual_seed(i) for i in range(count)], **shared, **extra
            )

    changed = partial(draw, target_prompt=TARGET)
    together, original = changed(compare=True), partial(draw, None)
    pairs = (together.images, changed().images), (together.reference_images, original().images)
    largest = max(np.abs(own - alone).max() for own, alone in pairs)
    changes = np.abs(together.images - together.reference_images).max()
    print(f"`compare` and two calls differ by at most {largest:.1e} of [0, 1], the two portraits by {changes:.2f}")
    calls = {
        "a call": changed,
        "two calls, with the LoRA and without": lambda: (changed(), original()),
        "`compare`": partial(changed, compare=True),
        "`return_sfcm`": partial(changed, return_sfcm=True),
        "`sfcm_guidance`": partial(changed, sfcm_guidance=1.0, adapter_in_unconditional=False),
    }
    print(f"{count} images, {steps} steps")
    print_times(alternate({name: partial(seconds_of, call) for name, call in calls.items()}, options.rounds))


# ------------------------------------------------------------------------------------------------------------ switches


Switch = Callable[[], AbstractContextManager[object]]


def go_through(switches: Sequence[Switch]) -> None:
    """Into the contexts, one after the other, and out of them again."""
    for switch in switches:
        with switch():
            pass


def measure_switches(options: argparse.Namespace) -> None:
    targets = ["attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"]
    with torch.device("meta"):
        unet = make_unet().requires_grad_(False)
        for name in ("default", "stage1"):
            unet.add_adapter(LoraConfig(r=16, target_modules=targets, lora_dropout=0.1), name)
    unet.set_adapter("default")
    unet.eval()
    adapters, capture = Adapters(unet), CrossAttentionCapture(unet)
    off, teacher, trained = (partial(adapters.only, name) for name in (None, "stage1", "default"))
    dropout = partial(adapters.dropout, "default")
    rows: dict[str, list[Switch]] = {
        "adapters off": [off],
        "one row each": [partial(adapters.per_sample, ["__base__", "default"])],
        "dropout": [dropout],
        "capture": [capture.store],
        "a composed step (dropout, off, teacher)": [dropout, off, teacher],
        "a paper step (dropout, capture, off, on)": [dropout, capture.store, off, trained],
        "found anew: adapters off": [partial(active_adapters, unet, None)],
        "found anew: capture": [partial(capture_cross_attention, unet)],
    }
    print(f"{len(adapters.layers)} layers with adapters, {len(capture.layers)} of cross-attention")
    takes = {name: partial(seconds_of, partial(go_through, switches)) for name, switches in rows.items()}
    print_times(alternate(takes, options.rounds))


# ----------------------------------------------------------------------------------------------------------------- all


PROGRAMS = {"steps": measure_steps, "calls": measure_calls, "switches": measure_switches}


def main(input_args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=PROGRAMS)
    parser.add_argument("--rounds", type=int, default=9, help="Timed ones of each row, after one that is not.")
    parser.add_argument("--rows", nargs="+", metavar="NAME", default=[""], help="Beginnings of kinds of steps; all.")
    parser.add_argument("--flags", default="", help="Other flags of the training whose steps are timed.")
    parser.add_argument("--num_images", type=int, default=4, help="Of a call.")
    parser.add_argument("--num_inference_steps", type=int, default=25, help="Of a call.")
    options = parser.parse_args(input_args)
    for name in ("rounds", "num_images", "num_inference_steps"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(options, name)}")
    for name in options.rows:
        if not any(step.startswith(name) for step in STEPS):
            parser.error(f"--rows {name}: no kind of step begins so; there are {', '.join(STEPS)}")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} thread(s)"
    print(f"\n{options.what} on {device}, medians of {options.rounds} alternating rounds\n")
    PROGRAMS[options.what](options)


if __name__ == "__main__":
    main()
