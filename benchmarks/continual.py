"""Three attributes, one after another: `python benchmarks/continual.py`.

Blonde hair, then a red hat, then a striped shirt for the jacket, learned in three ways: plain LoRAs that know nothing
of each other and are stacked, SPF LoRAs stacked likewise, and SPF LoRAs each of which is trained on top of the earlier
ones (`--reference_lora`). After each step the same prompts are drawn from the same noise with all targets so far, and
judged against the original model's portraits. What `benchmarks/preservation.py` trained is not trained again.

Legend: B prompts, K training seeds.
Source: [ours]; [paper] the continual customization that its first figure shows.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.parts import drawing, judging, tables
from benchmarks.parts.drawing import Picture, file_digest
from benchmarks.parts.runs import UNWATCHED, run_folder, train_all, train_into
from evaluation.measures import pixel_change
from loras import LORA_WEIGHTS
from toy_portraits.judge import MIN_HAIR_PIXELS, PortraitJudge, PortraitReading, kept_factors, target_region
from toy_portraits.recipe import training_flags
from toy_portraits.world import LABELS, TARGETS, caption_phrases, join_phrases, sample_factors


PICTURED = 6  # prompts
STEPS = ("blonde_hair", "red_hat", "striped_shirt")
WAYS = {
    "plain": "plain LoRAs, stacked",
    "spf": "SPF LoRAs, stacked",
    "continual": "SPF LoRAs, each on top of the earlier",
}
# The run of each step. The first SPF LoRA has no earlier one and is the same for both ways.
RUNS_OF = {"plain": ["plain"] * 3, "spf": ["composed"] * 3, "continual": ["composed", "continual", "continual"]}
HEADINGS = {
    **{f"response_{name}": TARGETS[name].prompt for name in STEPS},
    "response_all": "all so far",
    "change_outside": "change outside",
    "step_change": "change since the last step",
    "kept": "factors kept",
    "kept_skin": "skin kept",
    "base_change": "change, base prompt alone",
}
# What no target of the three may change, so that all steps count the same factors.
KEPT = tuple(f for f in kept_factors(TARGETS[STEPS[0]]) if all(f in kept_factors(TARGETS[name]) for name in STEPS))
Measures = list[dict[str, np.ndarray]]  # after each step, (B,) each


def step_prompts(count: int, seed: int) -> list[list[str]]:
    """Four lists of fresh prompts: base prompts, and those after each step.

    An addition is appended, the shirt stands where the jacket did. No base prompt names a hair colour, which is a
    target.
    """
    factors = sample_factors(count, np.random.default_rng(seed))
    phrases = [caption_phrases(factors, i) for i in range(count)]
    for row in phrases:
        del row["hair_color"]
    prompts = [[join_phrases(row) for row in phrases]]
    for name in STEPS:
        phrases = [row | {TARGETS[name].replaces or name: TARGETS[name].prompt} for row in phrases]
        prompts.append([join_phrases(row) for row in phrases])
    return prompts


def lora_folders(args: argparse.Namespace, way: str, seed: int) -> list[Path]:
    """Where a way's LoRAs are, one a step."""
    return [run_folder(args.output_dir, target, name, seed) for target, name in zip(STEPS, RUNS_OF[way], strict=True)]


def train_on_top(args: argparse.Namespace, seed: int) -> None:
    """Train the LoRAs of the later steps, each on top of the earlier ones."""
    folders = lora_folders(args, "continual", seed)
    for step in range(1, len(STEPS)):
        command = [*training_flags(STEPS[step], args.base), "--seed", str(seed), *UNWATCHED]
        command += ["--stage1_steps", str(args.stage1_steps), "--stage2_steps", str(args.stage2_steps)]
        command += ["--stage2_objective", "composed", "--reference_lora", *map(str, folders[:step])]
        for name in STEPS[:step]:
            command += ["--reference_target_prompt", TARGETS[name].prompt]
        earlier = [file_digest(folder / LORA_WEIGHTS) for folder in folders[:step]]
        train_into(folders[step], command + shlex.split(args.train_args), args.base, earlier=earlier)


def train(args: argparse.Namespace) -> None:
    train_all(args, [(name, run, seed) for name in STEPS for run in ("plain", "composed") for seed in args.seeds])
    with ThreadPoolExecutor(args.workers) as pool:
        list(pool.map(lambda seed: train_on_top(args, seed), args.seeds))


def draw_steps(
    args: argparse.Namespace, folders: Sequence[Path], prompts: list[list[str]]
) -> list[dict[str, np.ndarray]]:
    """The portraits after each step, "full" and "base" (B, 64, 64, 3) uint8, with the LoRAs so far, or none."""
    pipeline, _ = judging.tools(args.device, args.base)
    settings, found = drawing.draw_settings(args), []
    for step in range(1, len(STEPS) + 1):

        def make(step: int = step) -> dict[str, np.ndarray]:
            with drawing.loras_on(pipeline, folders[:step]):
                places = {"full": step, "base": 0}
                return {name: drawing.draw(pipeline, prompts[i], settings) for name, i in places.items()}

        digests = [drawing.base_model_digest(args.base), *(file_digest(own / LORA_WEIGHTS) for own in folders[:step])]
        key = ["continual", STEPS[:step], asdict(settings), digests]
        found.append(drawing.cached_arrays(args.output_dir / "cache", key, make))
    return found


def hidden(name: str, so_far: Sequence[str], reading: PortraitReading) -> np.ndarray:
    """(B,) bool: where a target cannot be read, for a hat on top of hair leaves none of a man's to be seen."""
    hair = (reading.labels == LABELS.index("hair")).sum(axis=(1, 2))
    return (hair < MIN_HAIR_PIXELS) & (TARGETS[name].factor == "hair_color" and "red_hat" in so_far)


def judge_steps(judge: PortraitJudge, original: np.ndarray, drawn: list[dict[str, np.ndarray]]) -> Measures:
    """The measures after each step; `original` (B, 64, 64, 3) are portraits of the base prompts.

    Returns:
        `response_<target>` of each target so far, NaN where it is hidden; `response_all`, 1 where all that are not
        hidden are there;
        `change_outside` of the union of their regions; `step_change`, since the step before, outside the new target's
        region; `kept_skin` and `kept`, agreement of the factors that belong to no target; `base_change`, of the whole
        picture with the base prompt.
    """
    before = previous = judge.read(original)
    previous_images, found = original, []
    for step, portraits in enumerate(drawn):
        so_far, images = STEPS[: step + 1], portraits["full"]
        reading, measures = judge.read(images), {}
        for name in so_far:
            response = judge.response(images, TARGETS[name], reading)["response"]
            measures[f"response_{name}"] = np.where(hidden(name, so_far, reading), np.nan, response)
        measures["response_all"] = np.nanmin([measures[f"response_{name}"] for name in so_far], axis=0)
        region = np.any([target_region(before.labels, reading.labels, TARGETS[name]) for name in so_far], axis=0)
        own_region = target_region(previous.labels, reading.labels, TARGETS[so_far[-1]])
        measures["change_outside"] = pixel_change(original, images, ~region)
        measures["step_change"] = pixel_change(previous_images, images, ~own_region)
        kept = {factor: (before.factors[factor] == reading.factors[factor]).astype(float) for factor in KEPT}
        measures |= {"kept": np.mean(list(kept.values()), axis=0), "kept_skin": kept["skin"]}
        measures["base_change"] = pixel_change(original, portraits["base"])
        found.append(measures)
        previous, previous_images = reading, images
    return found


def write_tables(args: argparse.Namespace, folder: Path, results: dict[str, list[Measures]]) -> None:
    """Write results.json and table.md; `results` holds each way's measures by training seed."""
    rows, lines = [], []
    for step, name in enumerate(STEPS):
        for way, per_seed in results.items():
            names = per_seed[0][step]
            measures = tables.summarise({key: np.stack([one[step][key] for one in per_seed]) for key in names})
            rows.append({"way": way, "step": step + 1, "target": name, "measures": measures})
            labels = [f"+ {TARGETS[name].prompt}", WAYS.get(way, tables.ORIGINAL)]
            lines.append([*labels, *(tables.cell(measures, key, missing="") for key in HEADINGS)])
    text = f"""\
{tables.settings_text(args)} an attribute (plain
LoRA: {args.stage1_steps + args.stage2_steps}). Every row draws the same prompts from the same noise. ± is one standard
error over prompts.

The first columns are the share of portraits that show each target asked for so far, and all of them; hair that the hat
hides altogether does not count. *Change outside* is the mean absolute difference (0-255) to the original model's
portrait of the base prompt, outside the union of these targets' regions; *change since the last step* that to the
portrait before, outside the new target's region. *Factors kept*: agreement with the original's portrait in
{", ".join(KEPT).replace("_", " ")}.

"""
    tables.write_results(folder, args, text + tables.markdown_table(["", "", *HEADINGS.values()], lines), rows=rows)


def parse_args(input_args: Sequence[str] | None = None) -> argparse.Namespace:
    return drawing.read_flags(drawing.make_parser(__doc__, seeds=[101], prompt_seed=90301), input_args)


def main(args: argparse.Namespace) -> None:
    train(args)
    folder, (_, judge) = args.output_dir / "continual", judging.tools(args.device, args.base)
    prompts = step_prompts(args.num_prompts, args.prompt_seed)
    untuned = draw_steps(args, (), prompts)
    original = untuned[0]["base"]
    results, columns = {"original": [judge_steps(judge, original, untuned)]}, {"original": original}
    for way in WAYS:
        drawn = [draw_steps(args, lora_folders(args, way, seed), prompts) for seed in args.seeds]
        results[way] = [judge_steps(judge, original, one) for one in drawn]
        columns |= {f"{way} + {TARGETS[name].prompt}": own["full"] for name, own in zip(STEPS, drawn[0], strict=True)}
        print(f"judged {WAYS[way]}", flush=True)
    write_tables(args, folder, results)
    count = min(PICTURED, args.num_prompts)
    rows = [[Picture(text, images[i]) for text, images in columns.items()] for i in range(count)]
    drawing.save_pictures(folder / "continual.png", rows)


if __name__ == "__main__":
    main(parse_args())
