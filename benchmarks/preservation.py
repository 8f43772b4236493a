"""Does SPF-Portrait keep a portrait? One run makes the README's table: `python benchmarks/preservation.py`.

For every toy target and training seed it trains a plain LoRA, stage 1 alone and SPF-Portrait through the real training
script, draws the same prompts from the same noise with each, and judges the portraits against the original model's.
The controls are plain LoRA at equal steps and the same LoRAs turned down, since a weaker LoRA pollutes less too. What
is finished is not trained or drawn again, so an interrupted run goes on where it stopped.

`--evaluate FOLDER` judges one LoRA instead, and prints a row.

Source: [ours].
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import shlex
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from PIL import Image, ImageDraw, ImageFont


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import toy_portraits.judge  # noqa: E402
from toy_portraits.judge import PROBE_FOLDER, PortraitJudge, ToyPrompt, base_prompts  # noqa: E402
from toy_portraits.recipe import BASE_MODEL, FLAGS, training_flags  # noqa: E402
from toy_portraits.world import SIZE, TARGETS  # noqa: E402


WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
UNWATCHED = ("--num_validation_images", "0", "--report_to", "none")
STRENGTHS = (1.0, 0.75, 0.5, 0.25)
PICTURED = 6  # prompts in the comparison pictures
RESAMPLES = 1000


@dataclass(frozen=True)
class Run:
    """One way to train, and the strengths it is judged at.

    Attributes:
        label: its name in the tables.
        flags: of the training script, beyond those that all runs share.
        strengths: scales of the LoRA at inference.
        ablation: trained for one target only.
        continues: whether it starts from stage 1's LoRA; otherwise it is one stage of as many steps as both.
    """

    label: str
    flags: str = ""
    strengths: tuple[float, ...] = (1.0,)
    ablation: bool = False
    continues: bool = True


# Half a batch for what adds a row of its own to each training portrait's: all see as many rows with gradient.
HALF_BATCH = f"--train_batch_size {int(FLAGS[FLAGS.index('--train_batch_size') + 1]) // 2}"
# Portraits are all that this world has; none of these says or shows what a training set does.
UNRELATED = shlex.join(
    ["", "a man, black hair, a green jacket, a gray background", "a woman, gray hair, a white jacket, glasses"]
)
RUNS = {
    "plain": Run("plain LoRA", strengths=STRENGTHS, continues=False),
    "stage1": Run("stage 1 alone", strengths=STRENGTHS, continues=False),
    "adalora": Run("AdaLoRA", "--use_adalora", continues=False),
    "dora": Run("DoRA", "--use_dora", continues=False),
    "prior": Run("prior preservation", f"--preservation prior {HALF_BATCH}", continues=False),
    "dop": Run("differential output preservation", f"--preservation dop {HALF_BATCH}", continues=False),
    "cat": Run(
        "contrastive adapter training",
        f"--preservation cat --unrelated_prompts {UNRELATED} {HALF_BATCH}",
        continues=False,
    ),
    "mask": Run("masked loss, true masks", "--preservation mask", continues=False),
    "composed": Run("SPF-Portrait, composed", "--stage2_objective composed"),
    "composed_mask": Run("composed, true masks", "--stage2_objective composed"),
    "paper": Run("SPF-Portrait, paper", f"--stage2_objective paper {HALF_BATCH}"),
    "no_sfcm": Run("paper, without SFCM", f"--stage2_objective paper {HALF_BATCH} --sfcm_mode none", ablation=True),
    "no_fine": Run(
        "paper, without fine-grained", f"--stage2_objective paper {HALF_BATCH} --lambda_fine 0", ablation=True
    ),
    "no_text": Run(
        "paper, without text-consistent", f"--stage2_objective paper {HALF_BATCH} --lambda_text 0", ablation=True
    ),
    "no_enhancement": Run(
        "paper, without enhancement", f"--stage2_objective paper {HALF_BATCH} --enhancement_loss none", ablation=True
    ),
}
CONTROLS = ("plain", "stage1")
METHODS = ("composed", "paper")
ORIGINAL = "original model"
HEADINGS = {
    "response": "response",
    "response_pixels": "response, pixel rule",
    "change_outside": "change outside",
    "excess": "excess pollution",
    "kept_skin": "skin kept",
    "kept": "all factors kept",
    "head_shift": "head shift, px",
    "base_change": "change, base prompt alone",
    "leak": "leak",
}


@dataclass(frozen=True)
class DrawSettings:
    """How portraits are drawn for the judge; the same for every row of a table."""

    num_prompts: int = 96
    prompt_seed: int = 90002
    num_inference_steps: int = 15
    guidance_scale: float = 4.0
    device: str = "cpu"
    batch_size: int = 16


@dataclass(frozen=True)
class Originals:
    """The original model's portraits of a target's prompts, from the noise every other model starts from."""

    target_name: str
    prompts: list[ToyPrompt]
    base_images: np.ndarray
    full_images: np.ndarray


@dataclass(frozen=True)
class EvaluationJob:
    """A trained LoRA at a strength, and where the row it makes belongs."""

    target_name: str
    run_name: str
    seed: int
    strength: float
    lora_path: Path


# ------------------------------------------------------------------------------------------------------------- drawing


def load_pipeline(settings: DrawSettings) -> StableDiffusionPipeline:
    """The toy base model with its DDIM sampler, silent."""
    diffusers_logging.disable_progress_bar()
    pipeline = StableDiffusionPipeline.from_pretrained(BASE_MODEL, dtype=torch.float32).to(settings.device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise_of_prompts(settings: DrawSettings) -> torch.Tensor:
    """(num_prompts, 4, 16, 16): prompt i has its own seed, so that its portrait is the same however many are drawn."""
    generators = [torch.Generator().manual_seed(settings.prompt_seed * 1000 + i) for i in range(settings.num_prompts)]
    return torch.stack([torch.randn(4, SIZE // 4, SIZE // 4, generator=generator) for generator in generators])


def draw(pipeline: StableDiffusionPipeline, prompts: Sequence[str], settings: DrawSettings) -> np.ndarray:
    """Draw one portrait a prompt.

    Args:
        pipeline: the pipeline, with whatever LoRA is active; it is active in both branches of the guidance.
        prompts: `settings.num_prompts` prompts.
        settings: sampler settings and the seed of the noise.

    Returns:
        (B, 64, 64, 3) uint8.
    """
    latents = noise_of_prompts(settings)
    images = []
    for start in range(0, len(prompts), settings.batch_size):
        stop = start + settings.batch_size
        images.append(
            pipeline(
                list(prompts[start:stop]),
                latents=latents[start:stop].to(settings.device),
                num_inference_steps=settings.num_inference_steps,
                guidance_scale=settings.guidance_scale,
                output_type="np",
            ).images
        )
    return np.rint(np.concatenate(images) * 255).astype(np.uint8)


def file_digest(*paths: Path) -> str:
    """A short fingerprint of some files' contents."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def base_model_digest() -> str:
    return file_digest(*sorted(BASE_MODEL.glob("*/*.safetensors")), *sorted(BASE_MODEL.glob("*/*config.json")))


def judge_digest() -> str:
    return file_digest(Path(toy_portraits.judge.__file__), PROBE_FOLDER / "probe.safetensors")


def cached_arrays(folder: Path, key: object, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Arrays from disk, or made and written there; `key` is everything they depend on."""
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    path = folder / f"{name}.npz"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / f"{name}.{os.getpid()}.tmp.npz"
        np.savez_compressed(unfinished, **make())
        unfinished.replace(path)
    with np.load(path) as arrays:
        return dict(arrays)


def load_originals(
    pipeline: StableDiffusionPipeline, target_name: str, settings: DrawSettings, cache_dir: Path
) -> Originals:
    """The original model's portraits with base and full prompts, drawn once and kept in `cache_dir`."""
    prompts = base_prompts(TARGETS[target_name], settings.num_prompts, settings.prompt_seed)
    arrays = cached_arrays(
        cache_dir,
        ["original", target_name, asdict(settings), base_model_digest()],
        lambda: {
            "base_images": draw(pipeline, [prompt.base_prompt for prompt in prompts], settings),
            "full_images": draw(pipeline, [prompt.full_prompt for prompt in prompts], settings),
        },
    )
    return Originals(target_name, prompts, **arrays)


# ---------------------------------------------------------------------------------------------------------- evaluation


def judge_images(
    judge: PortraitJudge, originals: Originals, full_images: np.ndarray, base_images: np.ndarray
) -> dict[str, np.ndarray]:
    """All measures of a model, (num_prompts,) each.

    Args:
        judge: the judge.
        originals: the original model's portraits.
        full_images: the model's portraits of the full prompts, from the same noise.
        base_images: its portraits of the base prompts.

    Returns:
        `PortraitJudge.compare` of the full prompts' portraits, and of the base prompts' `base_change` (whole picture),
        `base_kept`, `leak` and `leak_pixels` (the target unasked).
    """
    target = TARGETS[originals.target_name]
    measures = judge.compare(originals.base_images, full_images, target)
    alone = judge.compare(originals.base_images, base_images, target)
    measures |= {"base_change": alone["change"], "base_kept": alone["kept"]}
    return measures | {"leak": alone["response"], "leak_pixels": alone["response_pixels"]}


def evaluate_original(judge: PortraitJudge, originals: Originals) -> dict[str, np.ndarray]:
    """The measures of the original model itself: what naming the target moves without any training."""
    return judge_images(judge, originals, originals.full_images, originals.base_images)


def evaluate_lora(
    pipeline: StableDiffusionPipeline,
    judge: PortraitJudge,
    originals: Originals,
    lora_path: Path,
    strength: float,
    settings: DrawSettings,
    cache_dir: Path,
) -> dict[str, np.ndarray]:
    """Draw with a LoRA and judge.

    Args:
        pipeline: the base model; the LoRA is taken out again.
        judge: the judge.
        originals: the original model's portraits, drawn with the same settings.
        lora_path: folder with `pytorch_lora_weights.safetensors`.
        strength: scale of the LoRA, in both branches of the guidance.
        settings: sampler settings.
        cache_dir: what was drawn and judged before with the same weights and settings is read from here.

    Returns:
        The measures of `judge_images`, (num_prompts,) each, and "pictures": the first portraits of the full prompts.

    Raises:
        FileNotFoundError: the folder has no LoRA.
    """
    weights = Path(lora_path) / WEIGHTS_NAME
    if not weights.is_file():
        raise FileNotFoundError(f"{weights} does not exist: not a LoRA the training script wrote.")

    def make() -> dict[str, np.ndarray]:
        pipeline.unet.load_lora_adapter(str(lora_path), weight_name=WEIGHTS_NAME, adapter_name="judged", prefix="unet")
        try:
            pipeline.unet.set_adapters("judged", strength)
            full_images = draw(pipeline, [prompt.full_prompt for prompt in originals.prompts], settings)
            base_images = draw(pipeline, [prompt.base_prompt for prompt in originals.prompts], settings)
        finally:
            pipeline.unet.unload_lora()
        return judge_images(judge, originals, full_images, base_images) | {"pictures": full_images[:PICTURED]}

    digests = [base_model_digest(), file_digest(weights), judge_digest()]
    return cached_arrays(cache_dir, ["lora", originals.target_name, strength, asdict(settings), digests], make)


@lru_cache(maxsize=1)
def _tools(settings: DrawSettings) -> tuple[StableDiffusionPipeline, PortraitJudge]:
    return load_pipeline(settings), PortraitJudge.from_pretrained()


def _evaluate_job(job: EvaluationJob, settings: DrawSettings, cache_dir: Path) -> dict[str, np.ndarray]:
    pipeline, judge = _tools(settings)
    originals = load_originals(pipeline, job.target_name, settings, cache_dir)
    return evaluate_lora(pipeline, judge, originals, job.lora_path, job.strength, settings, cache_dir)


# ------------------------------------------------------------------------------------------------------------ training


def run_folder(args: argparse.Namespace, target_name: str, run_name: str, seed: int) -> Path:
    return args.output_dir / "runs" / target_name / f"{run_name}-seed{seed}"


def training_command(args: argparse.Namespace, target_name: str, run_name: str, seed: int) -> list[str]:
    """The command line of one training, without its output folder.

    What has one stage gets as many steps as both together. What has a second stage starts it from stage 1's LoRA of
    the same target and seed, so that stage 1 is trained once.
    """
    command = [*training_flags(target_name), "--seed", str(seed), *UNWATCHED]
    if run_name == "stage1":
        command += ["--stage1_steps", str(args.stage1_steps), "--stage2_steps", "0"]
    elif not RUNS[run_name].continues:
        command += ["--stage1_steps", str(args.stage1_steps + args.stage2_steps), "--stage2_steps", "0"]
    else:
        stage1 = run_folder(args, target_name, "stage1", seed)
        command += ["--stage1_steps", "0", "--stage1_lora_path", str(stage1), "--stage2_steps", str(args.stage2_steps)]
    return command + shlex.split(RUNS[run_name].flags) + shlex.split(args.train_args)


def train(args: argparse.Namespace, target_name: str, run_name: str, seed: int) -> Path:
    """Train one LoRA through the real script, in a process of its own, unless it is there already.

    Flags and the weights it starts from are compared with those of a LoRA that is there; the script's code is not.

    Returns:
        Its folder.

    Raises:
        ValueError: the folder holds a LoRA of other flags, or from another base model or stage 1.
        RuntimeError: the training script failed.
    """
    folder = run_folder(args, target_name, run_name, seed)
    command = training_command(args, target_name, run_name, seed)
    recipe = {"command": command, "base_model": base_model_digest()}
    if RUNS[run_name].continues:
        recipe["stage1"] = file_digest(run_folder(args, target_name, "stage1", seed) / WEIGHTS_NAME)
    return train_into(folder, recipe)


def train_into(folder: Path, recipe: dict) -> Path:
    """Train into a folder, unless the LoRA of this very recipe is there already.

    Args:
        folder: where the LoRA goes.
        recipe: `command`, the flags but for the output folder, and whatever else the LoRA depends on.

    Returns, raises: as `train`.
    """
    note = folder / "benchmark.json"
    if (folder / WEIGHTS_NAME).is_file() and note.is_file():
        found = json.loads(note.read_text(encoding="utf-8"))
        if {name: found[name] for name in recipe} != recipe:
            raise ValueError(
                f"{folder} was trained with other flags or from another model: remove it or give another --output_dir."
            )
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    start = time.time()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with (folder / "training.log").open("w", encoding="utf-8") as log:
        script = [sys.executable, str(ROOT / "train_spf_portrait_lora.py"), *recipe["command"]]
        # An interrupted training left a checkpoint to go on from; without one it starts from the beginning.
        script += ["--output_dir", str(folder), "--resume_from_checkpoint", "latest"]
        code = subprocess.run(script, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=ROOT).returncode
    if code != 0 or not (folder / WEIGHTS_NAME).is_file():
        raise RuntimeError(f"The training of {folder} failed with exit code {code}; see {folder / 'training.log'}.")
    note.write_text(json.dumps(recipe | {"seconds": time.time() - start}, indent=2) + "\n", encoding="utf-8")
    print(f"trained {folder.parent.name}, {folder.name} in {time.time() - start:.0f} s", flush=True)
    return folder


def chosen_runs(args: argparse.Namespace, target_name: str) -> list[str]:
    """The names of a target's runs, in the table's order."""
    return [
        name for name in RUNS if name in args.runs and (not RUNS[name].ablation or target_name == args.ablation_target)
    ]


def train_all(args: argparse.Namespace) -> None:
    """Train everything, `--workers` at a time: first what starts from nothing, then what starts from stage 1."""
    first, second = [], []
    for seed in args.seeds:
        for target_name in args.targets:
            names = chosen_runs(args, target_name)
            continued = [name for name in names if RUNS[name].continues]
            starting = [name for name in names if not RUNS[name].continues]
            if continued and "stage1" not in starting:
                starting.insert(0, "stage1")
            first += [(target_name, name, seed) for name in starting]
            second += [(target_name, name, seed) for name in continued]
    with ThreadPoolExecutor(args.workers) as pool:
        for wave in (first, second):
            list(pool.map(lambda item: train(args, *item), wave))


def evaluate_all(args: argparse.Namespace, settings: DrawSettings) -> dict[EvaluationJob, dict[str, np.ndarray]]:
    """Draw and judge every run at every strength, in `--workers` processes of one thread."""
    jobs = [
        EvaluationJob(target_name, name, seed, strength, run_folder(args, target_name, name, seed))
        for target_name in args.targets
        for name in chosen_runs(args, target_name)
        for seed in args.seeds
        for strength in RUNS[name].strengths
    ]
    cache_dir = args.output_dir / "cache"
    results = {}
    with ProcessPoolExecutor(args.workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        futures = {job: pool.submit(_evaluate_job, job, settings, cache_dir) for job in jobs}
        for job, future in futures.items():
            results[job] = future.result()
            what = f"{job.target_name}, {job.run_name}, seed {job.seed}, strength {job.strength:g}"
            print(f"judged {what} ({len(results)}/{len(jobs)})", flush=True)
    return results


# ---------------------------------------------------------------------------------------------------------- statistics


@dataclass(frozen=True)
class Row:
    """One row of a target's table: per measure an array (training seeds, prompts)."""

    label: str
    run_name: str
    strength: float
    measures: dict[str, np.ndarray]

    def by_prompt(self, name: str) -> np.ndarray:
        """(prompts,): a measure's mean over training seeds, the unit that standard errors count."""
        return self.measures[name].mean(axis=0)


def make_rows(target_name: str, original: dict[str, np.ndarray], results: dict) -> list[Row]:
    """The rows of a target, the original model first; adds `excess`, the change beyond the original model's own."""
    groups: dict[tuple[str, float], list[dict[str, np.ndarray]]] = {}
    for job, measures in results.items():
        if job.target_name == target_name:
            groups.setdefault((job.run_name, job.strength), []).append(measures)
    rows = [Row(ORIGINAL, "original", 0.0, {name: values[None] for name, values in original.items()})]
    for (run_name, strength), per_seed in groups.items():
        label = RUNS[run_name].label + ("" if len(RUNS[run_name].strengths) == 1 else f", strength {strength:g}")
        rows.append(Row(label, run_name, strength, {name: np.stack([m[name] for m in per_seed]) for name in original}))
    for row in rows:
        row.measures["excess"] = row.measures["change_outside"] - original["change_outside"]
    return rows


def standard_error(values: np.ndarray) -> float:
    """Of the mean of independent values; NaN for a single one."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


def summarise(row: Row) -> dict[str, dict[str, float]]:
    """Per measure the mean, its standard error (prompts as clusters) and the spread of the training seeds' means."""
    summary = {}
    for name, values in row.measures.items():
        seeds = values.mean(axis=1)
        summary[name] = {
            "mean": float(values.mean()),
            "standard_error": standard_error(row.by_prompt(name)),
            "seed_spread": float(seeds.std(ddof=1)) if len(seeds) > 1 else float("nan"),
        }
    return summary


def curve_change_at(response: float, strengths: np.ndarray, responses: np.ndarray, changes: np.ndarray) -> float:
    """The least change at which a LoRA turned down still responds as asked.

    Args:
        response: the response to match.
        strengths: (K,) ascending, from 0 (the original model).
        responses: (K,) the responses there, linear in between.
        changes: (K,) the changes there.

    Returns:
        The least change over the strengths that reach the response; if none does, the change where the response is
        highest, which flatters the LoRA.
    """
    grid = np.linspace(strengths[0], strengths[-1], 201)
    reached, change = np.interp(grid, strengths, responses), np.interp(grid, strengths, changes)
    enough = reached >= response
    return float(change[enough].min() if enough.any() else change[reached.argmax()])


def curve_of(rows: Iterable[Row], run_name: str) -> list[Row]:
    """The original model and a run's rows, by ascending strength."""
    return sorted((row for row in rows if row.run_name in ("original", run_name)), key=lambda row: row.strength)


def distance_below_curve(
    row: Row, curve: Sequence[Row], rng: np.random.Generator
) -> dict[str, float | list[float] | bool]:
    """How far a run lies below a strength curve: the curve's change outside at the run's response minus its own.

    Args:
        row: the run.
        curve: as `curve_of` returns it.
        rng: of the bootstrap over prompts, in which run and curve are resampled together.

    Returns:
        The distance (positive: less pollution at the same response), its standard error, their quotient, the distance
        per training seed, and whether the response lies beyond all of the curve.
    """
    strengths = np.array([point.strength for point in curve])
    responses = np.stack([point.by_prompt("response") for point in curve])
    changes = np.stack([point.by_prompt("change_outside") for point in curve])

    def distance(own_response: float, own_change: float, index: np.ndarray | slice) -> float:
        at = curve_change_at(own_response, strengths, responses[:, index].mean(1), changes[:, index].mean(1))
        return at - own_change

    response, change = row.by_prompt("response"), row.by_prompt("change_outside")
    samples = rng.integers(0, len(response), (RESAMPLES, len(response)))
    error = float(np.std([distance(response[i].mean(), change[i].mean(), i) for i in samples], ddof=1))
    estimate = distance(response.mean(), change.mean(), slice(None))
    per_seed = zip(row.measures["response"], row.measures["change_outside"])
    return {
        "distance": estimate,
        "standard_error": error,
        "standard_errors_below": estimate / error if error > 0 else float("nan"),
        "per_seed": [distance(r.mean(), c.mean(), slice(None)) for r, c in per_seed],
        "beyond_the_curve": bool(response.mean() > responses.mean(axis=1).max()),
    }


def verdicts(rows: list[Row], seed: int = 0) -> dict[str, dict]:
    """Each SPF-Portrait row against the controls that were run.

    Returns:
        By run name: ratios to plain LoRA at full strength, and the distance below each control's strength curve.
    """
    full_strength = {row.run_name: row for row in rows if row.strength == 1.0}
    found = {}
    for name in METHODS:
        if name not in full_strength:
            continue
        row, verdict = full_strength[name], {}
        if "plain" in full_strength:
            for measure in ("response", "excess", "base_change"):
                plain = full_strength["plain"].measures[measure].mean()
                verdict[f"{measure}_ratio"] = float(row.measures[measure].mean() / plain) if plain else float("nan")
        for control in CONTROLS:
            if control in full_strength:
                rng = np.random.default_rng(seed)
                verdict[f"below_{control}_curve"] = distance_below_curve(row, curve_of(rows, control), rng)
        found[name] = verdict
    return found


def ablation_differences(rows: list[Row]) -> dict[str, dict[str, dict[str, float]]]:
    """Each ablation minus the paper's objective, prompt by prompt: mean difference and its standard error."""
    full_strength = {row.run_name: row for row in rows if row.strength == 1.0}
    found = {}
    for name, row in full_strength.items():
        if "paper" in full_strength and name in RUNS and RUNS[name].ablation:
            pairs = {m: row.by_prompt(m) - full_strength["paper"].by_prompt(m) for m in HEADINGS}
            found[name] = {m: {"mean": float(d.mean()), "standard_error": standard_error(d)} for m, d in pairs.items()}
    return found


# ------------------------------------------------------------------------------------------------------------- writing


def number(value: float, error: float | None = None, signed: bool = False) -> str:
    """A mean for a table, with its standard error."""
    text = f"{value:{'+' if signed else ''}.2f}"
    return text if error is None or np.isnan(error) else f"{text} ± {error:.2f}"


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def verdict_table(found: dict[str, dict]) -> str:
    """The derived verdicts of one target as markdown."""
    lines = []
    for name, verdict in found.items():
        line = [RUNS[name].label]
        line += [
            number(verdict[k]) if k in verdict else "-"
            for k in ("response_ratio", "excess_ratio", "base_change_ratio")
        ]
        for control in CONTROLS:
            below = verdict.get(f"below_{control}_curve")
            if below is None:
                line += ["-"]
                continue
            per_seed = ", ".join(number(value) for value in below["per_seed"])
            beyond = "; responds more than any strength" if below["beyond_the_curve"] else ""
            errors = f"{below['standard_errors_below']:.1f} standard errors"
            line += [f"{number(below['distance'], below['standard_error'])} ({errors}; seeds {per_seed}{beyond})"]
        lines.append(line)
    header = [
        "",
        "response / plain",
        "excess / plain",
        "base-prompt change / plain",
        "below plain's strength curve",
        "below stage 1's",
    ]
    return markdown_table(header, lines)


def target_section(target_name: str, rows: list[Row]) -> str:
    """All tables of one target as markdown."""
    summaries = [(row.label, summarise(row)) for row in rows]
    full = [[label, *(number(s[m]["mean"], s[m]["standard_error"]) for m in HEADINGS)] for label, s in summaries]
    parts = [f'## "{TARGETS[target_name].prompt}"\n\n', markdown_table(["", *HEADINGS.values()], full)]
    if found := verdicts(rows):
        parts += ["\n", verdict_table(found)]
    if differences := ablation_differences(rows):
        lines = [
            [RUNS[name].label, *(number(d[m]["mean"], d[m]["standard_error"], signed=True) for m in HEADINGS)]
            for name, d in differences.items()
        ]
        parts += [
            "\nDifference to the paper's objective, paired by prompt:\n\n",
            markdown_table(["", *HEADINGS.values()], lines),
        ]
    factors = [name for name in summaries[0][1] if name.startswith("kept_")]
    agreement = [[label, *(number(s[m]["mean"], s[m]["standard_error"]) for m in factors)] for label, s in summaries]
    parts += ["\nAgreement with the original model's portrait, by factor:\n\n"]
    parts += [markdown_table(["", *(name.removeprefix("kept_").replace("_", " ") for name in factors)], agreement)]
    spread = [
        [label, *(number(s[m]["seed_spread"]) for m in HEADINGS)]
        for label, s in summaries
        if not np.isnan(s["response"]["seed_spread"])
    ]
    if spread:
        parts += [
            "\nStandard deviation of the training seeds' means:\n\n",
            markdown_table(["", *HEADINGS.values()], spread),
        ]
    return "".join(parts)


def explanation(args: argparse.Namespace) -> str:
    """What the table's numbers are, and the settings they were made with."""
    total = args.stage1_steps + args.stage2_steps
    steps = f"{args.stage1_steps} + {args.stage2_steps} training steps (plain LoRA: {total})"
    settings = (
        f"{args.num_prompts} prompts (seed {args.prompt_seed}), {len(args.seeds)} training seed(s), "
        f"{args.num_inference_steps} DDIM steps, guidance scale {args.guidance_scale:g}, {steps}"
    )
    return f"""\
Settings: {settings}. Every row draws the same prompts from the same noise; the LoRA is active in both branches of the
guidance.

Against the original model's portrait of the base prompt: *response* is the share of the full prompts' portraits that
show the target, by the probe's classifier and by a pixel rule; *change outside* the mean absolute difference (0-255)
outside the target's region; *excess pollution* that minus the original model's own with the full prompt; *kept* the
agreement of the probe's factors. With the base prompt alone, *change* is over the whole picture, and *leak* the share
that shows the target unasked. Standard errors are over prompts, after the mean over training seeds. *Below the
strength curve*: the least change outside at which the LoRA turned down still responds as much, minus the run's own;
its standard error is from {RESAMPLES} paired resamples of the prompts.
"""


def without_nan(value: object) -> object:
    """The same for JSON, which has no NaN: None instead."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and np.isnan(value) else value


def training_seconds(args: argparse.Namespace, target_name: str, run_name: str) -> float | None:
    """Mean wall time of a run's trainings, `--workers` of which shared the machine."""
    if run_name not in RUNS:
        return None
    notes = [run_folder(args, target_name, run_name, seed) / "benchmark.json" for seed in args.seeds]
    return float(np.mean([json.loads(note.read_text(encoding="utf-8"))["seconds"] for note in notes]))


def write_results(args: argparse.Namespace, tables: dict[str, list[Row]]) -> None:
    """Write results.json, results.csv and table.md."""
    results, lines = {}, []
    for target_name, rows in tables.items():
        entries = []
        for row in rows:
            seconds = training_seconds(args, target_name, row.run_name)
            entry = {"label": row.label, "run": row.run_name, "strength": row.strength, "training_seconds": seconds}
            entries.append(entry | {"measures": summarise(row)})
            for measure, values in summarise(row).items():
                lines.append({"target": target_name, **entry, "measure": measure, **values})
        results[target_name] = {"rows": entries, "verdicts": verdicts(rows), "ablations": ablation_differences(rows)}
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    document = {
        "settings": settings,
        "training_flags": " ".join(FLAGS),
        "base_model": base_model_digest(),
        "targets": results,
    }
    text = json.dumps(without_nan(document), indent=2, allow_nan=False)
    (args.output_dir / "results.json").write_text(text + "\n", encoding="utf-8")
    with (args.output_dir / "results.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    sections = [explanation(args), *("\n" + target_section(name, rows) for name, rows in tables.items())]
    (args.output_dir / "table.md").write_text("".join(sections), encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------ pictures


def comparison_picture(originals: Originals, columns: dict[str, np.ndarray], scale: int = 2) -> Image.Image:
    """The first prompts' portraits, a row a prompt.

    Args:
        originals: the original model's portraits, the first two columns.
        columns: further columns, (B, 64, 64, 3) uint8 by heading.
        scale: pixels a portrait's pixel takes up.
    """
    columns = {
        "original, base prompt": originals.base_images,
        "original, full prompt": originals.full_images,
        **columns,
    }
    count = min(PICTURED, *(len(images) for images in columns.values()))
    side, text_width, head = SIZE * scale, 150, 34
    gap = 4
    picture = Image.new("RGB", (text_width + len(columns) * (side + gap), head + count * (side + gap)), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size=12)
    for place, (heading, images) in enumerate(columns.items()):
        left = text_width + place * (side + gap)
        pen.multiline_text((left, 2), textwrap.fill(heading, 20), fill="black", font=font)
        for row in range(count):
            portrait = Image.fromarray(images[row]).resize((side, side), Image.Resampling.NEAREST)
            picture.paste(portrait, (left, head + row * (side + gap)))
    for row in range(count):
        text = textwrap.fill(originals.prompts[row].full_prompt, 22)
        pen.multiline_text((4, head + row * (side + gap) + 4), text, fill="black", font=font)
    return picture


PLOT_COLORS = {"plain": (200, 60, 40), "stage1": (222, 150, 30), "composed": (30, 90, 200), "paper": (30, 150, 90)}


@dataclass(frozen=True)
class Series:
    """Points of a plot: (response, change, their standard errors) each, and whether they are joined as a curve."""

    label: str
    color: tuple[int, int, int]
    points: list[tuple[float, float, float, float]]
    joined: bool = False


def series_point(row: Row) -> tuple[float, float, float, float]:
    """A row's place in the plot, with standard errors."""
    names = ("response", "change_outside")
    means = [float(row.measures[name].mean()) for name in names]
    return (*means, *(standard_error(row.by_prompt(name)) for name in names))


def response_plane(title: str, series: list[Series], size: tuple[int, int] = (400, 340)) -> Image.Image:
    """Response across, change outside up: curves of joined points, and single points with error bars."""
    scale = 2  # drawn at twice the size and shrunk, since PIL's lines are not antialiased
    panel = Image.new("RGB", (size[0] * scale, size[1] * scale), "white")
    pen = ImageDraw.Draw(panel)
    font = ImageFont.load_default(size=12 * scale)
    left, right, top, bottom = 46 * scale, (size[0] - 14) * scale, 30 * scale, (size[1] - 42) * scale
    highest = 1.1 * max(change for line in series for _, change, _, _ in line.points)
    place_x = lambda response: left + (right - left) * response  # noqa: E731
    place_y = lambda change: bottom - (bottom - top) * change / highest  # noqa: E731

    pen.text((left, 6 * scale), f"{title}: change outside against response", fill="black", font=font)
    pen.text(((left + right) / 2, bottom + 30 * scale), "response", fill="black", font=font, anchor="mm")
    for tick in np.linspace(0, 1, 6):
        pen.line((place_x(tick), top, place_x(tick), bottom), fill=(232, 232, 232), width=scale)
        pen.text((place_x(tick), bottom + 10 * scale), f"{tick:.1f}", fill=(90, 90, 90), font=font, anchor="mm")
    for tick in np.arange(0, highest, 2 if highest < 12 else 4):
        pen.line((left, place_y(tick), right, place_y(tick)), fill=(232, 232, 232), width=scale)
        pen.text((left - 6 * scale, place_y(tick)), f"{tick:.0f}", fill=(90, 90, 90), font=font, anchor="rm")

    for place, line in enumerate(series):
        middle = [(place_x(response), place_y(change)) for response, change, _, _ in line.points]
        if line.joined and len(middle) > 1:
            pen.line(middle, fill=line.color, width=2 * scale)
        radius = (3 if line.joined else 5) * scale
        for (x, y), (_, _, wide, tall) in zip(middle, line.points):
            if not line.joined and not np.isnan(wide):
                wide, tall = (right - left) * wide, (bottom - top) * tall / highest
                pen.line((x - wide, y, x + wide, y), fill=line.color, width=scale)
                pen.line((x, y - tall, x, y + tall), fill=line.color, width=scale)
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=line.color)
        pen.text((left + 8 * scale, top + (8 + 15 * place) * scale), line.label, fill=line.color, font=font)
    return panel.resize(size, Image.Resampling.LANCZOS)


def side_by_side(panels: Sequence[Image.Image]) -> Image.Image:
    """Panels of one height in a row."""
    plot = Image.new("RGB", (sum(panel.width for panel in panels), panels[0].height), "white")
    for place, panel in enumerate(panels):
        plot.paste(panel, (place * panels[0].width, 0))
    return plot


def plot_panel(title: str, rows: list[Row]) -> Image.Image:
    """The controls' strength curves, which start at the original model, and SPF-Portrait's points."""
    series = []
    for name, color in PLOT_COLORS.items():
        points = curve_of(rows, name) if name in CONTROLS else [row for row in rows if row.run_name == name]
        if any(row.run_name == name for row in points):
            series.append(Series(RUNS[name].label, color, [series_point(row) for row in points], name in CONTROLS))
    return response_plane(title, series)


def write_pictures(
    args: argparse.Namespace, tables: dict[str, list[Row]], results: dict, originals: dict[str, Originals]
) -> None:
    """Write the comparison picture of each target (first training seed), and the plot of all."""
    for target_name in tables:
        columns = {
            RUNS[job.run_name].label: measures["pictures"]
            for job, measures in results.items()
            if job.target_name == target_name and job.strength == 1.0 and job.seed == args.seeds[0]
            if job.run_name in ("plain", *METHODS)
        }
        comparison_picture(originals[target_name], columns).save(
            args.output_dir / f"comparison_{target_name}.png", optimize=True
        )
    panels = [plot_panel(f'"{TARGETS[name].prompt}"', rows) for name, rows in tables.items()]
    side_by_side(panels).save(args.output_dir / "strength_curves.png", optimize=True)


# -------------------------------------------------------------------------------------------------------- command line


def draw_settings(args: argparse.Namespace) -> DrawSettings:
    return DrawSettings(
        args.num_prompts, args.prompt_seed, args.num_inference_steps, args.guidance_scale, args.device, args.batch_size
    )


def compact_row(label: str, measures: dict[str, np.ndarray]) -> str:
    names = [name for name in HEADINGS if name in measures]
    return f"{label:42s} " + "  ".join(f"{name} {measures[name].mean():.3f}" for name in names)


def evaluate_folders(args: argparse.Namespace) -> None:
    """`--evaluate`: a row for the original model and for each LoRA and strength."""
    settings, cache_dir = draw_settings(args), args.output_dir / "cache"
    pipeline, judge = _tools(settings)
    for target_name in args.targets:
        originals = load_originals(pipeline, target_name, settings, cache_dir)
        original = evaluate_original(judge, originals)
        print(compact_row(f"{target_name}: {ORIGINAL}", original | {"excess": np.zeros(1)}), flush=True)
        for folder in args.evaluate:
            for strength in args.strengths:
                measures = evaluate_lora(pipeline, judge, originals, folder, strength, settings, cache_dir)
                measures["excess"] = measures["change_outside"] - original["change_outside"]
                print(compact_row(f"{target_name}: {folder.name}, strength {strength:g}", measures), flush=True)


def run_benchmark(args: argparse.Namespace) -> None:
    """Train, judge, and write the tables and pictures."""
    settings = draw_settings(args)
    pipeline, judge = _tools(settings)
    train_all(args)
    # before the pool starts, so that its processes find the original model's portraits drawn
    originals = {name: load_originals(pipeline, name, settings, args.output_dir / "cache") for name in args.targets}
    results = evaluate_all(args, settings)
    tables = {name: make_rows(name, evaluate_original(judge, originals[name]), results) for name in args.targets}
    write_results(args, tables)
    write_pictures(args, tables, results, originals)
    print((args.output_dir / "table.md").read_text(encoding="utf-8"))


def add_drawing_flags(parser: argparse.ArgumentParser, prompt_seed: int = 90002) -> None:
    """The flags that `draw_settings` reads."""
    parser.add_argument("--num_prompts", type=int, default=96)
    parser.add_argument(
        "--prompt_seed", type=int, default=prompt_seed, help="Of prompts and noise; nothing was chosen on the default."
    )
    parser.add_argument("--num_inference_steps", type=int, default=15)
    parser.add_argument("--guidance_scale", type=float, default=4.0)
    parser.add_argument("--batch_size", type=int, default=16, help="Portraits drawn at a time.")
    parser.add_argument("--device", default="cpu", help="Where portraits are drawn.")


def check_counts(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with the parser's error if something is to be done less than once."""
    for name in ("num_prompts", "num_inference_steps", "stage1_steps", "stage2_steps", "workers", "batch_size"):
        if getattr(args, name, 1) < 1:
            parser.error(f"--{name} must be at least 1")


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir", type=Path, default=ROOT / "runs" / "preservation", help="LoRAs, caches, tables and pictures."
    )
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="Toy targets.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[101, 102, 103], help="Training seeds.")
    parser.add_argument(
        "--runs", nargs="+", choices=RUNS, default=list(RUNS), help="Which rows; the original model always is one."
    )
    parser.add_argument(
        "--ablation_target", choices=TARGETS, default="blonde_hair", help="The target of the ablations."
    )
    parser.add_argument("--stage1_steps", type=int, default=120)
    parser.add_argument("--stage2_steps", type=int, default=120)
    parser.add_argument("--train_args", default="", help="Further flags of the training script, in one string.")
    parser.add_argument("--workers", type=int, default=2, help="Processes of one thread each.")
    add_drawing_flags(parser)
    parser.add_argument(
        "--evaluate", nargs="+", type=Path, metavar="FOLDER", help="Only judge these LoRAs; train nothing."
    )
    parser.add_argument("--strengths", nargs="+", type=float, default=[1.0], help="Strengths for --evaluate.")
    args = parser.parse_args(input_args)
    check_counts(parser, args)
    return args


def main(args: argparse.Namespace) -> None:
    # one thread here as in every other process: the same rounding, and no threads waiting for each other
    torch.set_num_threads(1)
    args.output_dir = args.output_dir.resolve()
    if args.evaluate is not None:
        evaluate_folders(args)
    else:
        run_benchmark(args)


if __name__ == "__main__":
    main(parse_args())
