"""The ways to train that `benchmarks/preservation.py` compares, and what each LoRA is trained from.

Source: [ours].
"""

from __future__ import annotations

import argparse
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.parts.drawing import file_digest
from benchmarks.parts.plane import Color
from benchmarks.parts.training import UNWATCHED, run_folder, train_into
from loras import LORA_WEIGHTS
from toy_portraits.judge import PortraitJudge, target_region
from toy_portraits.probe import CLASS_FACTORS, PIXEL_FACTORS
from toy_portraits.recipe import FLAGS, training_flags
from toy_portraits.world import TARGETS, ToyTarget, render, sample_factors


STRENGTHS = (1.0, 0.75, 0.5, 0.25)


@dataclass(frozen=True)
class Run:
    """One way to train, and the strengths it is judged at.

    An ablation has targets and training seeds of its own, and is drawn without guidance alone.
    """

    label: str
    flags: str = ""  # of the training script, beyond those that all runs share
    strengths: tuple[float, ...] = (1.0,)  # scales of the LoRA at inference
    parent: str | None = None  # of an ablation, the run that it changes in one thing
    continues: bool = True  # from stage 1's LoRA; otherwise it is one stage of as many steps as both
    style: tuple[Color, str] | None = None  # in the plane
    quiet: bool = True  # whether it is drawn with `QUIET` under guidance


def baseline(label: str, flags: str, color: Color, marker: str, strengths: tuple[float, ...] = (1.0,)) -> Run:
    return Run(label, flags, strengths, continues=False, style=(color, marker))


# Half a batch for what adds a row of its own to each training portrait's: all see as many rows with gradient.
HALF_BATCH = f"--train_batch_size {int(FLAGS[FLAGS.index('--train_batch_size') + 1]) // 2}"
# Portraits are all that this world has; none of these says or shows what a training set does.
UNRELATED = shlex.join(
    ["", "a man, black hair, a green jacket, a gray background", "a woman, gray hair, a white jacket, glasses"]
)
COMPOSED, PAPER = "--stage2_objective composed", f"--stage2_objective paper {HALF_BATCH}"
CAT = f"--preservation cat --unrelated_prompts {UNRELATED} {HALF_BATCH}"
# The methods, in the order of the tables.
WAYS = {
    "plain": baseline("plain LoRA", "", (200, 60, 40), "circle", STRENGTHS),
    "stage1": baseline("stage 1 alone", "", (222, 150, 30), "circle"),
    "dora": baseline("DoRA", "--use_dora", (214, 100, 180), "pentagon"),
    "prior": baseline("prior preservation", f"--preservation prior {HALF_BATCH}", (110, 110, 20), "square"),
    "dop": baseline(
        "differential output preservation", f"--preservation dop {HALF_BATCH}", (0, 160, 170), "square"
    ),
    "cat": baseline("contrastive adapter training", CAT, (130, 90, 200), "square"),
    "mask": baseline("masked loss, true masks", "--preservation mask", (90, 90, 90), "diamond"),
    "composed": Run(
        "SPF-Portrait, composed", f"{COMPOSED} --save_alignment", style=((30, 90, 200), "triangle"), quiet=False
    ),
    "composed_mask": Run("composed, true masks", COMPOSED, style=((150, 190, 240), "diamond"), quiet=False),
    "paper": Run("SPF-Portrait, paper", PAPER, style=((30, 150, 90), "triangle"), quiet=False),
}
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
CONTROLS, METHODS = ("plain", "stage1"), ("composed", "paper")
# How far localisation can go: each is held against what has the true masks.
ORACLES = {"mask": ("composed", "paper"), "composed_mask": ("composed",)}


# ------------------------------------------------------------------------------------------------------------ training


def mask_folder(args: argparse.Namespace, target_name: str, seed: int) -> Path:
    return args.output_dir / "runs" / target_name / f"composed_mask-seed{seed}-masks"


def training_command(args: argparse.Namespace, target_name: str, run_name: str, seed: int) -> list[str]:
    """The command line of one training, without its output folder.

    What has one stage gets as many steps as both together. What has a second stage starts it from stage 1's LoRA of
    the same target and seed, so that stage 1 is trained once.
    """
    command = [*training_flags(target_name), "--seed", str(seed), *UNWATCHED]
    if not RUNS[run_name].continues:
        steps = args.stage1_steps + (0 if run_name == "stage1" else args.stage2_steps)
        command += ["--stage1_steps", str(steps), "--stage2_steps", "0"]
    else:
        stage1 = run_folder(args.output_dir, target_name, "stage1", seed)
        command += ["--stage1_steps", "0", "--stage1_lora_path", str(stage1), "--stage2_steps", str(args.stage2_steps)]
    if run_name == "composed_mask":
        command += ["--sfcm_dir", str(mask_folder(args, target_name, seed))]
    return command + shlex.split(RUNS[run_name].flags) + shlex.split(args.train_args)


def true_regions(judge: PortraitJudge, portraits: np.ndarray, target: ToyTarget) -> np.ndarray:
    """Where the judge would let a target change portraits (B, 64, 64, 3) that do not have it yet: (B, 64, 64) bool.

    The judge allows the target's labels in either of two pictures, with a margin. Here the second picture is a render
    of what the probe reads in the first, with the target set: so a hat's region is where the renderer would put the
    hat on that head, and the hair it may hide. Face height is not read, and taken at its mean: an error of up to
    2 pixels at the hat's top, which the margin makes up for.
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
    """Write the true region of each portrait that the composed run of this seed was aligned on, and saved.

    Returns their folder, with files named as `--save_alignment` names the portraits.
    """
    source = run_folder(args.output_dir, target_name, "composed", seed) / "alignment"
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
    """Train one LoRA unless it is there already; returns its folder, raises as `train_into`."""
    depends_on = {}
    if RUNS[run_name].continues:
        depends_on["stage1"] = file_digest(run_folder(args.output_dir, target_name, "stage1", seed) / LORA_WEIGHTS)
    if run_name == "composed_mask":
        depends_on["masks"] = file_digest(*sorted(write_masks(args, target_name, seed).glob("*.png")))
    command = training_command(args, target_name, run_name, seed)
    return train_into(run_folder(args.output_dir, target_name, run_name, seed), command, **depends_on)


def chosen(args: argparse.Namespace) -> list[tuple[str, str, int]]:
    """The (target, run, seed) of the tables, in their order; ablations have targets and seeds of their own."""
    return [
        (target, name, seed)
        for target in args.targets
        for name, run in RUNS.items()
        if name in args.runs and (run.parent is None or target in args.ablation_targets)
        for seed in (args.seeds if run.parent is None else args.ablation_seeds)
    ]


def trainings(args: argparse.Namespace) -> list[list[tuple[str, str, int]]]:
    """What is to be trained, (target, run, seed), in three waves each of which needs the ones before.

    What starts from nothing, then what starts from stage 1, then what needs the portraits of the composed run.
    """
    waves: list[dict[tuple[str, str, int], None]] = [{}, {}, {}]
    for target, name, seed in chosen(args):
        needed = [*(["stage1"] if RUNS[name].continues else []), *(["composed"] if name == "composed_mask" else [])]
        for run_name in [*needed, name]:
            wave = 2 if run_name == "composed_mask" else int(RUNS[run_name].continues)
            waves[wave][target, run_name, seed] = None
    return [list(wave) for wave in waves]
