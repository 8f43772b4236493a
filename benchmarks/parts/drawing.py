"""Portraits of a toy base model, with LoRAs or without, drawn from noise that belongs to the prompt, and kept.

Source: [ours].
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import textwrap
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.utils import logging as diffusers_logging
from matplotlib.figure import Figure
from PIL import Image

from families.pipelines import denoiser_of
from loras import LORA_WEIGHTS
from pictures import overlay_heat_map
from pipeline_spf_portrait import SPFPortraitPipeline
from pipeline_spf_portrait_xl import SPFPortraitXLPipeline
from prompts import PromptPair, make_prompt_pair
from toy_portraits.judge import ToyPrompt, base_prompts
from toy_portraits.pipelines import load_base
from toy_portraits.recipe import BASES, CLIP
from toy_portraits.world import SIZE, TARGETS


ROOT = Path(__file__).resolve().parents[2]
Pipeline = SPFPortraitPipeline | SPFPortraitXLPipeline


# ------------------------------------------------------------------------------------------------------------ settings


@dataclass(frozen=True)
class DrawSettings:
    """How portraits are drawn for the judge; the same for every row of a table."""

    num_prompts: int = 96
    prompt_seed: int = 90002  # of prompts and noise
    num_inference_steps: int = 15
    guidance_scale: float = 4.0
    device: str = "cpu"
    batch_size: int = 16
    base: str = "sd"  # of `BASES`, with its own sampler


def drawing_parser(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """A parser with the flags of what is drawn, and where it is kept."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    about = "For LoRAs, caches, tables and pictures; runs/preservation, and a base but sd has a folder of its own."
    parser.add_argument("--output_dir", type=Path, help=about)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="Toy targets.")
    for field in fields(DrawSettings):
        choices = list(BASES) if field.name == "base" else None
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default, choices=choices)
    parser.set_defaults(**defaults)
    return parser


def make_parser(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """A parser with the flags that the benchmarks of quality have; all of them share one folder of LoRAs."""
    parser = drawing_parser(description)
    parser.add_argument("--seeds", nargs="+", type=int, default=[101, 102, 103], help="Training seeds.")
    parser.add_argument("--stage1_steps", type=int, default=120)
    parser.add_argument("--stage2_steps", type=int, default=120)
    parser.add_argument("--train_args", default="", help="Further flags of the training script, in one string.")
    parser.add_argument("--workers", type=int, default=2, help="Processes of one thread each.")
    parser.set_defaults(**defaults)
    return parser


def read_flags(parser: argparse.ArgumentParser, input_args: Sequence[str] | None) -> argparse.Namespace:
    """The flags, with an error if something is to be done less than once.

    From here on there is one thread: the same rounding everywhere, and none waits for another.
    """
    args = parser.parse_args(input_args)
    for name in ("num_prompts", "num_inference_steps", "stage1_steps", "stage2_steps", "workers", "batch_size"):
        if getattr(args, name, 1) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(args, name)}")
    if args.output_dir is None:
        args.output_dir = ROOT / "runs" / ("preservation" if args.base == "sd" else f"preservation_{args.base}")
    args.output_dir = args.output_dir.resolve()
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


def load_pipeline(device: str, base: str = "sd") -> Pipeline:
    """A toy base model with its own sampler, silent; `load_base` says how it draws."""
    diffusers_logging.disable_progress_bar()
    return load_base(base).to(device)


def adapter_name(folder: Path) -> str:
    """What `loras_on` calls the LoRA of a folder: its target and run."""
    return f"{folder.parent.name}-{folder.name}"


@contextmanager
def loras_on(pipeline: Pipeline, folders: Sequence[Path], strength: float = 1.0) -> Iterator[None]:
    """Inside, these LoRAs, stacked, are on the denoiser; none of them is left afterwards."""
    names, denoiser = [adapter_name(folder) for folder in folders], denoiser_of(pipeline)
    model = next(name for name, part in pipeline.components.items() if part is denoiser)
    try:
        for name, folder in zip(names, folders, strict=True):
            denoiser.load_lora_adapter(str(folder), weight_name=LORA_WEIGHTS, adapter_name=name, prefix=model)
        if names:
            denoiser.set_adapters(names, [strength] * len(names))
        yield
    finally:
        if names:
            denoiser.unload_lora()


def prompt_pairs(prompts: Sequence[ToyPrompt]) -> list[PromptPair]:
    return [make_prompt_pair(prompt.base_prompt, prompt.target_prompt, prompt.full_prompt) for prompt in prompts]


def noise_of_prompts(settings: DrawSettings) -> torch.Tensor:
    """(num_prompts, 4, 16, 16): prompt i has its own seed, so that its portrait is the same however many are drawn."""
    generators = [torch.Generator().manual_seed(settings.prompt_seed * 1000 + i) for i in range(settings.num_prompts)]
    return torch.stack([torch.randn(4, SIZE // 4, SIZE // 4, generator=generator) for generator in generators])


def to_bytes(images: np.ndarray) -> np.ndarray:
    """Pictures in [0, 1] as uint8."""
    return np.rint(images * 255).astype(np.uint8)


def _call(pipeline: Any, prompts: list[str], noise: torch.Tensor, settings: DrawSettings, **options: Any) -> Any:
    return pipeline(
        prompts,
        latents=noise.to(settings.device),
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        output_type="np",
        **options,
    )


def draw(pipeline: Pipeline, prompts: Sequence[str], settings: DrawSettings) -> np.ndarray:
    """One portrait a prompt, (B, 64, 64, 3) uint8; a LoRA that is on is active in both branches of the guidance."""
    noise, size = noise_of_prompts(settings), settings.batch_size
    chunks = [slice(start, start + size) for start in range(0, len(prompts), size)]
    return to_bytes(np.concatenate([_call(pipeline, list(prompts[c]), noise[c], settings).images for c in chunks]))


def draw_both(
    pipeline: Pipeline, prompts: Sequence[ToyPrompt], settings: DrawSettings
) -> dict[str, np.ndarray]:
    """"full_images" and "base_images", the portraits of the full and of the base prompts."""
    texts = {kind: [getattr(prompt, f"{kind}_prompt") for prompt in prompts] for kind in ("full", "base")}
    return {f"{kind}_images": draw(pipeline, own, settings) for kind, own in texts.items()}


def draw_with_target(
    pipeline: Pipeline, prompts: Sequence[ToyPrompt], settings: DrawSettings, **options: Any
) -> Iterator[tuple[list[int], Any]]:
    """Draw each of `settings.num_prompts` prompts with its target, those with one target together.

    `options` are further arguments of the call. Yields places of prompts, and what the pipeline returned for them.
    """
    noise, goals = noise_of_prompts(settings), {}
    for i, prompt in enumerate(prompts):
        replaced, target = prompt.replaced_phrase, prompt.target_prompt
        goals.setdefault(target if replaced is None else (replaced, target), []).append(i)
    for goal, members in goals.items():
        for start in range(0, len(members), settings.batch_size):
            chunk = members[start : start + settings.batch_size]
            texts = [prompts[i].base_prompt for i in chunk]
            yield chunk, _call(pipeline, texts, noise[chunk], settings, target_prompt=[goal], **options)


def draw_guided(
    pipeline: Pipeline, prompts: Sequence[ToyPrompt], settings: DrawSettings, **options: Any
) -> dict[str, np.ndarray]:
    """Draw each full prompt once, as `options` of the call say: "full_images" (B, 64, 64, 3), and under SFCM guidance
    "maps" (B, 16, 16)."""
    mapped = "sfcm_guidance" in options
    images = np.empty((len(prompts), SIZE, SIZE, 3), dtype=np.uint8)
    maps = np.empty((len(prompts), SIZE // 4, SIZE // 4), dtype=np.float32)
    for chunk, drawn in draw_with_target(pipeline, prompts, settings, return_sfcm=mapped, **options):
        images[chunk] = to_bytes(drawn.images)
        if mapped:
            maps[chunk] = drawn.sfcm[:, 0].float().cpu().numpy()
    return {"full_images": images} | ({"maps": maps} if mapped else {})


# ------------------------------------------------------------------------------------------------------------- keeping


def file_digest(*paths: Path) -> str:
    """A short fingerprint of some files' contents."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def base_model_digest(base: str) -> str:
    """Of a base model and of CLIP, which judges its trainings too."""
    folders = {CLIP, *BASES[base].folder.glob("*/")}
    weights, configs = (
        sorted(path for folder in folders for path in folder.glob(kind)) for kind in ("*.safetensors", "*config.json")
    )
    return file_digest(*weights, *configs)


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
    pipeline: Pipeline, target_name: str, settings: DrawSettings, cache_dir: Path
) -> Originals:
    """The original model's portraits, drawn once and kept in `cache_dir`."""
    prompts = base_prompts(TARGETS[target_name], settings.num_prompts, settings.prompt_seed)
    key = ["original", target_name, asdict(settings), base_model_digest(settings.base)]
    images = cached_arrays(cache_dir, key, lambda: draw_both(pipeline, prompts, settings))
    return Originals(target_name, prompts, **images)


# ------------------------------------------------------------------------------------------------------------ pictures


class Picture(NamedTuple):
    """A portrait (64, 64, 3) uint8, under a map (h, w) in [0, 1], with the outline of a region (64, 64) bool."""

    caption: str
    portrait: np.ndarray
    values: np.ndarray | None = None
    region: np.ndarray | None = None


def save_pictures(path: Path, rows: Sequence[Sequence[Picture]]) -> None:
    """Rows of captioned portraits; some may be shorter."""
    columns = max(map(len, rows))
    figure = Figure((1.6 * columns, 1.9 * len(rows)), layout="constrained")
    for panels, row in zip(figure.subplots(len(rows), columns, squeeze=False), rows, strict=True):
        for axes in panels:
            axes.set_axis_off()
        for axes, (caption, portrait, values, region) in zip(panels, row, strict=False):
            axes.set_title(textwrap.fill(caption, 22), fontsize=8)
            axes.imshow(portrait if values is None else overlay_heat_map(Image.fromarray(portrait), values))
            if region is not None:
                axes.contour(region, [0.5], colors="white")
    figure.savefig(path)
