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
import json
import shlex
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.map_quality import draw_picture  # noqa: E402
from benchmarks.preservation import (  # noqa: E402
    PICTURED,
    UNWATCHED,
    WEIGHTS_NAME,
    add_drawing_flags,
    base_model_digest,
    cached_arrays,
    check_counts,
    draw,
    draw_settings,
    file_digest,
    load_pipeline,
    run_folder,
    train,
    train_into,
)
from benchmarks.rows import markdown_table, number, standard_error, without_nan  # noqa: E402
from toy_portraits.judge import (  # noqa: E402
    MIN_HAIR_PIXELS,
    PortraitJudge,
    PortraitReading,
    kept_factors,
    target_region,
)
from toy_portraits.recipe import training_flags  # noqa: E402
from toy_portraits.world import LABELS, SIZE, TARGETS, caption_phrases, join_phrases, sample_factors  # noqa: E402


STEPS = ("blonde_hair", "red_hat", "striped_shirt")
ORIGINAL = "original"
WAYS = {
    "plain": "plain LoRAs, stacked",
    "spf": "SPF LoRAs, stacked",
    "continual": "SPF LoRAs, each on top of the earlier",
}
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


# ------------------------------------------------------------------------------------------------------------- prompts


def step_prompts(count: int, seed: int) -> list[list[str]]:
    """Fresh prompts without and with the targets so far.

    Args:
        count: number of prompts B.
        seed: source of all randomness.

    Returns:
        Four lists of B: base prompts, and those after each step. An addition is appended, the shirt stands where the
        jacket did. No base prompt names a hair colour, which is a target.
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
    """Where a way's LoRAs are, one a step. The first SPF LoRA has no earlier one and is the same for both ways."""
    names = {"plain": ["plain"] * 3, "spf": ["composed"] * 3, "continual": ["composed", "continual", "continual"]}
    return [run_folder(args, target, name, seed) for target, name in zip(STEPS, names[way], strict=True)]


def continual_recipe(args: argparse.Namespace, step: int, seed: int) -> dict:
    """How the LoRA of a later step is trained on top of the earlier ones."""
    earlier = lora_folders(args, "continual", seed)[:step]
    command = [*training_flags(STEPS[step]), "--seed", str(seed), *UNWATCHED]
    command += ["--stage1_steps", str(args.stage1_steps), "--stage2_steps", str(args.stage2_steps)]
    command += ["--stage2_objective", "composed", "--reference_lora", *map(str, earlier)]
    for name in STEPS[:step]:
        command += ["--reference_target_prompt", TARGETS[name].prompt]
    command += shlex.split(args.train_args) + shlex.split(args.continual_args)
    weights = [folder / WEIGHTS_NAME for folder in earlier]
    return {
        "command": command,
        "base_model": base_model_digest(),
        "earlier": [file_digest(path) for path in weights],
    }


def train_seed(args: argparse.Namespace, seed: int) -> None:
    """Train what the ways need with one training seed, in the order in which one starts from another."""
    independent = {"plain": ("plain",), "spf": ("stage1", "composed")}
    for way in args.ways:
        for run_name in independent.get(way, ()):
            for target_name in STEPS:
                train(args, target_name, run_name, seed)
    if "continual" in args.ways:
        for run_name in independent["spf"]:
            train(args, STEPS[0], run_name, seed)
        for step in range(1, len(STEPS)):
            train_into(lora_folders(args, "continual", seed)[step], continual_recipe(args, step, seed))


# ------------------------------------------------------------------------------------------------------------- judging


@dataclass(frozen=True)
class Drawn:
    """The portraits after each step: of the full prompts, and of the base prompts; (B, 64, 64, 3) uint8 each."""

    full: list[np.ndarray]
    base: list[np.ndarray]


def draw_steps(
    pipeline: StableDiffusionPipeline, folders: Sequence[Path], prompts: list[list[str]], args: argparse.Namespace
) -> Drawn:
    """Draw after each step with the LoRAs so far, or with the original model if there are no folders."""
    settings, cache_dir = draw_settings(args), args.output_dir / "cache"
    full, base = [], []
    for step in range(1, len(STEPS) + 1):
        so_far = [Path(folder) for folder in folders[:step]]

        def make(step: int = step, so_far: list[Path] = so_far) -> dict[str, np.ndarray]:
            names = [f"step{place}" for place in range(len(so_far))]
            try:
                for name, folder in zip(names, so_far):
                    pipeline.unet.load_lora_adapter(
                        str(folder), weight_name=WEIGHTS_NAME, adapter_name=name, prefix="unet"
                    )
                if names:
                    pipeline.unet.set_adapters(names, [1.0] * len(names))
                return {name: draw(pipeline, prompts[i], settings) for name, i in (("full", step), ("base", 0))}
            finally:
                if names:
                    pipeline.unet.unload_lora()

        digests = [base_model_digest(), *(file_digest(folder / WEIGHTS_NAME) for folder in so_far)]
        arrays = cached_arrays(cache_dir, ["continual", STEPS[:step], asdict(settings), digests], make)
        full.append(arrays["full"])
        base.append(arrays["base"])
    return Drawn(full, base)


def union_region(before: PortraitReading, after: PortraitReading, targets: Sequence[str]) -> np.ndarray:
    """(B, 64, 64) bool: where any of the targets may change a portrait."""
    return np.any([target_region(before.labels, after.labels, TARGETS[name]) for name in targets], axis=0)


def mean_change(first: np.ndarray, second: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """(B,) mean absolute difference, in 0-255, of (B, 64, 64, 3) pictures where `inside` (B, 64, 64) is not."""
    difference = np.abs(first.astype(np.float64) - second).mean(axis=-1)
    return (difference * ~inside).sum(axis=(1, 2)) / np.maximum((~inside).sum(axis=(1, 2)), 1)


def hidden(name: str, so_far: Sequence[str], reading: PortraitReading) -> np.ndarray:
    """(B,) bool: where a target cannot be read, for a hat on top of hair leaves none of a man's to be seen."""
    hair = (reading.labels == LABELS.index("hair")).sum(axis=(1, 2))
    return (hair < MIN_HAIR_PIXELS) & (TARGETS[name].factor == "hair_color" and "red_hat" in so_far)


def judge_steps(judge: PortraitJudge, original: np.ndarray, drawn: Drawn) -> list[dict[str, np.ndarray]]:
    """The measures after each step, (B,) each.

    Args:
        judge: the judge.
        original: (B, 64, 64, 3) uint8, the original model's portraits of the base prompts.
        drawn: the portraits after each step.

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
        measures["change_outside"] = mean_change(original, images, union_region(before, reading, so_far))
        own_region = target_region(previous.labels, reading.labels, TARGETS[so_far[-1]])
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
    summary = {}
    for name in per_seed[0]:
        seen = np.ma.masked_invalid([one[name] for one in per_seed]).mean(axis=0).compressed()
        mean = float(seen.mean()) if len(seen) else float("nan")
        summary[name] = {"mean": mean, "standard_error": standard_error(seen)}
    return summary


# ------------------------------------------------------------------------------------------------------------- writing


def step_text(step: int) -> str:
    return "+ " + TARGETS[STEPS[step]].prompt


def write_results(args: argparse.Namespace, results: dict[str, list[list[dict[str, np.ndarray]]]]) -> None:
    """Write results.json and table.md; `results` holds each way's measures by training seed and step."""
    rows = [
        {"way": way, "step": step + 1, "target": name, "measures": summarise([one[step] for one in per_seed])}
        for step, name in enumerate(STEPS)
        for way, per_seed in results.items()
    ]
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    text = json.dumps(without_nan({"settings": settings, "rows": rows}), indent=2, allow_nan=False)
    (args.output_dir / "results.json").write_text(text + "\n", encoding="utf-8")
    lines = []
    for row in rows:
        found = row["measures"]
        cells = [number(*found[name].values()) if name in found else "" for name in HEADINGS]
        lines.append([step_text(row["step"] - 1), WAYS.get(row["way"], "original model"), *cells])
    seeds = ", ".join(map(str, args.seeds))
    explanation = f"""\
{args.num_prompts} prompts (seed {args.prompt_seed}), training seed {seeds}, {args.num_inference_steps} DDIM steps,
guidance scale {args.guidance_scale:g}, {args.stage1_steps} + {args.stage2_steps} training steps an attribute (plain
LoRA: {args.stage1_steps + args.stage2_steps}). Every row draws the same prompts from the same noise. ± is one standard
error over prompts.

The first columns are the share of portraits that show each target asked for so far, and all of them; hair that the hat
hides altogether does not count. *Change outside*
is the mean absolute difference (0-255) to the original model's portrait of the base prompt, outside the union of these
targets' regions; *change since the last step* that to the portrait before, outside the new target's region. *Factors
kept*: agreement with the original's portrait in {", ".join(KEPT).replace("_", " ")}.

"""
    table = markdown_table(["", "", *HEADINGS.values()], lines)
    (args.output_dir / "table.md").write_text(explanation + table, encoding="utf-8")


def write_picture(args: argparse.Namespace, original: np.ndarray, drawn: dict[str, Drawn]) -> None:
    """A row a prompt: the original, then each way's portraits step by step."""
    tile = lambda image: Image.fromarray(image).resize((2 * SIZE, 2 * SIZE), Image.Resampling.NEAREST)  # noqa: E731
    rows = []
    for i in range(min(PICTURED, len(original))):
        row = [("original", tile(original[i]))]
        for way, portraits in drawn.items():
            # the last word alone, for the caption has the tile's width
            words = [TARGETS[name].prompt.split()[-1] for name in STEPS]
            row += [(f"{way} + {word}", tile(images[i])) for word, images in zip(words, portraits.full, strict=True)]
        rows.append(row)
    title = "One seed a row, the attributes one after another. " + ". ".join(f"{w}: {WAYS[w]}" for w in drawn)
    draw_picture(rows, title).save(args.output_dir / "continual.png", optimize=True)


# -------------------------------------------------------------------------------------------------------- command line


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=ROOT / "runs" / "preservation",
        help="The preservation benchmark's folder, whose LoRAs are used; tables and picture go into continual/ there.",
    )
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[101], help="Training seeds.")
    parser.add_argument("--stage1_steps", type=int, default=120)
    parser.add_argument("--stage2_steps", type=int, default=120)
    parser.add_argument("--train_args", default="", help="Further flags of every training, in one string.")
    parser.add_argument("--continual_args", default="", help="Further flags of trainings on top of earlier LoRAs.")
    parser.add_argument("--workers", type=int, default=2, help="Trainings at a time, one a training seed.")
    add_drawing_flags(parser, prompt_seed=90301)
    args = parser.parse_args(input_args)
    check_counts(parser, args)
    return args


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    args.output_dir = args.output_dir.resolve()
    with ThreadPoolExecutor(args.workers) as pool:
        list(pool.map(lambda seed: train_seed(args, seed), args.seeds))
    folders = {(way, seed): lora_folders(args, way, seed) for way in args.ways for seed in args.seeds}
    args.output_dir /= "continual"
    args.output_dir.mkdir(parents=True, exist_ok=True)

    pipeline, judge = load_pipeline(draw_settings(args)), PortraitJudge.from_pretrained()
    prompts = step_prompts(args.num_prompts, args.prompt_seed)
    untuned = draw_steps(pipeline, (), prompts, args)
    original = untuned.base[0]
    results, pictured = {ORIGINAL: [judge_steps(judge, original, untuned)]}, {}
    for way in args.ways:
        drawn = [draw_steps(pipeline, folders[way, seed], prompts, args) for seed in args.seeds]
        results[way] = [judge_steps(judge, original, one) for one in drawn]
        pictured[way] = drawn[0]
        print(f"judged {WAYS[way]}", flush=True)
    write_results(args, results)
    write_picture(args, original, pictured)
    print((args.output_dir / "table.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main(parse_args())
