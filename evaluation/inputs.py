"""What an evaluation is about, checked before a model is loaded: prompts, LoRAs and masks. Source: [ours]."""

import argparse
import filecmp
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path

import numpy as np
from PIL import Image

from loras import LORA_WEIGHTS
from loras.finding import clean_source, find_lora
from loras.reading import read_lora
from programs.loading import InputError, naming, naming_flag
from programs.picture_files import load_picture
from programs.records import read_json_lines, read_phrases, read_target
from programs.writing import find_checkpoints
from prompts import PromptPair, make_prompt_pair
from toy_portraits.judge import base_prompts
from toy_portraits.world import TARGETS
from wording import has_phrase


@dataclass(frozen=True)
class LoraSource:
    """A LoRA to evaluate: how the report calls it, its file here, and its role as of `Judged`."""

    name: str
    path: Path
    role: str


ORIGINAL = LoraSource("original model", Path(), "original")  # whose name no LoRA has


def picture_names(args: argparse.Namespace, prompts: int) -> list[str]:
    """How the files of each prompt and seed are called, without an ending, the seeds of a prompt together."""
    seeds = range(args.seed, args.seed + args.num_seeds)
    return [f"p{prompt:03d}-s{seed}" for prompt in range(prompts) for seed in seeds]


def read_prompts(args: argparse.Namespace) -> list[PromptPair]:
    """The prompts of --base_prompts or --prompts_file or the toy world's, in their order, each once.

    Raises ValueError: a file that is missing, empty or no JSON lines; no target; a target that the base prompt has
    already; and what `make_prompt_pair` says. The message names flag or file and line.
    """
    if args.toy_prompts:
        # Fresh ones, which no training set has.
        drawn = base_prompts(TARGETS[args.toy], args.max_prompts or 12, args.seed)
        targets = [(p.replaced_phrase, p.target_prompt) if p.replaced_phrase else p.target_prompt for p in drawn]
        pairs = [make_prompt_pair(p.base_prompt, [target]) for p, target in zip(drawn, targets)]
    elif args.prompts_file is None:
        pairs = [_pair({"base_prompt": text}, args.target_prompt, "--base_prompts") for text in args.base_prompts]
    else:
        name = f"--prompts_file {args.prompts_file}"
        try:
            lines = list(zip(*read_json_lines(args.prompts_file, name)))
        except OSError as error:
            raise InputError(f"{name}: {error}") from error
        if not lines:
            raise InputError(f"{name}: holds no prompts")
        pairs = [_pair(record, args.target_prompt, source) for source, record in lines]
    return list(dict.fromkeys(pairs))[: args.max_prompts]


def _pair(record: dict, target_prompt: Sequence[str] | None, where: str) -> PromptPair:
    """A prompt pair of one line of data; its own target counts, or that of all."""
    with naming(where):
        base_prompt, full_prompt = record.get("base_prompt"), record.get("full_prompt")
        for name, text, kinds in (("base_prompt", base_prompt, str), ("full_prompt", full_prompt, str | None)):
            if not isinstance(text, kinds):
                raise ValueError(f"{name!r} must be a text, got {text!r}")
        target = record.get("target_prompt")
        if target is None:
            if not target_prompt:
                raise ValueError(f"the base prompt {base_prompt!r} has no target: give --target_prompt")
            target = list(target_prompt)
        target = read_target(target, "'target_prompt'")
        for text in [target] if isinstance(target, str) else target:
            words = text[1] if isinstance(text, tuple) else text
            if has_phrase(base_prompt, words):
                raise ValueError(f"the target {words!r} is in the base prompt {base_prompt!r} already")
        phrases, free = (
            None if record.get(name) in left_out else read_phrases(record[name], repr(name))
            for name, left_out in (("base_phrases", (None,)), ("free_phrases", (None, [])))
        )
        pair = make_prompt_pair(base_prompt, target, full_prompt, phrases, free or ())
        # The map's regions are those of the prompt that the pipeline composes.
        composed = make_prompt_pair(base_prompt, list(pair.target_argument), None, phrases, free or ())
        if composed.full_prompt != pair.full_prompt:
            print(f"{where}: {pair.full_prompt!r} is drawn as {composed.full_prompt!r}", flush=True)
        return composed


def find_loras(args: argparse.Namespace) -> list[LoraSource]:
    """The LoRAs of --reference_lora, --lora and --checkpoints, each with a name of its own and once.

    Raises InputError: one that is not there, is no LoRA, or a folder without checkpoints.
    """
    found, loras = [], []
    sources = [("reference_lora", args.reference_lora, "reference")] if args.reference_lora else []
    sources += [("lora", source, "lora") for source in args.lora or ()]
    for flag, source, role in sources:
        with naming_flag(flag, source):
            path, named = find_lora(source), Path(clean_source(source))
            read_lora(path)
        # The last part of a path or id that says something.
        named = named.resolve().parent if named.name == LORA_WEIGHTS else named
        name = named.stem if named.suffix == ".safetensors" else named.name or named.resolve().name
        found.append(LoraSource(name, path, role))
    for name, path in _checkpoint_files(args.checkpoints) if args.checkpoints is not None else ():
        with naming(f"--checkpoints {path}"):
            read_lora(path)
        found.append(LoraSource(name, path, "checkpoint"))
    for lora in found:
        # A run's checkpoints stay together, whatever else names them.
        if lora.role == "lora" and any(lora.path.samefile(other.path) for other in loras):
            continue
        taken, numbered = {ORIGINAL.name, *(other.name for other in loras)}, (f"{lora.name} ({i})" for i in count(2))
        loras.append(replace(lora, name=next(name for name in chain([lora.name], numbered) if name not in taken)))
    return loras


def _checkpoint_files(folder: Path) -> list[tuple[str, Path]]:
    """The LoRAs of a training run by their step, and its final one unless that is the last checkpoint's."""
    if not folder.is_dir():
        raise InputError(f"--checkpoints {folder}: no such folder")
    files = []
    for checkpoint in find_checkpoints(folder):
        file = checkpoint / LORA_WEIGHTS
        if not file.is_file():
            raise InputError(f"--checkpoints {folder}: {checkpoint.name} has no {LORA_WEIGHTS}")
        files.append((checkpoint.name, file))
    if not files:
        raise InputError(f"--checkpoints {folder}: holds no checkpoint-<step>")
    final = folder / LORA_WEIGHTS
    if final.is_file() and not filecmp.cmp(final, files[-1][1], shallow=False):
        files.append(("final", final))
    return files


def read_masks(folder: Path, names: Sequence[str], size: tuple[int, int]) -> np.ndarray:
    """The target's region in each portrait, as a user painted it: (B, H, W) of this size, float64 in [0, 1].

    The folder has `<name>.png` for each name, white where the target may change the portrait; others are resized.

    Raises ValueError: a mask that is missing or no picture; the message names it.
    """
    flag = f"--region_masks {folder}"
    if not folder.is_dir():
        raise InputError(f"{flag}: no such folder")
    masks = []
    for name in names:
        path = folder / f"{name}.png"
        if not path.exists():
            raise InputError(f"{flag}: {path.name} is missing")
        grey = load_picture(path, flag).convert("L").resize(size[::-1], Image.Resampling.BILINEAR)
        masks.append(np.asarray(grey, dtype=np.float64) / 255)
    return np.stack(masks)
