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
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.parts import drawing
from benchmarks.parts.drawing import file_digest
from benchmarks.parts.tables import ORIGINAL, cell, markdown_table, mean_and_error, write_results
from benchmarks.parts.training import UNWATCHED, run_folder, train_into
from benchmarks.preservation_runs import train
from pipeline_spf_portrait import SPFPortraitPipeline
from toy_portraits.judge import MIN_HAIR_PIXELS, PortraitJudge, PortraitReading, kept_factors, target_region
from toy_portraits.recipe import training_flags
from toy_portraits.world import LABELS, TARGETS, caption_phrases, join_phrases, sample_factors


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


# ------------------------------------------------------------------------------------------------------------ training


def lora_folders(args: argparse.Namespace, way: str, seed: int) -> list[Path]:
    """Where a way's LoRAs are, one a step."""
    return [run_folder(args.output_dir, target, name, seed) for target, name in zip(STEPS, RUNS_OF[way], strict=True)]


def train_on_top(args: argparse.Namespace, step: int, seed: int) -> None:
    """Train the LoRA of a later step on top of the earlier ones."""
    *earlier, folder = lora_folders(args, "continual", seed)[: step + 1]
    command = [*training_flags(STEPS[step]), "--seed", str(seed), *UNWATCHED]
    command += ["--stage1_steps", str(args.stage1_steps), "--stage2_steps", str(args.stage2_steps)]
    command += ["--stage2_objective", "composed", "--reference_lora", *map(str, earlier)]
    for name in STEPS[:step]:
        command += ["--reference_target_prompt", TARGETS[name].prompt]
    digests = [file_digest(drawing.weights_of(own)) for own in earlier]
    train_into(folder, command + shlex.split(args.train_args), earlier=digests)


def train_seed(args: argparse.Namespace, seed: int) -> None:
    """Train all that one training seed needs, in the order in which one starts from another."""
    for run_name in ("plain", "stage1", "composed"):
        for target_name in STEPS:
            train(args, target_name, run_name, seed)
    for step in range(1, len(STEPS)):
        train_on_top(args, step, seed)


# ------------------------------------------------------------------------------------------------------------- judging


@dataclass(frozen=True)
class Drawn:
    """The portraits after each step: of the full prompts, and of the base prompts; (B, 64, 64, 3) uint8 each."""

    full: list[np.ndarray]
    base: list[np.ndarray]


def draw_steps(
    pipeline: SPFPortraitPipeline, folders: Sequence[Path], prompts: list[list[str]], args: argparse.Namespace
) -> Drawn:
    """Draw after each step with the LoRAs so far, or with the original model if there are no folders."""
    settings, cache_dir, found = drawing.draw_settings(args), args.output_dir / "cache", []
    for step in range(1, len(STEPS) + 1):

        def make(step: int = step) -> dict[str, np.ndarray]:
            with drawing.loras_on(pipeline, folders[:step]):
                places = {"full": step, "base": 0}
                return {name: drawing.draw(pipeline, prompts[i], settings) for name, i in places.items()}

        digests = [drawing.base_model_digest(), *(file_digest(drawing.weights_of(own)) for own in folders[:step])]
        key = ["continual", STEPS[:step], asdict(settings), digests]
        found.append(drawing.cached_arrays(cache_dir, key, make))
    return Drawn(*([arrays[name] for arrays in found] for name in ("full", "base")))


def mean_change(first: np.ndarray, second: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """(B,) mean absolute difference, in 0-255, of (B, 64, 64, 3) pictures where `inside` (B, 64, 64) is not."""
    difference = np.abs(first.astype(np.float64) - second).mean(axis=-1)
    return (difference * ~inside).sum(axis=(1, 2)) / np.maximum((~inside).sum(axis=(1, 2)), 1)


def hidden(name: str, so_far: Sequence[str], reading: PortraitReading) -> np.ndarray:
    """(B,) bool: where a target cannot be read, for a hat on top of hair leaves none of a man's to be seen."""
    hair = (reading.labels == LABELS.index("hair")).sum(axis=(1, 2))
    return (hair < MIN_HAIR_PIXELS) & (TARGETS[name].factor == "hair_color" and "red_hat" in so_far)


def judge_steps(judge: PortraitJudge, original: np.ndarray, drawn: Drawn) -> list[dict[str, np.ndarray]]:
    """The measures after each step, (B,) each; `original` (B, 64, 64, 3) are portraits of the base prompts.

    Returns:
        `response_<target>` of each target so far, NaN where it is hidden; `response_all`, 1 where all that are not
        hidden are there;
        `change_outside` of the union of their regions; `step_change`, since the step before, outside the new target's
        region; `kept_skin` and `kept`, agreement of the factors that belong to no target; `base_change`, of the whole
        picture with the base prompt.
    """
    before, previous, previous_images = judge.read(original), judge.read(original), original
    nothing, found = np.zeros(original.shape[:3], dtype=bool), []
    for step, (images, base_images) in enumerate(zip(drawn.full, drawn.base, strict=True)):
        so_far, reading = STEPS[: step + 1], judge.read(images)
        measures = {}
        for name in so_far:
            response = judge.response(images, TARGETS[name], reading)["response"]
            measures[f"response_{name}"] = np.where(hidden(name, so_far, reading), np.nan, response)
        measures["response_all"] = np.nanmin([measures[f"response_{name}"] for name in so_far], axis=0)
        region = np.any([target_region(before.labels, reading.labels, TARGETS[name]) for name in so_far], axis=0)
        own_region = target_region(previous.labels, reading.labels, TARGETS[so_far[-1]])
        measures["change_outside"] = mean_change(original, images, region)
        measures["step_change"] = mean_change(previous_images, images, own_region)
        kept = {factor: (before.factors[factor] == reading.factors[factor]).astype(float) for factor in KEPT}
        measures |= {"kept": np.mean(list(kept.values()), axis=0), "kept_skin": kept["skin"]}
        measures["base_change"] = mean_change(original, base_images, nothing)
        found.append(measures)
        previous, previous_images = reading, images
    return found


def summarise(per_seed: Sequence[dict[str, np.ndarray]]) -> dict[str, dict[str, float]]:
    """Per measure the mean and its standard error over prompts, after the mean over training seeds.

    What is hidden does not count; a prompt where it is hidden for all seeds is left out.
    """
    seen = {n: np.ma.masked_invalid([one[n] for one in per_seed]).mean(axis=0).compressed() for n in per_seed[0]}
    return {name: mean_and_error(values) for name, values in seen.items()}


# ------------------------------------------------------------------------------------------------------------- writing


def explanation(args: argparse.Namespace) -> str:
    return f"""\
{args.num_prompts} prompts (seed {args.prompt_seed}), training seed {", ".join(map(str, args.seeds))}, \
{args.num_inference_steps} DDIM steps,
guidance scale {args.guidance_scale:g}, {args.stage1_steps} + {args.stage2_steps} training steps an attribute (plain
LoRA: {args.stage1_steps + args.stage2_steps}). Every row draws the same prompts from the same noise. ± is one standard
error over prompts.

The first columns are the share of portraits that show each target asked for so far, and all of them; hair that the hat
hides altogether does not count. *Change outside*
is the mean absolute difference (0-255) to the original model's portrait of the base prompt, outside the union of these
targets' regions; *change since the last step* that to the portrait before, outside the new target's region. *Factors
kept*: agreement with the original's portrait in {", ".join(KEPT).replace("_", " ")}.

"""


def write_tables(args: argparse.Namespace, results: dict[str, list[list[dict[str, np.ndarray]]]]) -> None:
    """Write results.json and table.md; `results` holds each way's measures by training seed and step."""
    rows = [
        {"way": way, "step": step + 1, "target": name, "measures": summarise([one[step] for one in per_seed])}
        for step, name in enumerate(STEPS)
        for way, per_seed in results.items()
    ]
    lines = [
        [f"+ {TARGETS[row['target']].prompt}", WAYS.get(row["way"], ORIGINAL)]
        + [cell(row["measures"], name, missing="") for name in HEADINGS]
        for row in rows
    ]
    write_results(args, explanation(args) + markdown_table(["", "", *HEADINGS.values()], lines), rows=rows)


def write_picture(args: argparse.Namespace, original: np.ndarray, drawn: dict[str, Drawn]) -> None:
    """A row a prompt: the original, then each way's portraits step by step."""
    columns = {"original": original}
    for way, portraits in drawn.items():
        columns |= {f"{way} + {TARGETS[n].prompt}": own for n, own in zip(STEPS, portraits.full, strict=True)}
    count = min(drawing.PICTURED, len(original))
    rows = [[(text, drawing.tile(images[i])) for text, images in columns.items()] for i in range(count)]
    drawing.save_rows(args.output_dir / "continual.png", rows)


def parse_args(input_args: Sequence[str] | None = None) -> argparse.Namespace:
    # The preservation benchmark's folder, whose LoRAs are used; tables and picture go into continual/ there.
    parser = drawing.make_parser(__doc__, "preservation", seeds=[101], prompt_seed=90301)
    parser.add_argument("--stage1_steps", type=int, default=120)
    parser.add_argument("--stage2_steps", type=int, default=120)
    parser.add_argument("--train_args", default="", help="Further flags of every training, in one string.")
    return drawing.read_flags(parser, input_args)


def main(args: argparse.Namespace) -> None:
    with ThreadPoolExecutor(args.workers) as pool:
        list(pool.map(lambda seed: train_seed(args, seed), args.seeds))
    folders = {way: [lora_folders(args, way, seed) for seed in args.seeds] for way in WAYS}
    args.output_dir /= "continual"
    args.output_dir.mkdir(parents=True, exist_ok=True)

    pipeline, judge = drawing.load_pipeline(args.device), PortraitJudge.from_pretrained()
    prompts = step_prompts(args.num_prompts, args.prompt_seed)
    untuned = draw_steps(pipeline, (), prompts, args)
    original = untuned.base[0]
    results, pictured = {"original": [judge_steps(judge, original, untuned)]}, {}
    for way, of_seeds in folders.items():
        drawn = [draw_steps(pipeline, own, prompts, args) for own in of_seeds]
        results[way] = [judge_steps(judge, original, one) for one in drawn]
        pictured[way] = drawn[0]
        print(f"judged {WAYS[way]}", flush=True)
    write_picture(args, original, pictured)
    write_tables(args, results)


if __name__ == "__main__":
    main(parse_args())
