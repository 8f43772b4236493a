"""Portraits on disk: what is measured later is what was drawn, and none of it has to be in memory. [ours]

A model's folder has `p000-s0-base.png` and `-full.png` for each prompt and seed, a LoRA's `-sfcm.npy` as well, and the
original model's `-region.npy`.
"""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from evaluation.inputs import LoraSource, picture_names, read_masks
from evaluation.measures import Compared, Portraits
from families.pipelines import DrawingPipeline
from loras.loading import load_lora
from prompts import PromptPair
from toy_portraits.judge import PortraitJudge, target_region
from toy_portraits.world import TARGETS


AT_A_TIME = 4  # portraits in memory while they are measured


@contextmanager
def on_pipeline(pipeline: DrawingPipeline, lora: LoraSource, scale: float) -> Iterator[None]:
    """Inside, the pipeline has this LoRA; before and after, none."""
    load_lora(pipeline, str(lora.path), "evaluated")
    pipeline.set_adapters("evaluated", scale)
    yield
    pipeline.unload_lora_weights()


def picture_folders(output_dir: Path, models: Sequence[LoraSource]) -> list[Path]:
    """A folder for each model. Its number tells apart what is alike where signs that no folder takes are left out."""
    names = ("".join(c if c.isalnum() or c in "-_." else "_" for c in model.name)[:60] for model in models)
    return [output_dir / "pictures" / f"{i:02d}-{name}" for i, name in enumerate(names)]


def draw_portraits(
    pipeline: DrawingPipeline, pairs: Sequence[PromptPair], args: argparse.Namespace, folder: Path,
    with_map: bool, bar: tqdm,
) -> None:  # fmt: skip
    """Draw every prompt with every seed, with the base prompt alone and with the target, with SFCMs if `with_map`.

    The noise of a seed is the same for every model and prompt.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = picture_names(args, len(pairs))
    size = {} if args.resolution is None else {"height": args.resolution, "width": args.resolution}

    def call(pair: PromptPair, seeds: Sequence[int], **options: Any) -> Any:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipeline(
            pair.base_prompt, num_images_per_prompt=len(seeds), generator=generators, output_type="np",
            num_inference_steps=args.num_inference_steps, guidance_scale=args.guidance_scale, **size, **options,
        )  # fmt: skip

    for prompt, pair in enumerate(pairs):
        options = {"target_prompt": list(pair.target_argument), "base_phrases": list(pair.base_phrases)}
        if with_map:
            options |= {"return_sfcm": True, "free_phrases": list(pair.free_phrases)}
        for start in range(0, args.num_seeds, args.batch_size):
            numbers = range(args.num_seeds)[start : start + args.batch_size]
            seeds = [args.seed + number for number in numbers]
            full, base = call(pair, seeds, **options), call(pair, seeds)
            for i, number in enumerate(numbers):
                name = names[prompt * args.num_seeds + number]
                for kind, output in (("base", base), ("full", full)):
                    picture = np.rint(output.images[i] * 255).astype(np.uint8)
                    Image.fromarray(picture).save(folder / f"{name}-{kind}.png")
                if with_map:
                    np.save(folder / f"{name}-sfcm.npy", full.sfcm[i, 0].numpy())
            bar.update(len(seeds))


def open_portraits(folder: Path, names: Sequence[str]) -> Portraits:
    """Those of a model by the names of their files."""
    pictures = ([np.asarray(Image.open(folder / f"{n}-{kind}.png")) for n in names] for kind in ("base", "full"))
    return Portraits(*map(np.stack, pictures))


def open_arrays(folder: Path, names: Sequence[str], kind: str = "sfcm") -> np.ndarray:
    """(n, h, w), the SFCMs of a LoRA's portraits, or the original model's regions."""
    return np.stack([np.load(folder / f"{name}-{kind}.npy") for name in names])


def _parts_of(names: Sequence[str]) -> Iterator[Sequence[str]]:
    return (names[start : start + AT_A_TIME] for start in range(0, len(names), AT_A_TIME))


def save_regions(
    folders: Sequence[Path], names: Sequence[str], args: argparse.Namespace, probe: PortraitJudge | None
) -> None:
    """Write where the target may change each portrait, the same for all LoRAs, beside the original model's portraits.

    `folders` are the original model's and each LoRA's, and `args.region` is not "masks".
    """
    for some in _parts_of(names):
        if args.region == "probe":
            before = probe.read(open_portraits(folders[0], some).base).labels
            after = (probe.read(open_portraits(folder, some).full).labels for folder in folders[1:])
            regions = np.any([target_region(before, own, TARGETS[args.toy]) for own in after], axis=0)
        else:
            regions = np.mean([open_arrays(folder, some) for folder in folders[1:]], axis=0)
        for name, region in zip(some, regions, strict=True):
            np.save(folders[0] / f"{name}-region.npy", region)


def open_compared(
    original: Path, adapted: Path, names: Sequence[str], pairs: Sequence[PromptPair], masks: Path | None, bar: tqdm
) -> Iterator[Compared]:
    """All portraits of a model from its folder, a few at a time, which `bar` counts when the next ones are asked for.

    Args:
        names: of all portraits, in the order of `pairs` with the seeds of each together.
        masks: a folder of masks, or None for what `save_regions` wrote.
    """
    of_name = {name: pairs[i * len(pairs) // len(names)] for i, name in enumerate(names)}
    for some in _parts_of(names):
        before = open_portraits(original, some)
        size = before.base.shape[1:3]
        if masks is None:
            found = torch.from_numpy(open_arrays(original, some, "region"))[:, None].double()
            region = F.interpolate(found, size, mode="bilinear", align_corners=False)[:, 0].numpy()
        else:
            region = read_masks(masks, some, size)
        yield Compared(before, open_portraits(adapted, some), region, [of_name[name] for name in some])
        bar.update(len(some))
