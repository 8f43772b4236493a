"""What an evaluation is about, checked before a model is loaded: prompts, LoRAs and masks. Source: [ours]."""

import argparse
import filecmp
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path

import numpy as np
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from PIL import Image

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


ORIGINAL_MODEL = "original model"  # how the report calls it, and so no LoRA
REFERENCE, EVALUATED, CHECKPOINT = "reference", "lora", "checkpoint"


@dataclass(frozen=True)
class LoraSource:
    """A LoRA to evaluate: how the report calls it, its file here, and what it counts as."""

    name: str
    path: Path
    role: str


def picture_name(prompt: int, seed: int) -> str:
    """How the files of one prompt and seed are called, without an ending."""
    return f"p{prompt:03d}-s{seed}"


def read_prompts(args: argparse.Namespace) -> list[PromptPair]:
    """The prompts of --base_prompts or --prompts_file or the toy world's, in their order, each once.

    Raises:
        InputError: a file that is missing, empty or no JSON lines; no target; a target that the base prompt has
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
        pairs = list(_read_prompts_file(args.prompts_file, args.target_prompt))
    return list(dict.fromkeys(pairs))[: args.max_prompts]


def _read_prompts_file(path: Path, target_prompt: Sequence[str] | None) -> Iterable[PromptPair]:
    name = f"--prompts_file {path}"
    try:
        sources, records = read_json_lines(path, name)
    except OSError as error:
        raise InputError(f"{name}: {error}") from error
    except ValueError as error:
        raise InputError(str(error)) from error
    if not records:
        raise InputError(f"{name}: holds no prompts")
    for source, record in zip(sources, records, strict=True):
        yield _pair(record, target_prompt, source)


def _pair(record: dict, target_prompt: Sequence[str] | None, where: str) -> PromptPair:
    """A prompt pair of one line of data; its own target counts, or that of all."""
    with naming(where):
        base_prompt, full_prompt = record.get("base_prompt"), record.get("full_prompt")
        for name, text in (("base_prompt", base_prompt), ("full_prompt", full_prompt)):
            if not isinstance(text, str) and not (name == "full_prompt" and text is None):
                raise ValueError(f"{name!r} must be a text, got {text!r}")
        target = record.get("target_prompt")
        if target is None and target_prompt:
            target = list(target_prompt)
        if target is None:
            raise ValueError(f"the base prompt {base_prompt!r} has no target: give --target_prompt")
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
    """The LoRAs of --reference_lora, --lora and --checkpoints, read once to see that they are LoRAs.

    The reference comes first, if there is one, each with a name of its own; a file that is named twice is there once.

    Raises InputError: one that is not there, is no LoRA, or a folder without checkpoints.
    """
    found: list[LoraSource] = []
    sources = [("reference_lora", args.reference_lora, REFERENCE)] if args.reference_lora else []
    sources += [("lora", source, EVALUATED) for source in args.lora or ()]
    for flag, source, role in sources:
        with naming_flag(flag, source):
            path = find_lora(source)
            read_lora(path)
        found.append(LoraSource(_name_of(clean_source(source)), path, role))
    for name, path in _checkpoint_files(args.checkpoints) if args.checkpoints is not None else ():
        with naming(f"--checkpoints {path}"):
            read_lora(path)
        found.append(LoraSource(name, path, CHECKPOINT))
    loras: list[LoraSource] = []
    for lora in found:
        # A run's checkpoints stay together, whatever else names them.
        if lora.role == EVALUATED and any(lora.path.samefile(other.path) for other in loras):
            continue
        taken, numbered = {ORIGINAL_MODEL, *(other.name for other in loras)}, (f"{lora.name} ({i})" for i in count(2))
        loras.append(replace(lora, name=next(name for name in chain([lora.name], numbered) if name not in taken)))
    return loras


def _name_of(source: str) -> str:
    """The last part of a path or id that says something."""
    path = Path(source)
    if path.name == LORA_WEIGHT_NAME_SAFE:
        path = path.resolve().parent
    return path.stem if path.suffix == ".safetensors" else path.name or path.resolve().name


def _checkpoint_files(folder: Path) -> list[tuple[str, Path]]:
    """The LoRAs of a training run by their step, and its final one unless that is the last checkpoint's."""
    if not folder.is_dir():
        raise InputError(f"--checkpoints {folder}: no such folder")
    files = []
    for checkpoint in find_checkpoints(folder):
        file = checkpoint / LORA_WEIGHT_NAME_SAFE
        if not file.is_file():
            raise InputError(f"--checkpoints {folder}: {checkpoint.name} has no {LORA_WEIGHT_NAME_SAFE}")
        files.append((checkpoint.name, file))
    if not files:
        raise InputError(f"--checkpoints {folder}: holds no checkpoint-<step>")
    final = folder / LORA_WEIGHT_NAME_SAFE
    if final.is_file() and not filecmp.cmp(final, files[-1][1], shallow=False):
        files.append(("final", final))
    return files


def read_masks(folder: Path, names: Sequence[str], size: tuple[int, int]) -> np.ndarray:
    """The target's region in each portrait, as a user painted it, (B, H, W) float64 in [0, 1].

    Args:
        folder: has `<name>.png` for each name, white where the target may change the portrait.
        size: (H, W) of the portraits; a mask of another size is resized.

    Raises InputError: a mask that is missing or no picture; the message names it.
    """
    if not folder.is_dir():
        raise InputError(f"--region_masks {folder}: no such folder")
    masks = []
    for name in names:
        path = folder / f"{name}.png"
        try:
            picture = load_picture(path, f"--region_masks {folder}")
        except FileNotFoundError as error:
            raise InputError(f"--region_masks {folder}: {path.name} is missing") from error
        except ValueError as error:
            raise InputError(str(error)) from error
        grey = picture.convert("L").resize((size[1], size[0]), Image.Resampling.BILINEAR)
        masks.append(np.asarray(grey, dtype=np.float64) / 255)
    return np.stack(masks)
