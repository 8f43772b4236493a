"""Portraits of the toy base model, with LoRAs or without, drawn from noise that belongs to the prompt, and kept.

Source: [ours].
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging as diffusers_logging
from PIL import Image

from loras import LORA_WEIGHTS
from pictures import captioned_pictures
from pipeline_spf_portrait import SPFPortraitPipeline
from toy_portraits.judge import ToyPrompt, base_prompts
from toy_portraits.recipe import BASE_MODEL
from toy_portraits.world import SIZE, TARGETS


ROOT = Path(__file__).resolve().parents[2]
PICTURED = 6  # prompts in the comparison pictures
TILE = 3 * SIZE  # pixels of a portrait in a picture


# ------------------------------------------------------------------------------------------------------------ settings


@dataclass(frozen=True)
class DrawSettings:
    """How portraits are drawn for the judge; the same for every row of a table."""

    num_prompts: int = 96
    prompt_seed: int = 90002
    num_inference_steps: int = 15
    guidance_scale: float = 4.0
    device: str = "cpu"
    batch_size: int = 16


def make_parser(description: str | None, output: str, **defaults: Any) -> argparse.ArgumentParser:
    """A parser with the flags that most benchmarks have; `output` is the folder in `runs/`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    folder = ROOT / "runs" / output
    parser.add_argument("--output_dir", type=Path, default=folder, help="For caches, tables and pictures.")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="Toy targets.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[101, 102, 103], help="Training seeds.")
    parser.add_argument("--workers", type=int, default=2, help="Processes of one thread each.")
    parser.add_argument("--num_prompts", type=int, default=96)
    parser.add_argument("--prompt_seed", type=int, default=90002, help="Of prompts and noise.")
    parser.add_argument("--num_inference_steps", type=int, default=15)
    parser.add_argument("--guidance_scale", type=float, default=4.0)
    parser.add_argument("--batch_size", type=int, default=16, help="Portraits drawn at a time.")
    parser.add_argument("--device", default="cpu", help="Where portraits are drawn.")
    parser.set_defaults(**defaults)
    return parser


def read_flags(parser: argparse.ArgumentParser, input_args: Sequence[str] | None) -> argparse.Namespace:
    """The flags, with an error if something is to be done less than once; from here on there is one thread."""
    args = parser.parse_args(input_args)
    counted = ("num_prompts", "num_inference_steps", "stage1_steps", "stage2_steps", "workers", "batch_size",
               "num_portraits", "noise_samples")  # fmt: skip
    for name in counted:
        if getattr(args, name, 1) < 1:
            parser.error(f"--{name} must be at least 1")
    args.output_dir = args.output_dir.resolve()
    # The same rounding everywhere, and no threads that wait for each other.
    torch.set_num_threads(1)
    return args


def draw_settings(args: argparse.Namespace) -> DrawSettings:
    return DrawSettings(**{field.name: getattr(args, field.name) for field in fields(DrawSettings)})


def worker_processes(count: int) -> Executor:
    """A pool of processes of one thread each; a single one is a thread of this process."""
    if count == 1:
        return ThreadPoolExecutor(1)
    return ProcessPoolExecutor(count, get_context("spawn"), torch.set_num_threads, (1,))


# ------------------------------------------------------------------------------------------------------------- drawing


def load_pipeline(device: str) -> SPFPortraitPipeline:
    """The toy base model with its DDIM sampler, silent; without a target it draws as diffusers' own pipeline does."""
    diffusers_logging.disable_progress_bar()
    pipeline = SPFPortraitPipeline.from_pretrained(BASE_MODEL, dtype=torch.float32).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def weights_of(folder: Path) -> Path:
    """The file of a LoRA. Raises FileNotFoundError if the folder has none."""
    weights = Path(folder) / LORA_WEIGHTS
    if not weights.is_file():
        raise FileNotFoundError(f"{weights} does not exist: not a LoRA that the training script wrote.")
    return weights


@contextmanager
def loras_on(pipeline: SPFPortraitPipeline, folders: Sequence[Path], strength: float = 1.0) -> Iterator[None]:
    """Inside, these LoRAs, stacked, are on the UNet; none of them is left afterwards."""
    names = [f"lora{place}" for place in range(len(folders))]
    try:
        for name, folder in zip(names, folders, strict=True):
            pipeline.unet.load_lora_adapter(str(folder), weight_name=LORA_WEIGHTS, adapter_name=name, prefix="unet")
        if names:
            pipeline.unet.set_adapters(names, [strength] * len(names))
        yield
    finally:
        if names:
            pipeline.unet.unload_lora()


def noise_of_prompts(settings: DrawSettings) -> torch.Tensor:
    """(num_prompts, 4, 16, 16): prompt i has its own seed, so that its portrait is the same however many are drawn."""
    generators = [torch.Generator().manual_seed(settings.prompt_seed * 1000 + i) for i in range(settings.num_prompts)]
    return torch.stack([torch.randn(4, SIZE // 4, SIZE // 4, generator=generator) for generator in generators])


def to_bytes(images: np.ndarray) -> np.ndarray:
    """Pictures in [0, 1] as uint8."""
    return np.rint(images * 255).astype(np.uint8)


def draw(pipeline: SPFPortraitPipeline, prompts: Sequence[str], settings: DrawSettings) -> np.ndarray:
    """One portrait a prompt, (B, 64, 64, 3) uint8; a LoRA that is on is active in both branches of the guidance."""
    noise, images = noise_of_prompts(settings), []
    for start in range(0, len(prompts), settings.batch_size):
        chunk = slice(start, start + settings.batch_size)
        images.append(call(pipeline, list(prompts[chunk]), noise[chunk], settings).images)
    return to_bytes(np.concatenate(images))


def call(
    pipeline: SPFPortraitPipeline, prompts: list[str], noise: torch.Tensor, settings: DrawSettings, **options: Any
) -> Any:
    """What the pipeline returns."""
    return pipeline(
        prompts,
        latents=noise.to(settings.device),
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        output_type="np",
        **options,
    )


def draw_with_target(
    pipeline: SPFPortraitPipeline, prompts: Sequence[ToyPrompt], settings: DrawSettings, **options: Any
) -> Iterator[tuple[list[int], Any]]:
    """Draw each prompt with its target, those with one target together.

    Args:
        pipeline: with a LoRA on it, or none.
        prompts: `settings.num_prompts` prompts.
        settings: sampler settings and the seed of the noise.
        options: further arguments of the call.

    Yields:
        Places of prompts, and what the pipeline returned for them.
    """
    noise, goals = noise_of_prompts(settings), {}
    for i, prompt in enumerate(prompts):
        replaced, target = prompt.replaced_phrase, prompt.target_prompt
        goals.setdefault(target if replaced is None else (replaced, target), []).append(i)
    for goal, members in goals.items():
        for start in range(0, len(members), settings.batch_size):
            chunk = members[start : start + settings.batch_size]
            texts = [prompts[i].base_prompt for i in chunk]
            yield chunk, call(pipeline, texts, noise[chunk], settings, target_prompt=[goal], **options)


def draw_guided(
    pipeline: SPFPortraitPipeline, prompts: Sequence[ToyPrompt], settings: DrawSettings, sfcm_guidance: float,
    options: dict[str, float | bool],
) -> dict[str, np.ndarray]:  # fmt: skip
    """Draw each full prompt once under SFCM guidance: "full_images" (B, 64, 64, 3), and "maps" (B, 16, 16)."""
    images = np.empty((len(prompts), SIZE, SIZE, 3), dtype=np.uint8)
    maps = np.empty((len(prompts), SIZE // 4, SIZE // 4), dtype=np.float32)
    guidance = {"sfcm_guidance": sfcm_guidance, "return_sfcm": True, **options}
    for chunk, drawn in draw_with_target(pipeline, prompts, settings, **guidance):
        images[chunk], maps[chunk] = to_bytes(drawn.images), drawn.sfcm[:, 0].float().cpu().numpy()
    return {"full_images": images, "maps": maps}


# ------------------------------------------------------------------------------------------------------------- keeping


def file_digest(*paths: Path) -> str:
    """A short fingerprint of some files' contents."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def base_model_digest() -> str:
    return file_digest(*sorted(BASE_MODEL.glob("*/*.safetensors")), *sorted(BASE_MODEL.glob("*/*config.json")))


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


@dataclass(frozen=True)
class Originals:
    """The original model's portraits of a target's prompts, from the noise every other model starts from."""

    target_name: str
    prompts: list[ToyPrompt]
    base_images: np.ndarray
    full_images: np.ndarray


def load_originals(
    pipeline: SPFPortraitPipeline, target_name: str, settings: DrawSettings, cache_dir: Path
) -> Originals:
    """The original model's portraits with base and full prompts, drawn once and kept in `cache_dir`."""
    prompts = base_prompts(TARGETS[target_name], settings.num_prompts, settings.prompt_seed)

    def make() -> dict[str, np.ndarray]:
        texts = {kind: [getattr(prompt, f"{kind}_prompt") for prompt in prompts] for kind in ("base", "full")}
        return {f"{kind}_images": draw(pipeline, own, settings) for kind, own in texts.items()}

    key = ["original", target_name, asdict(settings), base_model_digest()]
    return Originals(target_name, prompts, **cached_arrays(cache_dir, key, make))


# ------------------------------------------------------------------------------------------------------------ pictures


def tile(image: np.ndarray) -> Image.Image:
    """A portrait (64, 64, 3) uint8, larger."""
    return Image.fromarray(image).resize((TILE, TILE), Image.Resampling.NEAREST)


def save_rows(path: Path, rows: Sequence[Sequence[tuple[str, Image.Image]]]) -> None:
    """Rows of captioned pictures, as many in each, in few colours to keep the file small."""
    captions, pictures = zip(*(pair for row in rows for pair in row))
    captioned_pictures(pictures, captions, len(rows[0])).quantize(256).save(path, optimize=True)
