"""The ways to train that `benchmarks/preservation.py` compares, and the trainings, each in a process of its own.

What is finished is not trained again.

Source: [ours].
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import sfcm_modes
from benchmarks.parts.drawing import ROOT, base_model_digest, file_digest
from loras import LORA_WEIGHTS
from toy_portraits.judge import PortraitJudge, target_region
from toy_portraits.pipelines import family_of
from toy_portraits.probe import CLASS_FACTORS, PIXEL_FACTORS
from toy_portraits.recipe import FLAGS, training_flags
from toy_portraits.world import TARGETS, ToyTarget, render, sample_factors


Training = tuple[str, str, int]  # target, run and training seed
# Of every training: no pictures and no logs.
UNWATCHED = ("--num_validation_images", "0", "--report_to", "none")
NOTE = "benchmark.json"  # of a LoRA's folder: its recipe, and the seconds that it took


@dataclass(frozen=True)
class Run:
    """One way to train, and the strengths it is judged at; an ablation is drawn as it is alone."""

    label: str
    flags: str = ""  # of the training script, beyond those that all runs share
    style: tuple[str, str] | None = None  # colour and marker in the plane
    parent: str | None = None  # of an ablation, the run that it changes in one thing
    continues: bool = False  # from stage 1's LoRA; otherwise it is one stage of as many steps as both
    quiet: bool = True  # whether it is drawn with `QUIET` under guidance
    strengths: tuple[float, ...] = (1.0,)  # scales of the LoRA at inference
    most_seeds: int | None = 3  # trained with the first so many of the training seeds; None is all of them

    def seeds_of(self, seeds: Sequence[int]) -> Sequence[int]:
        """Those of the training seeds that it is trained with."""
        return seeds[: self.most_seeds]


# Half a batch for what adds a row of its own to each training portrait's: all see as many rows with gradient.
HALF_BATCH = f"--train_batch_size {int(FLAGS[FLAGS.index('--train_batch_size') + 1]) // 2}"
# Portraits are all that this world has; none of these says or shows what a training set does.
UNRELATED = shlex.join(
    ["", "a man, black hair, a green jacket, a gray background", "a woman, gray hair, a white jacket, glasses"]
)
COMPOSED, PAPER = "--stage2_objective composed", f"--stage2_objective paper {HALF_BATCH}"
CAT = f"--preservation cat --unrelated_prompts {UNRELATED} {HALF_BATCH}"
OURS = {"continues": True, "quiet": False}
# The methods, in the order of the tables. What the claims are about has all training seeds.
WAYS = {
    "plain": Run("plain LoRA", "", ("#c83c28", "o"), strengths=(1.0, 0.75, 0.5, 0.25), most_seeds=None),
    "stage1": Run("stage 1 alone", "", ("#de961e", "o"), most_seeds=None),
    "dora": Run("DoRA", "--use_dora", ("#d664b4", "p")),
    "prior": Run("prior preservation", f"--preservation prior {HALF_BATCH}", ("#6e6e14", "s")),
    "dop": Run("differential output preservation", f"--preservation dop {HALF_BATCH}", ("#00a0aa", "s")),
    "cat": Run("contrastive adapter training", CAT, ("#825ac8", "s")),
    "mask": Run("masked loss, true masks", "--preservation mask", ("#5a5a5a", "D")),
    "composed": Run(
        "SPF-Portrait, composed", f"{COMPOSED} --save_alignment", ("#1e5ac8", "^"), most_seeds=None, **OURS
    ),
    "composed_mask": Run("composed, true masks", COMPOSED, ("#96bef0", "D"), **OURS),
    "paper": Run("SPF-Portrait, paper", PAPER, ("#1e965a", "^"), most_seeds=None, **OURS),
}
# The defaults before all of `CHANGES`, and what those changed.
BEFORE = {
    "sfcm_mode": "averaged_target", "sfcm_gamma": 2, "composed_timestep_power": 0.5, "alignment_color_variation": 0,
    "base_prompt_share": 0.6, "teacher_scale": 1.6,
}  # fmt: skip
CHANGES = {
    "c_only_map": ("the map of both differences", {"sfcm_mode": "averaged_both"}),
    "c_only_gamma": ("the map to the power of 4", {"sfcm_gamma": 4}),
    "c_only_power": ("timesteps drawn with power 1.5", {"composed_timestep_power": 1.5}),
    "c_only_colors": ("three colours of four varied", {"alignment_color_variation": 0.75}),
    "c_only_base": ("a share of .75 that asks for no change", {"base_prompt_share": 0.75}),
    "c_only_scale": ("teacher at strength 2", {"teacher_scale": 2}),
}


def as_flags(values: dict[str, object]) -> str:
    return " ".join(f"--{name} {value}" for name, value in values.items())


# What each changes in the flags of its parent.
ABLATIONS = {
    "composed": {
        "c_before": ("earlier defaults", as_flags(BEFORE)),
        **{name: (f"earlier defaults but {label}", as_flags(BEFORE | own)) for name, (label, own) in CHANGES.items()},
        "c_presence": ("as strong as the target asks for", "--target_presence 1"),
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
        "p_drawn": ("enhancement's rows drawn", "--enhancement_weighting drawn"),
        "p_every4": ("enhancement every 4 steps", "--enhancement_every 4"),
        "p_cheap": ("all three", "--alignment_layers phrase_map --enhancement_weighting drawn --enhancement_every 4"),
        "p_single_pass": ("both paths in a single pass", "--dual_path single_pass"),
    },
}
FLAGS_OF_PARENTS = {"composed": COMPOSED, "paper": PAPER}
# Ablations that a claim rests on, and so have all training seeds; the others have one.
CLAIMED = {"c_before", *CHANGES, "c_presence", "p_layers", "p_drawn", "p_every4", "p_cheap"}
RUNS = WAYS | {
    name: Run(
        f"{parent}, {label}",
        f"{FLAGS_OF_PARENTS[parent]} {flags}",
        parent=parent,
        continues=True,
        most_seeds=None if name in CLAIMED else 1,
    )
    for parent, changes in ABLATIONS.items()
    for name, (label, flags) in changes.items()
}
_OF_THE_PAPER = re.compile(r"--stage2_objective (paper|both)\b")


def trainable(base: str) -> list[str]:
    """The runs that a base can be trained by: none with the paper's objective where its family has none."""
    whole = "paper" in family_of(base).objectives
    return [name for name, run in RUNS.items() if whole or not _OF_THE_PAPER.search(run.flags)]


# How far localisation can go: each is held against what has the true masks.
ORACLES = {"mask": ("composed", "paper"), "composed_mask": ("composed",)}


# ---------------------------------------------------------------------------------------------------------- true masks


def mask_folder(args: argparse.Namespace, target_name: str, seed: int) -> Path:
    return args.output_dir / "runs" / target_name / f"composed_mask-seed{seed}-masks"


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

    Returns their folder, with files named as the portraits.
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


# ------------------------------------------------------------------------------------------------------------ training


def run_folder(output_dir: Path, target_name: str, run_name: str, seed: int) -> Path:
    return output_dir / "runs" / target_name / f"{run_name}-seed{seed}"


def training_command(args: argparse.Namespace, target_name: str, run_name: str, seed: int) -> list[str]:
    """The command line of one training, without its output folder.

    What has one stage gets as many steps as both together. What has a second stage starts it from stage 1's LoRA of
    the same target and seed, so that stage 1 is trained once.
    """
    run, command = RUNS[run_name], [*training_flags(target_name, args.base), "--seed", str(seed), *UNWATCHED]
    if run.continues:
        stage1 = run_folder(args.output_dir, target_name, "stage1", seed)
        command += ["--stage1_steps", "0", "--stage1_lora_path", str(stage1), "--stage2_steps", str(args.stage2_steps)]
    else:
        steps = args.stage1_steps + (0 if run_name == "stage1" else args.stage2_steps)
        command += ["--stage1_steps", str(steps), "--stage2_steps", "0"]
    if run_name == "composed_mask":
        command += ["--sfcm_dir", str(mask_folder(args, target_name, seed))]
    return command + shlex.split(run.flags) + shlex.split(args.train_args)


def train_into(folder: Path, command: list[str], base: str, **depends_on: object) -> None:
    """Train a base with the flags of a command into a folder, unless the LoRA of this very recipe is there already.

    The flags and what else it depends on are compared with those of a LoRA that is there; the script's code is not.

    Raises:
        ValueError: the folder holds a LoRA of other flags, or from other files.
        RuntimeError: the training script failed.
    """
    note, recipe = folder / NOTE, {"command": command, "base_model": base_model_digest(base), **depends_on}
    if (folder / LORA_WEIGHTS).is_file() and note.is_file():
        found = json.loads(note.read_text(encoding="utf-8"))
        if {name: found[name] for name in recipe} != recipe:
            raise ValueError(
                f"{folder} was trained with other flags or from another model: remove it or give another --output_dir."
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    start, log = time.time(), folder / "training.log"
    code = run_trainer([*command, "--output_dir", str(folder)], log)
    if code != 0 or not (folder / LORA_WEIGHTS).is_file():
        raise RuntimeError(f"The training of {folder} failed with exit code {code}; see {log}.")
    seconds = time.time() - start
    note.write_text(json.dumps(recipe | {"seconds": seconds}, indent=2) + "\n", encoding="utf-8")
    print(f"trained {folder.parent.name}, {folder.name} in {seconds:.0f} s", flush=True)


def run_trainer(flags: list[str], log: Path) -> int:
    """The exit status of the training script, which goes on from the checkpoint of an interrupted training."""
    program = "benchmarks/sfcm_modes.py" if sfcm_modes.LOST.keys() & set(flags) else "train_spf_portrait_lora.py"
    command = [sys.executable, str(ROOT / program), *flags, "--resume_from_checkpoint", "latest"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with log.open("w", encoding="utf-8") as file:
        return subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=ROOT).returncode


def train(args: argparse.Namespace, target_name: str, run_name: str, seed: int) -> None:
    """Train one LoRA unless it is there already; raises as `train_into`."""
    depends_on, folder = {}, run_folder(args.output_dir, target_name, run_name, seed)
    if RUNS[run_name].continues:
        depends_on["stage1"] = file_digest(run_folder(args.output_dir, target_name, "stage1", seed) / LORA_WEIGHTS)
    if run_name == "composed_mask":
        depends_on["masks"] = file_digest(*sorted(write_masks(args, target_name, seed).glob("*.png")))
    train_into(folder, training_command(args, target_name, run_name, seed), args.base, **depends_on)


def trainings(wanted: Iterable[Training]) -> list[list[Training]]:
    """What is wanted, and what that starts from, in three waves each of which needs the ones before.

    What starts from nothing, then what starts from stage 1, then what needs the portraits of the composed run.
    """
    waves: tuple[dict[Training, None], ...] = {}, {}, {}
    for target, name, seed in wanted:
        if name == "composed_mask":
            waves[1][target, "composed", seed] = waves[2][target, name, seed] = None
        else:
            waves[RUNS[name].continues][target, name, seed] = None
        if RUNS[name].continues:
            waves[0][target, "stage1", seed] = None
    return [list(wave) for wave in waves]


def train_all(args: argparse.Namespace, wanted: Iterable[Training]) -> None:
    """Train all that is wanted, `--workers` at a time."""
    with ThreadPoolExecutor(args.workers) as pool:
        for wave in trainings(wanted):
            list(pool.map(lambda item: train(args, *item), wave))
