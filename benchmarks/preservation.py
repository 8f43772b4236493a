"""Does SPF-Portrait keep a portrait, and what else does? `python benchmarks/preservation.py`.

For every toy target and training seed it trains LoRAs in all the ways of `RUNS` through the real training script, at
equal steps and equal gradient samples, draws the same prompts from the same noise with each, with and without SFCM
guidance, and judges the portraits against the original model's. Plain LoRA turned down is a control too, since a
weaker LoRA pollutes less. What is trained with the true regions is a ceiling: nobody but the renderer knows them.
What is finished is not trained or drawn again, so an interrupted run goes on where it stopped.

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
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
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
from benchmarks.plane import Color, Point, Series, front_shares, pareto_front, plane_picture  # noqa: E402
from benchmarks.rows import (  # noqa: E402
    ORIGINAL,
    RESAMPLES,
    Row,
    curve_of,
    distance_below_curve,
    estimate,
    markdown_table,
    number,
    overall_rows,
    paired_difference,
    resamples_of,
    standard_error,
    summarise,
    with_interval,
    without_nan,
)
from evaluation.measures import Estimate  # noqa: E402
from pipeline_spf_portrait import SPFPortraitPipeline  # noqa: E402
from toy_portraits.judge import PROBE_FOLDER, PortraitJudge, ToyPrompt, base_prompts, target_region  # noqa: E402
from toy_portraits.probe import CLASS_FACTORS, PIXEL_FACTORS  # noqa: E402
from toy_portraits.recipe import BASE_MODEL, FLAGS, training_flags  # noqa: E402
from toy_portraits.world import SIZE, TARGETS, ToyTarget, render, sample_factors  # noqa: E402
from training.sharing import PIPELINE_CODE  # noqa: E402


WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
UNWATCHED = ("--num_validation_images", "0", "--report_to", "none")
STRENGTHS = (1.0, 0.75, 0.5, 0.25)
PICTURED = 6  # prompts in the comparison pictures
SFCM_GUIDANCE = 1.0
# What the README recommends with it for a LoRA that was not trained to keep out of the empty branch.
QUIET = {"adapter_in_unconditional": False, "target_scale": 0.75}


@dataclass(frozen=True)
class Run:
    """One way to train, and the strengths it is judged at.

    Attributes:
        label: its name in the tables.
        flags: of the training script, beyond those that all runs share.
        strengths: scales of the LoRA at inference.
        parent: of an ablation, the run that it changes in one thing. An ablation has targets and training seeds of its
            own, and is drawn without guidance alone.
        continues: whether it starts from stage 1's LoRA; otherwise it is one stage of as many steps as both.
        style: color and marker in the plane; None leaves it out.
        quiet: whether it is drawn with `QUIET` under guidance.
    """

    label: str
    flags: str = ""
    strengths: tuple[float, ...] = (1.0,)
    parent: str | None = None
    continues: bool = True
    style: tuple[Color, str] | None = None
    quiet: bool = True


# Half a batch for what adds a row of its own to each training portrait's: all see as many rows with gradient.
HALF_BATCH = f"--train_batch_size {int(FLAGS[FLAGS.index('--train_batch_size') + 1]) // 2}"
# Portraits are all that this world has; none of these says or shows what a training set does.
UNRELATED = shlex.join(
    ["", "a man, black hair, a green jacket, a gray background", "a woman, gray hair, a white jacket, glasses"]
)
COMPOSED, PAPER = "--stage2_objective composed", f"--stage2_objective paper {HALF_BATCH}"
# The methods, in the order of the tables.
WAYS = {
    "plain": Run("plain LoRA", "", STRENGTHS, continues=False, style=((200, 60, 40), "circle")),
    "stage1": Run("stage 1 alone", continues=False, style=((222, 150, 30), "circle")),
    "dora": Run("DoRA", "--use_dora", continues=False, style=((214, 100, 180), "pentagon")),
    "prior": Run(
        "prior preservation", f"--preservation prior {HALF_BATCH}", continues=False,
        style=((110, 110, 20), "square"),
    ),
    "dop": Run(
        "differential output preservation", f"--preservation dop {HALF_BATCH}", continues=False,
        style=((0, 160, 170), "square"),
    ),
    "cat": Run(
        "contrastive adapter training", f"--preservation cat --unrelated_prompts {UNRELATED} {HALF_BATCH}",
        continues=False,
        style=((130, 90, 200), "square"),
    ),
    "mask": Run(
        "masked loss, true masks", "--preservation mask", continues=False, style=((90, 90, 90), "diamond")
    ),
    "composed": Run(
        "SPF-Portrait, composed", f"{COMPOSED} --save_alignment", style=((30, 90, 200), "triangle"), quiet=False
    ),
    "composed_mask": Run("composed, true masks", COMPOSED, style=((150, 190, 240), "diamond"), quiet=False),
    "paper": Run("SPF-Portrait, paper", PAPER, style=((30, 150, 90), "triangle"), quiet=False),
}  # fmt: skip
# What each changes in the flags of its parent.
ABLATIONS = {
    "composed": {
        "c_data": ("aligned on the training portraits", "--alignment_source data"),
        "c_both_sources": ("aligned on both kinds of portraits", "--alignment_source both"),
        "c_sfcm_averaged": ("SFCM of all phrases (averaged)", "--sfcm_mode averaged"),
        "c_sfcm_noise": ("SFCM of the noise difference alone", "--sfcm_mode averaged_noise"),
        "c_sfcm_attention": ("SFCM of the attention alone", "--sfcm_mode attention"),
        "c_sfcm_product": ("SFCM of their product", "--sfcm_mode averaged_product"),
        "c_sfcm_one_noise": ("SFCM of one noise sample", "--sfcm_mode noise"),
        "c_sfcm_paper": ("the paper's SFCM", "--sfcm_mode paper"),
        "c_sfcm_none": ("without SFCM", "--sfcm_mode none"),
        "c_hard": ("hard SFCM", "--sfcm_mode averaged_target_hard"),
        "c_gamma1": ("SFCM to the power of 1", "--sfcm_gamma 1"),
        "c_scale1": ("teacher at strength 1", "--teacher_scale 1"),
        "c_base_weight0": ("the teacher's base prompt not taken away", "--teacher_base_weight 0"),
        "c_init_stage1": ("starting from stage 1's LoRA", "--composed_init stage1"),
        "c_no_base_rows": ("without base-prompt rows", "--base_prompt_share 0"),
        "c_uniform": ("timesteps drawn evenly", "--composed_timestep_power 0"),
        "c_reuse1": ("every target made anew", "--composed_target_reuse 1"),
        "c_single_pass": ("both paths in a single pass", "--dual_path single_pass"),
        # the last of two flags counts
        "both": ("with the paper's losses too", f"--stage2_objective both {HALF_BATCH}"),
    },
    "paper": {
        "no_sfcm": ("without SFCM", "--sfcm_mode none"),
        "no_fine": ("without fine-grained", "--lambda_fine 0"),
        "no_text": ("without text-consistent", "--lambda_text 0"),
        "no_enhancement": ("without enhancement", "--enhancement_loss none"),
        "p_direct": ("direct enhancement", "--enhancement_loss direct"),
        "p_unweighted": ("enhancement not weighed by alpha_bar", "--enhancement_weighting none"),
        "p_no_base": ("predictions of unchanged prompts not kept", "--lambda_base 0"),
        "p_data": ("aligned on the training portraits", "--alignment_source data"),
        "p_sfcm_paper": ("the paper's SFCM", "--sfcm_mode paper"),
        "p_layers": ("one resolution's layers aligned", "--alignment_layers phrase_map"),
        "p_single_pass": ("both paths in a single pass", "--dual_path single_pass"),
    },
}
RUNS = WAYS | {
    name: Run(f"{parent}, {label}", f"{COMPOSED if parent == 'composed' else PAPER} {flags}", parent=parent)
    for parent, changes in ABLATIONS.items()
    for name, (label, flags) in changes.items()
}
OVERALL = "overall"
CONTROLS = ("plain", "stage1")
METHODS = ("composed", "paper")
# How far localisation can go: each is held against what has the true masks.
ORACLES = {"mask": ("composed", "paper"), "composed_mask": ("composed",)}
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
PLANE_HEADINGS = {
    "kept_skin": "skin kept",
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
    """A trained LoRA, how it is drawn with, and where the row it makes belongs."""

    target_name: str
    run_name: str
    seed: int
    strength: float
    lora_path: Path
    guided: bool = False


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


def load_guided_pipeline(settings: DrawSettings) -> SPFPortraitPipeline:
    """The same model in the pipeline that has SFCM guidance, silent."""
    pipeline = SPFPortraitPipeline.from_pipe(load_pipeline(settings))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw_guided(
    pipeline: SPFPortraitPipeline, prompts: Sequence[ToyPrompt], settings: DrawSettings, sfcm_guidance: float,
    options: dict[str, float | bool],
) -> dict[str, np.ndarray]:  # fmt: skip
    """Draw each full prompt once under SFCM guidance, from the noise of the original portrait.

    Args:
        pipeline: with a LoRA on it, or none.
        prompts: `settings.num_prompts` prompts.
        settings: sampler settings and the seed of the noise.
        sfcm_guidance: its strength in [0, 1].
        options: further arguments of the call.

    Returns:
        "full_images", (B, 64, 64, 3) uint8, and "maps", the SFCMs (B, 16, 16) in [0, 1].
    """
    noise = noise_of_prompts(settings)
    images = np.empty((len(prompts), SIZE, SIZE, 3), dtype=np.uint8)
    maps = np.empty((len(prompts), SIZE // 4, SIZE // 4), dtype=np.float32)
    # The prompts of one call share their target, and with it the phrase that it replaces.
    for replaced in sorted({prompt.replaced_phrase for prompt in prompts}, key=str):
        members = [i for i, prompt in enumerate(prompts) if prompt.replaced_phrase == replaced]
        target = prompts[members[0]].target_prompt
        for start in range(0, len(members), settings.batch_size):
            chunk = members[start : start + settings.batch_size]
            drawn = pipeline(
                [prompts[i].base_prompt for i in chunk],
                target_prompt=target if replaced is None else [(replaced, target)],
                latents=noise[chunk].to(settings.device),
                num_inference_steps=settings.num_inference_steps,
                guidance_scale=settings.guidance_scale,
                sfcm_guidance=sfcm_guidance,
                return_sfcm=True,
                output_type="np",
                **options,
            )
            images[chunk] = np.rint(drawn.images * 255).astype(np.uint8)
            maps[chunk] = drawn.sfcm[:, 0].float().cpu().numpy()
    return {"full_images": images, "maps": maps}


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
        The measures of `judge_images`, (num_prompts,) each, and the portraits, "full_images" and "base_images".

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
        pictures = {"full_images": full_images, "base_images": base_images}
        return judge_images(judge, originals, full_images, base_images) | pictures

    digests = [base_model_digest(), file_digest(weights), judge_digest()]
    return cached_arrays(cache_dir, ["portraits", originals.target_name, strength, asdict(settings), digests], make)


def evaluate_guided(
    pipeline: SPFPortraitPipeline, judge: PortraitJudge, originals: Originals, lora_path: Path, sfcm_guidance: float,
    options: dict[str, float | bool], settings: DrawSettings, cache_dir: Path,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Draw with a LoRA under SFCM guidance and judge; arguments as of `draw_guided` and `evaluate_lora`.

    Returns:
        The measures of `PortraitJudge.compare`, (num_prompts,) each, and what `draw_guided` returns. Nothing is
        measured of base prompts alone: guidance is about a target, and the pipeline refuses it without one.

    Raises:
        FileNotFoundError: the folder has no LoRA.
    """
    weights = Path(lora_path) / WEIGHTS_NAME
    if not weights.is_file():
        raise FileNotFoundError(f"{weights} does not exist: not a LoRA the training script wrote.")

    def make() -> dict[str, np.ndarray]:
        pipeline.load_lora_weights(str(lora_path), weight_name=WEIGHTS_NAME, adapter_name="judged")
        try:
            drawn = draw_guided(pipeline, originals.prompts, settings, sfcm_guidance, options)
        finally:
            pipeline.unload_lora_weights()
        target = TARGETS[originals.target_name]
        return judge.compare(originals.base_images, drawn["full_images"], target) | drawn

    code = file_digest(*PIPELINE_CODE.values())
    digests = [base_model_digest(), file_digest(weights), judge_digest(), code]
    key = ["guided portraits", originals.target_name, options, sfcm_guidance, asdict(settings), digests]
    return cached_arrays(cache_dir, key, make)


@lru_cache(maxsize=1)
def _tools(settings: DrawSettings) -> tuple[StableDiffusionPipeline, SPFPortraitPipeline, PortraitJudge]:
    return load_pipeline(settings), load_guided_pipeline(settings), PortraitJudge.from_pretrained()


def evaluate_job(job: EvaluationJob, settings: DrawSettings, cache_dir: Path) -> dict[str, np.ndarray]:
    """The measures of a job, and all that was drawn for it."""
    pipeline, guided_pipeline, judge = _tools(settings)
    originals = load_originals(pipeline, job.target_name, settings, cache_dir)
    if job.guided:
        return evaluate_guided(
            guided_pipeline,
            judge,
            originals,
            job.lora_path,
            SFCM_GUIDANCE,
            QUIET if RUNS[job.run_name].quiet else {},
            settings,
            cache_dir,
        )
    return evaluate_lora(pipeline, judge, originals, job.lora_path, job.strength, settings, cache_dir)


def _measures_of_job(job: EvaluationJob, settings: DrawSettings, cache_dir: Path) -> dict[str, np.ndarray]:
    """As `evaluate_job`, with the first portraits alone, so that the rows of a benchmark fit into memory."""
    found = evaluate_job(job, settings, cache_dir)
    measures = {name: values for name, values in found.items() if name not in ("full_images", "base_images", "maps")}
    return measures | {"pictures": found["full_images"][:PICTURED]}


# ------------------------------------------------------------------------------------------------------------ training


def run_folder(args: argparse.Namespace, target_name: str, run_name: str, seed: int) -> Path:
    return args.output_dir / "runs" / target_name / f"{run_name}-seed{seed}"


def mask_folder(args: argparse.Namespace, target_name: str, seed: int) -> Path:
    return args.output_dir / "runs" / target_name / f"composed_mask-seed{seed}-masks"


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
    if run_name == "composed_mask":
        command += ["--sfcm_dir", str(mask_folder(args, target_name, seed))]
    return command + shlex.split(RUNS[run_name].flags) + shlex.split(args.train_args)


def true_regions(judge: PortraitJudge, portraits: np.ndarray, target: ToyTarget) -> np.ndarray:
    """Where the judge would let a target change portraits that do not have it yet.

    The judge allows the target's labels in either of two pictures, with a margin. Here the second picture is a render
    of what the probe reads in the first, with the target set: so a hat's region is where the renderer would put the
    hat on that head, and the hair it may hide. Face height is not read, and taken at its mean: an error of up to
    2 pixels at the hat's top, which the margin makes up for.

    Args:
        judge: the judge.
        portraits: (B, 64, 64, 3) uint8, of the original model.
        target: the target.

    Returns:
        (B, 64, 64) bool.
    """
    reading = judge.read(portraits)
    drawn = sample_factors(10_000, np.random.default_rng(0))
    factors = {name: np.full(len(portraits), values.mean()) for name, values in drawn.items()}
    factors |= {name: reading.factors[name] for name in (*CLASS_FACTORS, *PIXEL_FACTORS)}
    factors["hair_length"] = np.where(factors["sex"] == 1, 0, factors["hair_length"])
    factors[target.factor] = np.full(len(portraits), target.value)
    _, labels = render(factors)
    return target_region(reading.labels, labels, target)


def write_masks(args: argparse.Namespace, target_name: str, seed: int) -> Path:
    """The true region of each portrait that the composed run of this seed was aligned on, as a greyscale picture.

    Returns:
        Their folder, which has a file for each portrait, named as `--save_alignment` names the portrait.

    Raises:
        FileNotFoundError: the composed run saved no portraits.
    """
    source = run_folder(args, target_name, "composed", seed) / "alignment"
    paths = sorted(path for path in source.glob("*.png") if path.stem.isdigit())
    if not paths:
        raise FileNotFoundError(
            f"{source} has no portraits: the composed run has to be trained with --save_alignment."
        )
    portraits = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    folder = mask_folder(args, target_name, seed)
    folder.mkdir(parents=True, exist_ok=True)
    for path, region in zip(paths, true_regions(PortraitJudge.from_pretrained(), portraits, TARGETS[target_name])):
        Image.fromarray((255 * region).astype(np.uint8)).save(folder / path.name)
    return folder


def train(args: argparse.Namespace, target_name: str, run_name: str, seed: int) -> Path:
    """Train one LoRA through the real script, in a process of its own, unless it is there already.

    Flags and the files it starts from are compared with those of a LoRA that is there; the script's code is not.

    Returns:
        Its folder.

    Raises:
        ValueError: the folder holds a LoRA of other flags, or from another base model, stage 1 or masks.
        RuntimeError: the training script failed.
    """
    folder = run_folder(args, target_name, run_name, seed)
    command = training_command(args, target_name, run_name, seed)
    recipe = {"command": command, "base_model": base_model_digest()}
    if RUNS[run_name].continues:
        recipe["stage1"] = file_digest(run_folder(args, target_name, "stage1", seed) / WEIGHTS_NAME)
    if run_name == "composed_mask":
        recipe["masks"] = file_digest(*sorted(write_masks(args, target_name, seed).glob("*.png")))
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
        name
        for name in RUNS
        if name in args.runs and (RUNS[name].parent is None or target_name in args.ablation_targets)
    ]


def seeds_of(args: argparse.Namespace, run_name: str) -> list[int]:
    """The training seeds of a run."""
    return args.seeds if RUNS[run_name].parent is None else args.ablation_seeds


def trainings(args: argparse.Namespace) -> list[list[tuple[str, str, int]]]:
    """What is to be trained, (target, run, seed), in three waves each of which needs the ones before.

    What starts from nothing, then what starts from stage 1, then what needs the portraits of the composed run.
    """
    waves: list[list[tuple[str, str, int]]] = [[], [], []]
    for target_name in args.targets:
        for name in chosen_runs(args, target_name):
            for seed in seeds_of(args, name):
                needed = [name]
                if name == "composed_mask":
                    needed.insert(0, "composed")
                if RUNS[name].continues:
                    needed.insert(0, "stage1")
                for run_name in needed:
                    wave = waves[2 if run_name == "composed_mask" else int(RUNS[run_name].continues)]
                    if (target_name, run_name, seed) not in wave:
                        wave.append((target_name, run_name, seed))
    return waves


def train_all(args: argparse.Namespace) -> None:
    """Train everything, `--workers` at a time."""
    with ThreadPoolExecutor(args.workers) as pool:
        for wave in trainings(args):
            list(pool.map(lambda item: train(args, *item), wave))


def evaluation_jobs(args: argparse.Namespace) -> list[EvaluationJob]:
    """Every run at every strength, and every way to train once more with guidance."""
    jobs = []
    for target_name in args.targets:
        for name in chosen_runs(args, target_name):
            draws = [(strength, False) for strength in RUNS[name].strengths]
            if RUNS[name].parent is None:
                draws.append((1.0, True))
            for strength, guided in draws:
                for seed in seeds_of(args, name):
                    folder = run_folder(args, target_name, name, seed)
                    jobs.append(EvaluationJob(target_name, name, seed, strength, folder, guided))
    return jobs


def evaluate_all(args: argparse.Namespace, settings: DrawSettings) -> dict[EvaluationJob, dict[str, np.ndarray]]:
    """Draw and judge every job, in `--workers` processes of one thread."""
    jobs, results = evaluation_jobs(args), {}
    with ProcessPoolExecutor(args.workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        futures = {job: pool.submit(_measures_of_job, job, settings, args.output_dir / "cache") for job in jobs}
        for job, future in futures.items():
            results[job] = future.result()
            how = f"strength {job.strength:g}" + (", guided" if job.guided else "")
            what = f"{job.target_name}, {job.run_name}, seed {job.seed}, {how}"
            print(f"judged {what} ({len(results)}/{len(jobs)})", flush=True)
    return results


# ---------------------------------------------------------------------------------------------------------- statistics


def make_rows(target_name: str, original: dict[str, np.ndarray], results: dict) -> list[Row]:
    """The rows of a target, the original model first; adds `excess`, the change beyond the original model's own."""
    groups: dict[tuple[str, float, bool], dict[int, dict[str, np.ndarray]]] = {}
    for job, measures in results.items():
        if job.target_name == target_name:
            groups.setdefault((job.run_name, job.strength, job.guided), {})[job.seed] = measures
    rows = [Row(ORIGINAL, "original", 0.0, {name: values[None] for name, values in original.items()})]
    for (run_name, strength, guided), per_seed in groups.items():
        run = RUNS[run_name]
        label = run.label + ("" if guided or len(run.strengths) == 1 else f", strength {strength:g}")
        # Guidance has no portraits of base prompts alone.
        names = [name for name in original if all(name in measures for measures in per_seed.values())]
        stacked = {name: np.stack([measures[name] for measures in per_seed.values()]) for name in names}
        label += ", guided" if guided else ""
        rows.append(Row(label, run_name, strength, stacked, guided, tuple(per_seed)))
    for row in rows:
        row.measures["excess"] = row.measures["change_outside"] - original["change_outside"]
    return rows


def is_ablation(row: Row) -> bool:
    return row.run_name in RUNS and RUNS[row.run_name].parent is not None


def verdicts(rows: list[Row], seed: int = 0) -> dict[str, dict]:
    """Every way to train, at full strength, against plain LoRA.

    Returns:
        By label: ratios to plain LoRA at full strength, where it has what is compared, and the distance below its
        strength curve. Nothing if there is no plain LoRA.
    """
    plain = next((row for row in rows if row.key == ("plain", 1.0, False)), None)
    found: dict[str, dict] = {}
    if plain is None:
        return found
    curve = curve_of(rows, "plain")
    for row in rows:
        if row.strength != 1.0 or is_ablation(row) or row is plain:
            continue
        verdict = {"below_plain_curve": distance_below_curve(row, curve, np.random.default_rng(seed))}
        for measure in ("response", "excess", "base_change"):
            if measure in row.measures:
                of_plain = plain.measures[measure].mean()
                verdict[f"{measure}_ratio"] = float(row.measures[measure].mean() / of_plain) if of_plain else np.nan
        found[row.label] = verdict
    return found


def ablation_differences(rows: list[Row]) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """By parent, each of its ablations minus the parent of the same training seeds, paired by prompt.

    Returns:
        By parent, ablation and measure: mean difference and its standard error.
    """
    at_full = {row.run_name: row for row in rows if row.strength == 1.0 and not row.guided}
    found: dict[str, dict] = {}
    for name, row in at_full.items():
        if not is_ablation(row) or RUNS[name].parent not in at_full:
            continue
        parent = at_full[RUNS[name].parent].of_seeds(row.seeds)
        pairs = {m: row.by_prompt(m) - parent.by_prompt(m) for m in HEADINGS}
        found.setdefault(RUNS[name].parent, {})[name] = {
            m: {"mean": float(d.mean()), "standard_error": standard_error(d)} for m, d in pairs.items()
        }
    return found


@dataclass(frozen=True)
class Place:
    """A row's place in the response-pollution plane.

    Attributes:
        response, excess: means with their intervals.
        on_front: whether no row dominates it.
        on_usable_front: whether none does of those that know no true region; None for one that does.
        share, usable_share: how often the same holds when the prompts are resampled.
    """

    response: Estimate
    excess: Estimate
    on_front: bool
    on_usable_front: bool | None
    share: float
    usable_share: float | None

    @property
    def mark(self) -> str:
        return "★" if self.on_front else "☆" if self.on_usable_front else ""


def places(rows: list[Row]) -> dict[tuple[str, float, bool], Place]:
    """By key, the place of every row that is no ablation, which has fewer training seeds."""
    rows = [row for row in rows if not is_ablation(row)]
    resamples = resamples_of(rows)
    usable = np.array([row.run_name not in ORACLES for row in rows])
    values = [np.stack([row.by_prompt(name) for row in rows]) for name in ("response", "excess")]
    means = [per_prompt.mean(axis=1) for per_prompt in values]
    front, shares = pareto_front(*means), front_shares(*values, resamples)
    own_front = iter(pareto_front(*(mean[usable] for mean in means)))
    own_shares = iter(front_shares(*(per_prompt[usable] for per_prompt in values), resamples))
    return {
        row.key: Place(
            estimate(row, "response", resamples),
            estimate(row, "excess", resamples),
            bool(on_front),
            bool(next(own_front)) if is_usable else None,
            float(share),
            float(next(own_shares)) if is_usable else None,
        )
        for row, on_front, share, is_usable in zip(rows, front, shares, usable, strict=True)
    }


def oracle_differences(rows: list[Row]) -> list[dict[str, object]]:
    """How far what has to find the region itself is from what knows it: its mean minus the oracle's, paired by prompt.

    Returns:
        Per method, oracle and way to draw: "label", "oracle", and an `Estimate` of "response" and of "excess".
    """
    by_key, resamples, found = {row.key: row for row in rows}, resamples_of(rows), []
    for guided in (False, True):
        for oracle_name, names in ORACLES.items():
            for name in names:
                row, oracle = by_key.get((name, 1.0, guided)), by_key.get((oracle_name, 1.0, guided))
                if row is not None and oracle is not None:
                    pairs = {m: paired_difference(row, oracle, m, resamples) for m in ("response", "excess")}
                    found.append({"label": row.label, "oracle": oracle.label, **pairs})
    return found


# ------------------------------------------------------------------------------------------------------------- writing


def cell(summary: dict[str, dict[str, float]], name: str) -> str:
    """A measure's mean and standard error, or a dash if the row has no such measure."""
    return number(summary[name]["mean"], summary[name]["standard_error"]) if name in summary else "-"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def plane_table(rows: list[Row]) -> str:
    """The main table: every way to train and to draw, with its place in the plane."""
    lines = []
    found = places(rows)
    for row in rows:
        if row.key in found:
            place, summary = found[row.key], summarise(row)
            means = [number(summary[m]["mean"]) if m in summary else "-" for m in PLANE_HEADINGS]
            shares = [percent(place.usable_share), percent(place.share)]
            ends = [with_interval(place.response), with_interval(place.excess)]
            lines.append([f"{row.label} {place.mark}".rstrip(), *ends, *means, *shares])
    header = [
        "",
        "response",
        "excess pollution",
        *PLANE_HEADINGS.values(),
        "on the front",
        "oracles too",
    ]
    return markdown_table(header, lines)


def verdict_table(found: dict[str, dict]) -> str:
    """The derived verdicts of one target as markdown."""
    lines = []
    for label, verdict in found.items():
        ratios = [f"{name}_ratio" for name in ("response", "excess", "base_change")]
        below = verdict["below_plain_curve"]
        per_seed = ", ".join(number(value) for value in below["per_seed"])
        beyond = "; responds more than any strength" if below["beyond_the_curve"] else ""
        errors = f"{below['standard_errors_below']:.1f} standard errors"
        distance = f"{number(below['distance'], below['standard_error'])} ({errors}; seeds {per_seed}{beyond})"
        lines.append([label, *(number(verdict[k]) if k in verdict else "-" for k in ratios), distance])
    header = ["", "response / plain", "excess / plain", "base-prompt change / plain", "below plain's strength curve"]
    return markdown_table(header, lines)


def oracle_table(found: list[dict[str, object]]) -> str:
    lines = [
        [f"{d['label']}, minus {d['oracle']}", *(with_interval(d[m], signed=True) for m in ("response", "excess"))]
        for d in found
    ]
    return markdown_table(["", "response", "excess pollution"], lines)


def ablation_table(parent: str, differences: dict[str, dict]) -> str:
    """Differences to the parent, the ablations' labels without its name."""
    lines = [
        [
            RUNS[name].label.removeprefix(f"{parent}, "),
            *(number(d[m]["mean"], d[m]["standard_error"], signed=True) for m in HEADINGS),
        ]
        for name, d in differences.items()
    ]
    return markdown_table(["", *HEADINGS.values()], lines)


def section(title: str, rows: list[Row], verdicts_found: dict[str, dict]) -> str:
    """All tables of one target, or of the mean over targets, as markdown."""
    parts = [f"## {title}\n\n", plane_table(rows)]
    if oracles := oracle_differences(rows):
        parts += [
            "\nDifference to what was trained with the true regions, paired by prompt:\n\n",
            oracle_table(oracles),
        ]
    for parent, differences in ablation_differences(rows).items():
        seeds = next(row.seeds for row in rows if row.run_name in differences)
        title = (
            f'Ablations of "{RUNS[parent].label}", difference to it at training seed(s) {", ".join(map(str, seeds))}'
        )
        parts += [f"\n{title}, paired by prompt:\n\n", ablation_table(parent, differences)]
    if verdicts_found:
        parts += ["\nAgainst plain LoRA and its strength curve:\n\n", verdict_table(verdicts_found)]
    summaries = [(row.label, summarise(row)) for row in rows]
    full = [[label, *(cell(summary, m) for m in HEADINGS)] for label, summary in summaries]
    parts += ["\nAll measures:\n\n", markdown_table(["", *HEADINGS.values()], full)]
    factors = [name for name in summaries[0][1] if name.startswith("kept_")]
    agreement = [[label, *(cell(summary, m) for m in factors)] for label, summary in summaries]
    parts += ["\nAgreement with the original model's portrait, by factor:\n\n"]
    parts += [markdown_table(["", *(name.removeprefix("kept_").replace("_", " ") for name in factors)], agreement)]
    spread = [
        [label, *(number(summary[m]["seed_spread"]) if m in summary else "-" for m in HEADINGS)]
        for label, summary in summaries
        if not np.isnan(summary["response"]["seed_spread"])
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
    quiet = ", ".join(f"{name}={value}" for name, value in QUIET.items())
    return f"""\
Settings: {args.num_prompts} prompts (seed {args.prompt_seed}), {len(args.seeds)} training seed(s),
{args.num_inference_steps} DDIM steps, guidance scale {args.guidance_scale:g}; {args.stage1_steps} +
{args.stage2_steps} training steps, {total} for what has one stage; half a batch for what adds a row of its own to each
portrait's. Every row draws the same prompts from the same noise, the LoRA active in both branches of the guidance;
*guided* rows are the same LoRAs drawn as the README recommends for each: SPF-Portrait's with
`sfcm_guidance={SFCM_GUIDANCE:g}`, all others with `{quiet}` besides.

Against the original model's portrait of the base prompt: *response* is the share of the full prompts' portraits that
show the target, by the probe's classifier and by a pixel rule; *change outside* the mean absolute difference (0-255)
outside the target's region; *excess pollution* that minus the original model's own with the full prompt; *kept* the
agreement of the probe's factors. With the base prompt alone, *change* is over the whole picture, and *leak* the share
that shows the target unasked; guided rows have none (-), since guidance is about a target and the pipeline refuses it
without one. Brackets are 95 % intervals from {RESAMPLES} resamples of the prompts, after the mean over training seeds,
± one standard error over prompts.

★ no row has at least this response at no more excess pollution (the Pareto front); ☆ only rows that know the true
regions do. *On the front*: in how many of the resamples no row does, those with true masks left out; *oracles too*:
none left out. Ablations are not candidates. *Below the strength curve*: the least change outside at which the LoRA
turned down still responds as much, minus the run's own.
"""


def training_seconds(args: argparse.Namespace, targets: Sequence[str], row: Row) -> float:
    """Mean wall time of a row's trainings, `--workers` of which shared the machine."""
    notes = [
        run_folder(args, target, row.run_name, seed) / "benchmark.json" for target in targets for seed in row.seeds
    ]
    return float(np.mean([json.loads(note.read_text(encoding="utf-8"))["seconds"] for note in notes]))


def write_results(args: argparse.Namespace, tables: dict[str, list[Row]]) -> None:
    """Write results.json, results.csv and table.md."""
    results, lines, sections = {}, [], [explanation(args)]
    for name, (title, rows) in titled(tables).items():
        targets = list(tables) if name == OVERALL else [name]
        seconds = {row.key: training_seconds(args, targets, row) for row in rows if row.run_name in RUNS}
        found, entries = places(rows), []
        for row in rows:
            entry = {"label": row.label, "run": row.run_name, "strength": row.strength, "guided": row.guided}
            entry |= {"training_seconds": seconds.get(row.key)}
            place = asdict(found[row.key]) if row.key in found else None
            entries.append(entry | {"plane": place, "measures": summarise(row)})
            for measure, values in summarise(row).items():
                lines.append({"target": name, **entry, "measure": measure, **values})
        oracles = [{k: v if isinstance(v, str) else asdict(v) for k, v in d.items()} for d in oracle_differences(rows)]
        results[name] = {"rows": entries, "verdicts": verdicts(rows), "oracles": oracles}
        results[name]["ablations"] = ablation_differences(rows)
        sections.append("\n" + section(title, rows, results[name]["verdicts"]))
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
    (args.output_dir / "table.md").write_text("".join(sections), encoding="utf-8")


def titled(tables: dict[str, list[Row]]) -> dict[str, tuple[str, list[Row]]]:
    """Title and rows of each section: the mean over targets first, if there are several."""
    found = {OVERALL: ("Mean over targets", overall_rows(tables))} if len(tables) > 1 else {}
    return found | {name: (f'"{TARGETS[name].prompt}"', rows) for name, rows in tables.items()}


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


def plane_series(rows: list[Row]) -> list[Series]:
    """What a panel shows: plain LoRA's strength curve from the original model on, and each way to train as a point,
    joined to the same with guidance."""
    found, series = places(rows), []

    def point(row: Row) -> Point:
        place = found[row.key]
        ends = [None if e.low is None else (e.low, e.high) for e in (place.response, place.excess)]
        return Point(place.response.value, place.excess.value, *ends, row.guided, place.on_usable_front is True)

    for name, run in RUNS.items():
        if run.style is None:
            continue
        color, marker = run.style
        own = [row for row in rows if row.run_name == name and row.strength == 1.0]
        if name == "plain" and own:
            bare = {"response_ends": None, "pollution_ends": None}
            # Full strength has its ring from the point that is drawn over the curve's end.
            curve = [replace(point(row), **bare) for row in curve_of(rows, name)]
            curve[-1] = replace(curve[-1], on_front=False)
            series.append(Series(f"{run.label}, strength 0 to 1", color, curve, curve=True))
        if own:
            series.append(Series(run.label, color, [point(row) for row in own], marker=marker))
    return series


def write_pictures(
    args: argparse.Namespace, tables: dict[str, list[Row]], results: dict, originals: dict[str, Originals]
) -> None:
    """Write the comparison picture of each target (first training seed), and the plane of all."""
    for target_name in tables:
        columns = {
            RUNS[job.run_name].label + (", guided" if job.guided else ""): measures["pictures"]
            for job, measures in results.items()
            if job.target_name == target_name and job.strength == 1.0 and job.seed == args.seeds[0]
            if job.run_name in METHODS or (job.run_name == "plain" and not job.guided)
        }
        comparison_picture(originals[target_name], columns).save(
            args.output_dir / f"comparison_{target_name}.png", optimize=True
        )
    panels = {title: plane_series(rows) for title, rows in titled(tables).values()}
    if all(panels.values()):
        notes = (
            "Filled: as it is. Hollow: the same LoRAs with SFCM guidance. Bars: 95 % intervals over prompts.",
            "Ring and gray line: the Pareto front of what knows no true mask.",
        )
        picture = plane_picture(panels, "excess pollution (grey levels of 255)", notes)
        picture.save(args.output_dir / "response_pollution_plane.png", optimize=True)


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
    pipeline, _, judge = _tools(settings)
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
    pipeline, _, judge = _tools(settings)
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


def parse_args(input_args: list[str] | None = None, description: str | None = __doc__) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir", type=Path, default=ROOT / "runs" / "preservation", help="LoRAs, caches, tables and pictures."
    )
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="Toy targets.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[101, 102, 103], help="Training seeds.")
    parser.add_argument(
        "--runs", nargs="+", choices=RUNS, default=list(RUNS), help="Which rows; the original model always is one."
    )
    parser.add_argument(
        "--ablation_targets", nargs="+", choices=TARGETS, default=["blonde_hair"], help="The ablations' targets."
    )
    parser.add_argument(
        "--ablation_seeds", nargs="+", type=int, help="The ablations' training seeds; the first of --seeds if not set."
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
    args.ablation_seeds = args.ablation_seeds or args.seeds[:1]
    if unknown := set(args.ablation_seeds) - set(args.seeds):
        parser.error(
            f"--ablation_seeds {min(unknown)} is none of --seeds, whose LoRAs the ablations are compared with"
        )
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
