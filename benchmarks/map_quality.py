"""Is the map right? `python benchmarks/map_quality.py` holds maps against regions that are known.

Portraits are rendered, so that the region of a target and of each phrase is known to the pixel: the same portrait
is rendered without and with the target. They are noised at timesteps of several bands, the UNet predicts for base and
full prompt with and without a LoRA, and every SFCM mode makes its map. A second part takes the maps of the pipeline
while it draws, and the regions from the probe. The LoRAs are those that `benchmarks/preservation.py` trained.

Legend: B portraits, h/w map size (16x16), N noise samples, P base phrases, T text tokens, K training seeds.
Source: [ours].
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from adapters import active_adapters
from attention_processors import (
    CrossAttentionFeatures,
    capture_cross_attention,
    phrase_map_resolution,
)
from benchmarks import map_report, sfcm_modes
from benchmarks.map_report import BANDS, DEFAULT_MODE, MODES, ORIGINAL, TRAINING_BAND, Band, Row, band_text
from benchmarks.parts import drawing, regions
from benchmarks.parts.regions import TARGET_WORDS, Scenes, map_separation, phrase_games, pointing_game
from benchmarks.parts.training import run_folder
from benchmarks.preservation_runs import CONTROLS, METHODS
from families.prompt_embeds import PromptEmbeds
from families.stable_diffusion import StableDiffusion
from loras import LORA_WEIGHTS
from pictures import overlay_heat_map
from pipeline_spf_portrait import SPFPortraitPipeline
from prompts import PromptPair, phrase_mask, tokenize_prompt_pair
from sfcm import SFCM_MODES, noise_difference, phrase_attention_maps
from toy_portraits.build import to_tensor
from toy_portraits.judge import PortraitJudge, base_prompts, target_region
from toy_portraits.world import TARGETS
from training.prompt_table import PromptTable, make_prompt_table


Maps = dict[str, dict[Any, np.ndarray]]
PICTURED = 2  # portraits a target in the picture


# ------------------------------------------------------------------------------------------------------------ the maps


@dataclass(frozen=True)
class Tools:
    """The toy model with the LoRAs to be looked at, and the judge."""

    pipeline: SPFPortraitPipeline
    judge: PortraitJudge
    device: str


@dataclass(frozen=True)
class BandMaps:
    """The maps (1, B, h, w) of some portraits in one band of timesteps, by adapter ("original": none)."""

    sfcm: Maps  # by mode, from the difference averaged over all noise samples
    single: Maps  # by mode, from one noise sample each, (N, B, h, w)
    resolutions: Maps  # the default mode's, by each other resolution of phrase maps
    target: Maps  # by resolution, of the target's tokens in the Response Path
    phrases: dict[tuple[int, int], np.ndarray]  # by resolution (B, P, h, w), of the Reference Path
    used: tuple[int, int]  # the resolution the SFCMs were made with


def load_tools(device: str) -> Tools:
    """The models, silent and in evaluation mode."""
    return Tools(drawing.load_pipeline(device), PortraitJudge.from_pretrained(), device)


def prompt_table(tools: Tools, pairs: Sequence[PromptPair]) -> tuple[PromptTable, torch.Tensor]:
    """What the training knows of the prompts, and (B, 1, T) weights that average over each target's tokens."""
    tokenizer = tools.pipeline.tokenizer
    tokens = [tokenize_prompt_pair(pair, tokenizer) for pair in pairs]
    table = make_prompt_table(StableDiffusion, tools.pipeline, pairs, tokens)
    length = tokenizer.model_max_length
    weights = torch.tensor([phrase_mask([row.target_positions], length) for row in tokens], device=tools.device)
    return table, weights


@torch.no_grad()
def encode(tools: Tools, images: np.ndarray) -> torch.Tensor:
    """Latents (B, C, h, w) of pictures (B, 64, 64, 3) uint8."""
    vae = tools.pipeline.vae
    return vae.encode(to_tensor(images).to(tools.device)).latent_dist.mode() * vae.config.scaling_factor


@torch.no_grad()
def predict(
    unet: torch.nn.Module, adapter: str, latents: torch.Tensor, timesteps: torch.Tensor, embeds: PromptEmbeds
) -> tuple[torch.Tensor, CrossAttentionFeatures]:
    """The UNet's prediction and cross-attention with one adapter on, or with none ("original")."""
    names = None if adapter == ORIGINAL else adapter
    with active_adapters(unet, names), capture_cross_attention(unet) as store, store.record():
        model_pred = StableDiffusion.predict(unet, latents, timesteps, embeds)
        return model_pred, store.pop()


def noise_samples(
    count: int, band: Band, num_samples: int, seed: int, shape: Sequence[int]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Noise (B, *shape) and timesteps (B,) of each sample.

    A portrait's noise depends on its number alone, and each sample's timestep is from its own part of the band, as in
    the training.
    """
    generators = [torch.Generator().manual_seed(1000 * seed + i) for i in range(count)]
    samples = []
    for sample in range(num_samples):
        noise = torch.stack([torch.randn(*shape, generator=own) for own in generators])
        offsets = torch.cat([torch.rand(1, generator=own) for own in generators])
        place = (sample + offsets) / num_samples
        samples.append((noise, (band[0] + place * (band[1] - band[0])).long()))
    return samples


@dataclass(frozen=True)
class Inputs:
    """What maps are made of: portraits' latents (B, C, h, w), the table of their prompts, and `target_weights`."""

    latents: torch.Tensor
    table: PromptTable
    target_weights: torch.Tensor

    @classmethod
    def make(cls, tools: Tools, scenes: Scenes) -> Inputs:
        return cls(encode(tools, scenes.images), *prompt_table(tools, regions.prompt_pairs(scenes.prompts)))

    def maps(self, tools: Tools, band: Band, adapters: Sequence[str], args: argparse.Namespace) -> BandMaps:
        """All maps of a band, by as many portraits at a time as `args.batch_size`."""
        count, shape = len(self.latents), self.latents.shape[1:]
        samples = noise_samples(count, band, args.noise_samples, args.portrait_seed, shape)
        starts = range(0, count, args.batch_size)
        return join_maps(
            [band_maps(tools, self, slice(s, s + args.batch_size), samples, adapters) for s in starts]
        )


def band_maps(
    tools: Tools,
    inputs: Inputs,
    rows: slice,
    samples: Sequence[tuple[torch.Tensor, torch.Tensor]],
    adapters: Sequence[str],
) -> BandMaps:
    """All maps of the portraits `rows` in one band, of whose noise `samples` are; "original" is no adapter."""
    pipeline, latents, table = tools.pipeline, inputs.latents, inputs.table
    size, embeds = latents.shape[-2:], table.prompt_embeds
    base, full = (embeds[own[: len(latents)][rows]] for own in (table.reference_rows, table.response_rows))
    references, responses = [], {name: [] for name in adapters}
    differences: dict[tuple[str, bool], list[torch.Tensor]] = {(n, own): [] for n in adapters for own in (False, True)}
    for noise, timesteps in samples:
        steps = timesteps[rows].to(tools.device)
        noisy = pipeline.scheduler.add_noise(latents[rows], noise[rows].to(tools.device), steps)
        reference_pred, features = predict(pipeline.unet, ORIGINAL, noisy, steps, base)
        references.append(features)
        for name in adapters:
            response_pred, features = predict(pipeline.unet, name, noisy, steps, full)
            responses[name].append(features)
            # Without an adapter the two differences are the same.
            alone = name == ORIGINAL
            start_pred = reference_pred if alone else predict(pipeline.unet, name, noisy, steps, base)[0]
            differences[name, False].append(noise_difference(response_pred, reference_pred))
            differences[name, True].append(noise_difference(response_pred, start_pred))

    resolutions, modes = references[0].resolutions, SFCM_MODES | sfcm_modes.LOST
    used = phrase_map_resolution(resolutions)
    weights, distances, present = table.phrase_weights[rows], table.distances[rows], table.phrase_mask[rows]

    def attention(features: Sequence[CrossAttentionFeatures], of: torch.Tensor, resolution: tuple) -> torch.Tensor:
        layers = [probs for one in features for probs in one.at_resolution(resolution).attention_probs.values()]
        return phrase_attention_maps(layers, [resolution] * len(layers), of, size)

    def sfcm(mode: str, name: str, phrases: torch.Tensor, chosen: slice) -> np.ndarray:
        difference = torch.stack(differences[name, modes[mode].target_only][chosen]).mean(0)
        return modes[mode].compute(difference, phrases, distances, present)[:, 0].cpu().numpy()

    def words(name: str, resolution: tuple[int, int]) -> np.ndarray:
        return attention(responses[name], inputs.target_weights[rows], resolution).cpu().numpy().swapaxes(0, 1)

    phrases = {s: attention(references, weights, s) for s in sorted(set(resolutions.values()))}
    everything = slice(None)
    each = [(attention(references[i : i + 1], weights, used), slice(i, i + 1)) for i in range(len(samples))]
    others = {s: maps for s, maps in phrases.items() if s != used}
    return BandMaps(
        {n: {m: sfcm(m, n, phrases[used], everything)[None] for m in MODES} for n in adapters},
        {n: {m: np.stack([sfcm(m, n, *own) for own in each]) for m in MODES} for n in adapters},
        {n: {s: sfcm(DEFAULT_MODE, n, maps, everything)[None] for s, maps in others.items()} for n in adapters},
        {n: {s: words(n, s) for s in phrases} for n in adapters},
        {s: maps.cpu().numpy() for s, maps in phrases.items()},
        used,
    )


def join_maps(parts: Sequence[BandMaps]) -> BandMaps:
    """The maps of several chunks of portraits as those of all."""
    first = parts[0]

    def nested(name: str) -> Maps:
        return {
            key: {inner: np.concatenate([getattr(part, name)[key][inner] for part in parts], 1) for inner in values}
            for key, values in getattr(first, name).items()
        }

    phrases = {size: np.concatenate([part.phrases[size] for part in parts]) for size in first.phrases}
    return BandMaps(*map(nested, ("sfcm", "single", "resolutions", "target")), phrases, first.used)


# ----------------------------------------------------------------------------------------------------------- measuring


def by_seed(adapters: Sequence[str]) -> dict[str, list[str]]:
    """The adapters of each run, one a training seed."""
    groups: dict[str, list[str]] = {}
    for name in adapters:
        groups.setdefault(name.split("-seed")[0], []).append(name)
    return groups


def stack(found: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Measures (B,) of several seeds as (K, B)."""
    return {name: np.stack([one[name] for one in found]) for name in found[0]}


def measure_rendered(
    tools: Tools, scenes: Scenes, portraits: str, bands: Sequence[Band], adapters: Sequence[str],
    args: argparse.Namespace,
) -> list[Row]:  # fmt: skip
    """All maps of rendered portraits, against the renderer's regions."""
    inputs, rows, many = Inputs.make(tools, scenes), [], f"{args.noise_samples} noises"
    phrases = [pair.base_phrases for pair in regions.prompt_pairs(scenes.prompts)]
    for band in bands:
        maps, key = inputs.maps(tools, band, adapters, args), (portraits, scenes.target_name, band)
        shown = {size: f"{size[0]}x{size[1]}" + (" (used)" if size == maps.used else "") for size in maps.phrases}

        def add(run_name: str, map_name: str, detail: str, found: list[dict], key: tuple = key) -> None:
            rows.append(Row(*key, run_name, map_name, detail, stack(found)))

        for run_name, names in by_seed(adapters).items():
            for mode in MODES:
                add(run_name, mode, many, [map_separation(maps.sfcm[name][mode], scenes) for name in names])
                add(run_name, mode, "one noise", [map_separation(maps.single[name][mode], scenes) for name in names])
            for size in maps.resolutions[names[0]]:
                found = [map_separation(maps.resolutions[name][size], scenes) for name in names]
                add(run_name, DEFAULT_MODE, f"{many}, phrases at {shown[size]}", found)
            for size in maps.phrases:
                own = [maps.target[name][size] for name in names]
                found = [map_separation(m, scenes) | pointing_game(m[0], scenes.drawn) for m in own]
                add(run_name, TARGET_WORDS, shown[size], found)
        for size, phrase_maps in maps.phrases.items():
            for kind, game in phrase_games(phrase_maps, phrases, scenes).items():
                add(ORIGINAL, kind, shown[size], [game])
        print(f"{portraits}, {scenes.target_name}, t {band[0]}-{band[1]}: measured", flush=True)
    return rows


def draw_scenes(
    tools: Tools, target_name: str, adapter: str, args: argparse.Namespace
) -> tuple[Scenes, np.ndarray, np.ndarray, list]:
    """Draw portraits with a LoRA; the regions are the probe's, of these and of the original model's portraits.

    Returns:
        The portraits; their SFCMs (B, h, w) and phrase maps (B, P, h, w) as the pipeline returns them, averaged over
        the denoising steps; their phrases.
    """
    target, settings = TARGETS[target_name], drawing.draw_settings(args)
    prompts, drawn = base_prompts(target, args.num_prompts, args.prompt_seed), {}
    tools.pipeline.unet.set_adapters(adapter)
    options = {"compare": True, "return_sfcm": True, "sfcm_mode": "averaged"}
    for chunk, found in drawing.draw_with_target(tools.pipeline, prompts, settings, **options):
        maps, phrase_maps = found.sfcm[:, 0].numpy(), [own.numpy() for own in found.phrase_maps]
        drawn |= zip(chunk, zip(found.images, found.reference_images, maps, phrase_maps, found.phrases, strict=True))
    images, references, maps, phrase_maps, phrases = zip(*(drawn[i] for i in range(len(prompts))))
    images, references = (drawing.to_bytes(np.stack(own)) for own in (images, references))
    labels, before = tools.judge.read(images).labels, tools.judge.read(references).labels
    region = (labels == regions.own_label(target)) | (before == regions.own_label(target))
    scenes = Scenes(target_name, prompts, images, labels, region, target_region(before, labels, target))
    longest = max(map(len, phrase_maps))
    padded = [np.pad(own, ((0, longest - len(own)), (0, 0), (0, 0))) for own in phrase_maps]
    return scenes, np.stack(maps), np.stack(padded), list(phrases)


def measure_generated(tools: Tools, target_name: str, adapters: Sequence[str], args: argparse.Namespace) -> list[Row]:
    """The pipeline's maps of the portraits that each LoRA draws, against the probe's regions."""
    rows = []
    for run_name, names in by_seed([name for name in adapters if name != ORIGINAL]).items():
        found, games = [], []
        for name in names:
            scenes, sfcm, phrase_maps, phrases = draw_scenes(tools, target_name, name, args)
            found.append(map_separation(sfcm[None], scenes))
            games.append(phrase_games(phrase_maps, phrases, scenes))
        key = ("generated", target_name, None, run_name)
        rows.append(Row(*key, "averaged", "all steps", stack(found)))
        rows += [Row(*key, kind, "all steps", stack([game[kind] for game in games])) for kind in games[0]]
        print(f"generated, {target_name}, {run_name}: measured", flush=True)
    return rows


def map_pictures(
    tools: Tools, scenes: Scenes, adapter: str, args: argparse.Namespace
) -> list[list[tuple[str, Image.Image]]]:
    """Per portrait its pictures with their captions: the region, the default map of each band, the phrases' maps."""
    inputs, pairs = Inputs.make(tools, scenes), regions.prompt_pairs(scenes.prompts)
    rows = [[(f"{TARGETS[scenes.target_name].prompt}?", None, scenes.drawn[i])] for i in range(len(pairs))]
    for band in args.bands:
        maps = inputs.maps(tools, band, [adapter], args)
        for i, row in enumerate(rows):
            row.append((f"SFCM, t {band_text(band)}", maps.sfcm[adapter][DEFAULT_MODE][0, i], scenes.drawn[i]))
    maps = inputs.maps(tools, TRAINING_BAND, [adapter], args)
    for i, (row, pair) in enumerate(zip(rows, pairs, strict=True)):
        row.append((f"words: {pair.target_text}", maps.target[adapter][maps.used][0, i], scenes.drawn[i]))
        for place, phrase in enumerate(pair.base_phrases[:3]):
            region = regions.kind_regions(regions.kind_of(phrase), scenes)[i]
            row.append((phrase, maps.phrases[maps.used][i, place], region))
    return [
        [(text, outline(drawing.tile(scenes.images[i]), values, region)) for text, values, region in row]
        for i, row in enumerate(rows)
    ]


def outline(picture: Image.Image, values: np.ndarray | None, region: np.ndarray) -> Image.Image:
    """A portrait under its map, if there is one, with the white border of a region (64, 64)."""
    picture = picture if values is None else overlay_heat_map(picture, values)
    scale = picture.width // region.shape[1]
    inside = np.kron(region, np.ones((scale, scale), dtype=bool))
    padded = np.pad(inside, 1, mode="edge")
    core = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    pixels = np.asarray(picture).copy()
    pixels[inside & ~core] = (255, 255, 255)
    return Image.fromarray(pixels)


# -------------------------------------------------------------------------------------------------------- command line


def adapter_names(args: argparse.Namespace) -> list[str]:
    """The LoRAs to be looked at, named as their folders are."""
    return [f"{run_name}-seed{seed}" for run_name in args.runs for seed in args.seeds]


def lora_files(args: argparse.Namespace) -> dict[str, Path]:
    """The files of all LoRAs, by target and name."""
    return {
        f"{target}/{run}-seed{seed}": run_folder(args.lora_dir, target, run, seed) / LORA_WEIGHTS
        for target in args.targets for run in args.runs for seed in args.seeds
    }  # fmt: skip


def load_adapters(tools: Tools, args: argparse.Namespace, target_name: str) -> None:
    """Put a target's LoRAs, and no others, on the UNet."""
    unet = tools.pipeline.unet
    if getattr(unet, "peft_config", None):
        unet.unload_lora()
    for name in adapter_names(args):
        folder = lora_files(args)[f"{target_name}/{name}"].parent
        unet.load_lora_adapter(str(folder), weight_name=LORA_WEIGHTS, adapter_name=name, prefix="unet")
    unet.requires_grad_(False)


def parse_args(input_args: Sequence[str] | None = None) -> argparse.Namespace:
    defaults = {"num_prompts": 48, "prompt_seed": 70201, "batch_size": 32, "seeds": [101]}
    parser = drawing.make_parser(__doc__, "map_quality", **defaults)
    folder = drawing.ROOT / "runs" / "preservation"
    parser.add_argument("--lora_dir", type=Path, default=folder, help="Output folder of benchmarks/preservation.py.")
    parser.add_argument(
        "--runs", nargs="+", choices=(*CONTROLS, *METHODS), default=["composed", "stage1", "plain"],
        help="Whose maps; the first one's are in the picture and the pointing game.",
    )  # fmt: skip
    parser.add_argument("--num_portraits", type=int, default=48, help="Rendered portraits a target.")
    parser.add_argument("--portrait_seed", type=int, default=70101, help="Of renders, prompts and noise.")
    parser.add_argument("--noise_samples", type=int, default=4, help="Noise samples a band, as in the training.")
    args = drawing.read_flags(parser, input_args)
    for weights in lora_files(args).values():
        if not weights.is_file():
            parser.error(f"--lora_dir: {weights} does not exist; train it with benchmarks/preservation.py")
    args.bands = list(BANDS)
    return args


def measure_target(target_name: str, args: argparse.Namespace) -> tuple[list[Row], list[list[tuple]]]:
    """All rows of a target, and its part of the picture."""
    tools, adapters, rows = load_tools(args.device), [ORIGINAL, *adapter_names(args)], []
    load_adapters(tools, args, target_name)
    # What is aligned on are portraits without the target; those with it are the exception.
    for kind, bands in (("without target", [*args.bands, TRAINING_BAND]), ("with target", [TRAINING_BAND])):
        scenes = regions.render_scenes(target_name, args.num_portraits, args.portrait_seed, kind == "with target")
        rows += measure_rendered(tools, scenes, kind, bands, adapters, args)
    rows += measure_generated(tools, target_name, adapters, args)
    few = regions.render_scenes(target_name, PICTURED, args.portrait_seed, with_target=False)
    return rows, map_pictures(tools, few, adapters[1], args)


def main(args: argparse.Namespace) -> None:
    args.output_dir.mkdir(parents=True, exist_ok=True)
    rows, pictures = [], []
    with drawing.worker_processes(args.workers) as pool:
        for found, row_pictures in pool.map(measure_target, args.targets, [args] * len(args.targets)):
            rows += found
            pictures += row_pictures
    drawing.save_rows(args.output_dir / "map_quality.png", pictures)
    loras = {name: drawing.file_digest(path) for name, path in lora_files(args).items()}
    map_report.write_tables(args, rows, loras)


if __name__ == "__main__":
    main(parse_args())
