"""Is the map right? `python benchmarks/map_quality.py` holds maps against regions that are known.

Portraits are rendered, so that the region of a target and of each phrase is known to the pixel: the same portrait
is rendered without and with the target. They are noised at timesteps of several bands, the UNet predicts for base and
full prompt with and without a LoRA, and every SFCM mode makes its map. A second part takes the maps of the pipeline
while it draws, and the regions from the probe. The LoRAs are those that `benchmarks/preservation.py` trained.

A map has a value per latent pixel. A region enters as the *share* of each latent pixel's 4x4 picture pixels that
belong to it, so that neither is interpolated.

Legend: B portraits, h/w map size (16x16), N noise samples, P base phrases, T text tokens, K training seeds.
Source: [ours].
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from diffusers.utils import logging as diffusers_logging
from PIL import Image, ImageDraw, ImageFont


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from adapters import active_adapters  # noqa: E402
from attention_processors import (  # noqa: E402
    CrossAttentionFeatures,
    capture_cross_attention,
    phrase_map_resolution,
)
from benchmarks.preservation import (  # noqa: E402
    CONTROLS,
    METHODS,
    RUNS,
    WEIGHTS_NAME,
    DrawSettings,
    base_model_digest,
    file_digest,
    noise_of_prompts,
)
from benchmarks.rows import markdown_table, number, standard_error, without_nan  # noqa: E402
from families.prompt_embeds import PromptEmbeds  # noqa: E402
from families.stable_diffusion import StableDiffusion  # noqa: E402
from pictures import overlay_heat_map  # noqa: E402
from pipeline_spf_portrait import SPFPortraitPipeline  # noqa: E402
from prompts import PromptPair, make_prompt_pair, phrase_mask, tokenize_prompt_pair  # noqa: E402
from sfcm import SFCM_MODES, noise_difference, phrase_attention_maps  # noqa: E402
from toy_portraits.build import to_tensor  # noqa: E402
from toy_portraits.judge import PortraitJudge, ToyPrompt, base_prompts, target_region  # noqa: E402
from toy_portraits.recipe import BASE_MODEL  # noqa: E402
from toy_portraits.world import LABELS, SIZE, TARGETS, ToyTarget, render, sample_factors  # noqa: E402
from training.prompt_table import PromptTable, make_prompt_table  # noqa: E402


Band = tuple[int, int]

BANDS: tuple[Band, ...] = ((0, 200), (200, 400), (400, 600), (600, 800), (800, 1000))
TRAINING_BAND: Band = (600, 950)  # the trainer's default --sfcm_timesteps
MODES = tuple(name for name in SFCM_MODES if name != "none")
DEFAULT_MODE = "averaged_target"
TARGET_WORDS = "target words"
ORIGINAL = "original"
LABELS_OF_RUNS = {ORIGINAL: "original model"} | {name: RUNS[name].label for name in (*CONTROLS, *METHODS)}
# The literature forgives 15 of 224 pixels; of 64 that is 4, which is one latent pixel.
TOLERANCE = 4
RESAMPLES = 1000
PICTURED = 2  # portraits a target in the picture
# What the renderer knows of a phrase, by the phrase's last word.
PHRASE_KINDS = {
    "woman": "person",
    "man": "person",
    "hair": "hair",
    "jacket": "clothes",
    "background": "background",
    "glasses": "glasses",
}
KINDS = ("person", "hair", "clothes", "background", "glasses", TARGET_WORDS)


# ------------------------------------------------------------------------------------------------------------ measures


def region_shares(regions: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The share of each map pixel that a region covers.

    Args:
        regions: (B, H, W) bool.
        size: (h, w) of the map; H and W are multiples of it.

    Returns:
        (B, h, w) in [0, 1].
    """
    height, width = size
    blocks = regions.reshape(len(regions), height, regions.shape[1] // height, width, regions.shape[2] // width)
    return blocks.mean(axis=(2, 4), dtype=np.float64)


def grow(regions: np.ndarray, pixels: int) -> np.ndarray:
    """Regions (B, H, W) bool with all pixels that are no farther than `pixels` along either axis."""
    mask = torch.from_numpy(regions)[:, None].float()
    return torch.nn.functional.max_pool2d(mask, 2 * pixels + 1, 1, pixels)[:, 0].bool().numpy()


def area_under_curve(values: np.ndarray, shares: np.ndarray) -> float:
    """How often a picture pixel inside has a larger value than one outside; equal values count one half.

    Args:
        values: (h, w), any real range.
        shares: (h, w) in [0, 1], how much of each pixel is inside.

    Returns:
        In [0, 1]: 0.5 for a map that says nothing. NaN if there is no inside or no outside.
    """
    _, group = np.unique(values, return_inverse=True)
    inside = np.bincount(group.ravel(), shares.ravel())
    outside = np.bincount(group.ravel(), 1 - shares.ravel())
    pairs = inside.sum() * outside.sum()
    below = np.cumsum(outside) - outside
    return float((inside * (below + outside / 2)).sum() / pairs) if pairs > 0 else float("nan")


def separation(maps: np.ndarray, shares: np.ndarray) -> dict[str, np.ndarray]:
    """How well maps tell a region from the rest.

    Args:
        maps: (B, h, w).
        shares: (B, h, w) in [0, 1].

    Returns:
        (B,) each: `inside` and `outside`, the mean over picture pixels there, and `auc`. NaN without such pixels.
    """
    axes, rest = (1, 2), 1 - shares
    with np.errstate(invalid="ignore"):
        inside = (maps * shares).sum(axes) / shares.sum(axes)
        outside = (maps * rest).sum(axes) / rest.sum(axes)
    auc = np.array([area_under_curve(*pair) for pair in zip(maps, shares, strict=True)])
    return {"inside": inside, "outside": outside, "auc": auc}


def pointing(maps: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """The pointing game: how likely a picture pixel under a map's maximum lies in a region.

    Args:
        maps: (B, h, w).
        shares: (B, h, w) in [0, 1].

    Returns:
        (B,) in [0, 1]. Several maxima count equally, so that a flat map scores the region's area, which is chance.
    """
    peaks = maps == maps.max(axis=(1, 2), keepdims=True)
    return (shares * peaks).sum(axis=(1, 2)) / peaks.sum(axis=(1, 2))


def mass_inside(maps: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """The share (B,) of a map's sum that lies in a region; arguments as `pointing`. A map of zeros gives the area."""
    total = maps.sum(axis=(1, 2))
    inside = (maps * shares).sum(axis=(1, 2))
    return np.where(total > 0, inside / np.where(total > 0, total, 1), shares.mean(axis=(1, 2)))


def pointing_game(maps: np.ndarray, regions: np.ndarray) -> dict[str, np.ndarray]:
    """All of the pointing game.

    Args:
        maps: (B, h, w), zeros or more.
        regions: (B, H, W) bool, H and W multiples of h and w.

    Returns:
        (B,) each: `hit` and its `chance` (the region's area), the same with a `TOLERANCE`, the `mass` inside, and the
        `auc`. NaN where the region is empty.
    """
    shares = region_shares(regions, maps.shape[1:])
    tolerant = region_shares(grow(regions, TOLERANCE), maps.shape[1:])
    found = {
        "hit": pointing(maps, shares),
        "chance": shares.mean(axis=(1, 2)),
        "hit_tolerant": pointing(maps, tolerant),
        "chance_tolerant": tolerant.mean(axis=(1, 2)),
        "mass": mass_inside(maps, shares),
        "auc": separation(maps, shares)["auc"],
    }
    there = regions.any(axis=(1, 2))
    return {name: np.where(there, values, np.nan) for name, values in found.items()}


def ratio_error(inside: np.ndarray, outside: np.ndarray, seed: int = 0) -> float:
    """Standard error of `mean(inside) / mean(outside)` over (B,) portraits, from resamples of them; NaN for one."""
    if len(inside) < 2:
        return float("nan")
    samples = np.random.default_rng(seed).integers(0, len(inside), (RESAMPLES, len(inside)))
    means = outside[samples].mean(axis=1)
    return float(np.std(inside[samples].mean(axis=1) / means, ddof=1)) if means.min() > 0 else float("nan")


# ------------------------------------------------------------------------------------------------------------- regions


@dataclass(frozen=True)
class Scenes:
    """Portraits whose regions are known.

    Attributes:
        target_name: the target.
        prompts: B prompts.
        images: (B, 64, 64, 3) uint8, what is noised (or was drawn).
        labels: (B, 64, 64), of these pictures.
        drawn: (B, 64, 64) bool: where the target itself is, or would be.
        allowed: (B, 64, 64) bool: where `toy_portraits/judge.py` lets the target change a portrait; for the hat that
            is all of the hair too, and always a margin.
    """

    target_name: str
    prompts: list[ToyPrompt]
    images: np.ndarray
    labels: np.ndarray
    drawn: np.ndarray
    allowed: np.ndarray


def own_label(target: ToyTarget) -> int:
    """The label class of the target itself, the first of those in which it may change a portrait."""
    return LABELS.index(target.labels[0])


def render_scenes(target_name: str, count: int, seed: int, with_target: bool) -> Scenes:
    """Render portraits without the target or with it; the regions come from both.

    Args:
        target_name: of `TARGETS`.
        count: number of portraits B.
        seed: of their factors and prompts. Each target has portraits of its own.
        with_target: which of the two is the picture.
    """
    target = TARGETS[target_name]
    seed += list(TARGETS).index(target_name)
    # `base_prompts` draws these very factors first, so the prompts fit the portraits.
    factors = sample_factors(count, np.random.default_rng(seed))
    changed = {**factors, target.factor: np.full(count, target.value)}
    (images, labels), (changed_images, changed_labels) = render(factors), render(changed)
    return Scenes(
        target_name,
        base_prompts(target, count, seed),
        changed_images if with_target else images,
        changed_labels if with_target else labels,
        changed_labels == own_label(target),
        target_region(labels, changed_labels, target),
    )


def kind_of(phrase: str) -> str:
    """What the renderer calls what a phrase names. Raises KeyError for a phrase that is none of the toy world's."""
    return PHRASE_KINDS[phrase.split()[-1]]


def kind_regions(kind: str, scenes: Scenes) -> np.ndarray:
    """(B, 64, 64) bool: the region of a kind of phrase."""
    if kind == TARGET_WORDS:
        return scenes.drawn
    if kind == "person":
        return scenes.labels != LABELS.index("background")
    return scenes.labels == LABELS.index(kind)


def prompt_pairs(prompts: Sequence[ToyPrompt]) -> list[PromptPair]:
    return [make_prompt_pair(prompt.base_prompt, prompt.target_prompt, prompt.full_prompt) for prompt in prompts]


# ------------------------------------------------------------------------------------------------------------ the maps


@dataclass(frozen=True)
class Tools:
    """The toy model with the LoRAs to be looked at, and the judge."""

    pipeline: SPFPortraitPipeline
    judge: PortraitJudge
    device: str


@dataclass(frozen=True)
class BandMaps:
    """The maps of some portraits in one band of timesteps, by adapter ("original": none).

    Attributes:
        sfcm: per adapter and mode (1, B, h, w), from the difference averaged over all noise samples.
        single: the same from one noise sample each, (N, B, h, w).
        resolutions: per adapter the default mode's, with phrase maps of each other resolution, (1, B, h, w).
        phrases: per resolution of the layers (B, P, h, w), of the Reference Path, averaged over the noise samples.
        target: per adapter and resolution (B, 1, h, w), of the target's tokens in the Response Path.
        used: the resolution the SFCMs were made with.
    """

    sfcm: dict[str, dict[str, np.ndarray]]
    single: dict[str, dict[str, np.ndarray]]
    resolutions: dict[str, dict[tuple[int, int], np.ndarray]]
    phrases: dict[tuple[int, int], np.ndarray]
    target: dict[str, dict[tuple[int, int], np.ndarray]]
    used: tuple[int, int]


def load_tools(device: str) -> Tools:
    """The models, silent and in evaluation mode."""
    diffusers_logging.disable_progress_bar()
    pipeline = SPFPortraitPipeline.from_pretrained(BASE_MODEL, dtype=torch.float32).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return Tools(pipeline, PortraitJudge.from_pretrained(), device)


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


def band_maps(
    tools: Tools,
    latents: torch.Tensor,
    table: PromptTable,
    target_weights: torch.Tensor,
    rows: slice,
    samples: Sequence[tuple[torch.Tensor, torch.Tensor]],
    adapters: Sequence[str],
) -> BandMaps:
    """All maps of the portraits `rows` in one band.

    Args:
        tools: the models; the adapters are loaded.
        latents: (M, C, h, w) of all portraits.
        table: of their prompts, with `target_weights` (M, 1, T).
        rows: B of them.
        samples: of `noise_samples`, for all portraits.
        adapters: names; "original" is none, and its two differences are the same.
    """
    pipeline, size = tools.pipeline, latents.shape[-2:]
    embeds = table.prompt_embeds
    base, full = embeds[table.reference_rows[: len(latents)][rows]], embeds[table.response_rows[: len(latents)][rows]]
    references: list[CrossAttentionFeatures] = []
    responses: dict[str, list[CrossAttentionFeatures]] = {name: [] for name in adapters}
    differences: dict[tuple[str, bool], list[torch.Tensor]] = {(n, own): [] for n in adapters for own in (False, True)}
    for noise, timesteps in samples:
        steps = timesteps[rows].to(tools.device)
        noisy = pipeline.scheduler.add_noise(latents[rows], noise[rows].to(tools.device), steps)
        reference_pred, features = predict(pipeline.unet, ORIGINAL, noisy, steps, base)
        references.append(features)
        for name in adapters:
            response_pred, features = predict(pipeline.unet, name, noisy, steps, full)
            responses[name].append(features)
            start_pred = reference_pred
            if name != ORIGINAL:
                start_pred, _ = predict(pipeline.unet, name, noisy, steps, base)
            differences[name, False].append(noise_difference(response_pred, reference_pred))
            differences[name, True].append(noise_difference(response_pred, start_pred))

    resolutions = references[0].resolutions
    used = phrase_map_resolution(resolutions)
    weights, distances, present = table.phrase_weights[rows], table.distances[rows], table.phrase_mask[rows]

    def attention(features: Sequence[CrossAttentionFeatures], of: torch.Tensor, resolution: tuple) -> torch.Tensor:
        layers = [probs for one in features for probs in one.at_resolution(resolution).attention_probs.values()]
        return phrase_attention_maps(layers, [resolution] * len(layers), of, size)

    def sfcm(mode: str, name: str, phrases: torch.Tensor, chosen: slice) -> np.ndarray:
        difference = torch.stack(differences[name, SFCM_MODES[mode].target_only][chosen]).mean(0)
        return SFCM_MODES[mode].compute(difference, phrases, distances, present)[:, 0].cpu().numpy()

    phrases = {size: attention(references, weights, size) for size in sorted(set(resolutions.values()))}
    each = [attention(references[i : i + 1], weights, used) for i in range(len(samples))]
    return BandMaps(
        {n: {m: sfcm(m, n, phrases[used], slice(None))[None] for m in MODES} for n in adapters},
        {
            n: {m: np.stack([sfcm(m, n, own, slice(i, i + 1)) for i, own in enumerate(each)]) for m in MODES}
            for n in adapters
        },
        {
            n: {s: sfcm(DEFAULT_MODE, n, maps, slice(None))[None] for s, maps in phrases.items() if s != used}
            for n in adapters
        },
        {size: maps.cpu().numpy() for size, maps in phrases.items()},
        {n: {s: attention(responses[n], target_weights[rows], s).cpu().numpy() for s in phrases} for n in adapters},
        used,
    )


def join_maps(parts: Sequence[BandMaps]) -> BandMaps:
    """The maps of several chunks of portraits as those of all."""
    first = parts[0]

    def nested(name: str, axis: int) -> dict:
        return {
            key: {inner: np.concatenate([getattr(p, name)[key][inner] for p in parts], axis) for inner in values}
            for key, values in getattr(first, name).items()
        }

    phrases = {size: np.concatenate([part.phrases[size] for part in parts]) for size in first.phrases}
    sfcms = (nested(name, 1) for name in ("sfcm", "single", "resolutions"))
    return BandMaps(*sfcms, phrases, nested("target", 0), first.used)


# ----------------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Row:
    """One map held against one region.

    Attributes:
        portraits: "without target" or "with target" (rendered), or "generated".
        target_name: the target.
        band: lowest and highest timestep, or None for all steps of a drawing.
        run_name: whose Response Path it is.
        map_name: an SFCM mode, or a kind of phrase.
        detail: the number of noise samples of an SFCM, the resolution of a phrase's map.
        measures: (K, B) each, NaN where a portrait has no such region or phrase.
    """

    portraits: str
    target_name: str
    band: Band | None
    run_name: str
    map_name: str
    detail: str
    measures: dict[str, np.ndarray]

    def by_portrait(self, name: str) -> np.ndarray:
        """A measure's mean over training seeds, of the portraits that have it: the unit standard errors count."""
        values = self.measures[name].mean(axis=0)
        return values[~np.isnan(values)]


def map_separation(maps: np.ndarray, scenes: Scenes) -> dict[str, np.ndarray]:
    """Maps (N, B, h, w) against both regions, (B,) each, averaged over N: `inside`, `outside`, `auc`, `allowed_…`."""
    size = maps.shape[-2:]
    drawn, allowed = region_shares(scenes.drawn, size), region_shares(scenes.allowed, size)
    found = {"area": drawn.mean(axis=(1, 2))}
    for prefix, shares in (("", drawn), ("allowed_", allowed)):
        samples = [separation(sample, shares) for sample in maps]
        found |= {prefix + name: np.mean([one[name] for one in samples], axis=0) for name in samples[0]}
    return found


def phrase_games(
    phrase_maps: np.ndarray, phrases: Sequence[Sequence[str]], scenes: Scenes
) -> dict[str, dict[str, np.ndarray]]:
    """The pointing game of each kind of base phrase.

    Args:
        phrase_maps: (B, P, h, w).
        phrases: per portrait its phrases, in the order of the maps.
        scenes: the portraits.

    Returns:
        By kind the measures of `pointing_game`, NaN for portraits whose prompt has no such phrase.
    """
    games = {}
    for kind in KINDS[:-1]:
        places = [next((i for i, text in enumerate(row) if kind_of(text) == kind), None) for row in phrases]
        if any(place is not None for place in places):
            maps = np.stack([phrase_maps[b, place or 0] for b, place in enumerate(places)])
            missing = np.array([place is None for place in places])
            game = pointing_game(maps, kind_regions(kind, scenes))
            games[kind] = {name: np.where(missing, np.nan, values) for name, values in game.items()}
    return games


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
    tools: Tools,
    scenes: Scenes,
    portraits: str,
    bands: Sequence[Band],
    adapters: Sequence[str],
    args: argparse.Namespace,
) -> list[Row]:
    """All maps of rendered portraits, against the renderer's regions."""
    pairs = prompt_pairs(scenes.prompts)
    table, target_weights = prompt_table(tools, pairs)
    latents = encode(tools, scenes.images)
    phrases, rows = [pair.base_phrases for pair in pairs], []
    for band in bands:
        samples = noise_samples(len(latents), band, args.noise_samples, args.portrait_seed, latents.shape[1:])
        starts = range(0, len(latents), args.batch_size)
        chunks = [slice(start, start + args.batch_size) for start in starts]
        maps = join_maps(
            [band_maps(tools, latents, table, target_weights, chunk, samples, adapters) for chunk in chunks]
        )
        key = (portraits, scenes.target_name, band)
        for run_name, names in by_seed(adapters).items():
            for mode in MODES:
                many = stack([map_separation(maps.sfcm[name][mode], scenes) for name in names])
                one = stack([map_separation(maps.single[name][mode], scenes) for name in names])
                rows.append(Row(*key, run_name, mode, f"{args.noise_samples} noises", many))
                rows.append(Row(*key, run_name, mode, "one noise", one))
            for size in maps.resolutions[names[0]]:
                found = [map_separation(maps.resolutions[name][size], scenes) for name in names]
                detail = f"{args.noise_samples} noises, phrases at {resolution_text(size, maps.used)}"
                rows.append(Row(*key, run_name, DEFAULT_MODE, detail, stack(found)))
            for size in maps.phrases:
                own = [maps.target[name][size] for name in names]
                found = [map_separation(m.swapaxes(0, 1), scenes) | pointing_game(m[:, 0], scenes.drawn) for m in own]
                rows.append(Row(*key, run_name, TARGET_WORDS, resolution_text(size, maps.used), stack(found)))
        for size, phrase_maps in maps.phrases.items():
            for kind, game in phrase_games(phrase_maps, phrases, scenes).items():
                rows.append(Row(*key, ORIGINAL, kind, resolution_text(size, maps.used), stack([game])))
        print(f"{portraits}, {scenes.target_name}, t {band[0]}-{band[1]}: measured", flush=True)
    return rows


def resolution_text(size: tuple[int, int], used: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}" + (" (used)" if size == used else "")


def draw_with_maps(
    tools: Tools, prompts: Sequence[ToyPrompt], latents: torch.Tensor, args: argparse.Namespace
) -> list[dict]:
    """The pipeline's portraits and maps, one dictionary a prompt; prompts with one target are drawn together."""
    goals: dict[str | tuple[str, str], list[int]] = {}
    for i, prompt in enumerate(prompts):
        replaced, goal = prompt.replaced_phrase, prompt.target_prompt
        goals.setdefault(goal if replaced is None else (replaced, goal), []).append(i)
    drawn: dict[int, dict] = {}
    for goal, members in goals.items():
        for start in range(0, len(members), args.batch_size):
            chunk = members[start : start + args.batch_size]
            output = tools.pipeline(
                [prompts[i].base_prompt for i in chunk],
                target_prompt=[goal],
                latents=latents[chunk].to(tools.device),
                num_inference_steps=args.num_inference_steps,
                guidance_scale=args.guidance_scale,
                compare=True,
                return_sfcm=True,
                sfcm_mode="averaged",
                output_type="np",
            )
            for place, i in enumerate(chunk):
                drawn[i] = {
                    "image": output.images[place],
                    "reference": output.reference_images[place],
                    "sfcm": output.sfcm[place, 0].numpy(),
                    "phrases": output.phrases[place],
                    "phrase_maps": output.phrase_maps[place].numpy(),
                }
    return [drawn[i] for i in range(len(prompts))]


def draw_scenes(
    tools: Tools, target_name: str, adapter: str, args: argparse.Namespace
) -> tuple[Scenes, np.ndarray, np.ndarray, list]:
    """Draw portraits with a LoRA; the regions are the probe's, of these and of the original model's portraits.

    Returns:
        The portraits; their SFCMs (B, h, w) and phrase maps (B, P, h, w) as the pipeline returns them, averaged over
        the denoising steps; their phrases.
    """
    target = TARGETS[target_name]
    prompts = base_prompts(target, args.num_prompts, args.prompt_seed)
    latents = noise_of_prompts(DrawSettings(num_prompts=args.num_prompts, prompt_seed=args.prompt_seed))
    tools.pipeline.unet.set_adapters(adapter)
    drawn = draw_with_maps(tools, prompts, latents, args)
    images, references = (
        np.rint(np.stack([one[name] for one in drawn]) * 255).astype(np.uint8) for name in ("image", "reference")
    )
    labels, before = tools.judge.read(images).labels, tools.judge.read(references).labels
    region = (labels == own_label(target)) | (before == own_label(target))
    scenes = Scenes(target_name, prompts, images, labels, region, target_region(before, labels, target))
    longest = max(len(one["phrase_maps"]) for one in drawn)
    padded = [np.pad(m, ((0, longest - len(m)), (0, 0), (0, 0))) for m in (one["phrase_maps"] for one in drawn)]
    return scenes, np.stack([one["sfcm"] for one in drawn]), np.stack(padded), [one["phrases"] for one in drawn]


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


# ------------------------------------------------------------------------------------------------------------- writing


def select(rows: Iterable[Row], **wanted: object) -> list[Row]:
    """The rows whose attributes have these values."""
    return [row for row in rows if all(getattr(row, name) == value for name, value in wanted.items())]


def summarise(row: Row) -> dict[str, dict[str, float]]:
    """Per measure the mean over portraits, its standard error and their number; `ratio` is inside to outside."""
    summary = {}
    for name in row.measures:
        values = row.by_portrait(name)
        mean = float(values.mean()) if len(values) else float("nan")
        summary[name] = {"mean": mean, "standard_error": standard_error(values), "portraits": len(values)}
    if "inside" in summary:
        inside, outside = row.by_portrait("inside"), row.by_portrait("outside")
        ratio = float(inside.mean() / outside.mean()) if outside.mean() > 0 else float("nan")
        summary["ratio"] = {
            "mean": ratio,
            "standard_error": ratio_error(inside, outside),
            "portraits": len(inside),
        }
    return summary


def cell(summary: dict[str, dict[str, float]], name: str) -> str:
    """Mean and standard error of a measure; with one portrait, the mean alone."""
    return number(summary[name]["mean"], summary[name]["standard_error"])


def separation_table(rows: Sequence[Row], first: str, name_of: Callable[[Row], str]) -> str:
    """Inside, outside, ratio and both AUCs, a row a map."""
    header = [first, "inside", "outside", "ratio", "AUC", "AUC, allowed region"]
    lines = []
    for row in rows:
        summary = summarise(row)
        lines.append([name_of(row), *(cell(summary, m) for m in ("inside", "outside", "ratio", "auc", "allowed_auc"))])
    return markdown_table(header, lines)


def band_text(band: Band | None) -> str:
    if band is None:
        return "all steps"
    return f"{band[0]}-{band[1]}" + (" (training's)" if band == TRAINING_BAND else "")


def auc_table(lines: dict[str, Sequence[Row]], bands: Sequence[Band]) -> str:
    """AUC, a column a band; `lines` holds each line's rows by its name."""
    cells = {name: {row.band: cell(summarise(row), "auc") for row in rows} for name, rows in lines.items()}
    return markdown_table(
        ["", *map(band_text, bands)], [[name, *(by[b] for b in bands)] for name, by in cells.items()]
    )


def pool(rows: Sequence[Row]) -> Row:
    """Rows of several targets as one, their portraits side by side."""
    names = rows[0].measures
    return replace(
        rows[0],
        target_name="all",
        measures={name: np.concatenate([row.measures[name] for row in rows], axis=1) for name in names},
    )


def game_table(rows: Sequence[Row], name_of: Callable[[Row], str]) -> str:
    """The pointing game, a row a phrase and resolution; the chance is the region's share of the picture."""
    tolerant = (f"hit, {TOLERANCE} px", f"chance, {TOLERANCE} px")
    header = ["", "portraits", "hit", "chance", *tolerant, "mass inside", "AUC"]
    names = ("hit", "chance", "hit_tolerant", "chance_tolerant", "mass", "auc")
    lines = []
    for row in rows:
        summary = summarise(row)
        cells = [cell(summary, n) if "chance" not in n else number(summary[n]["mean"]) for n in names]
        lines.append([name_of(row), str(summary["hit"]["portraits"]), *cells])
    return markdown_table(header, lines)


def game_rows(rows: Sequence[Row], run_name: str, **wanted: object) -> list[Row]:
    """The rows of each kind of base phrase, pooled over targets, and of each target's words with one run."""
    found = []
    for kind in KINDS[:-1]:
        own = select(rows, map_name=kind, **wanted)
        for detail in dict.fromkeys(row.detail for row in own):
            found.append(pool(select(own, detail=detail)))
    return found + select(rows, map_name=TARGET_WORDS, run_name=run_name, **wanted)


def game_name(row: Row) -> str:
    what = f'"{TARGETS[row.target_name].prompt}"' if row.map_name == TARGET_WORDS else row.map_name
    return f"{what}, {row.detail}"


def ceiling(scenes: Scenes, size: tuple[int, int]) -> float:
    """The AUC of the best map of a size: each pixel's value is the region's share of it."""
    shares = region_shares(scenes.drawn, size)
    return float(separation(shares, shares)["auc"].mean())


def explanation(args: argparse.Namespace) -> str:
    """What was measured, with which settings, and what the columns mean."""
    seeds = ", ".join(map(str, args.seeds))
    return f"""\
{args.num_portraits} rendered portraits a target (seed {args.portrait_seed}), {args.noise_samples} noise samples a
band, LoRAs of training seed {seeds} from `benchmarks/preservation.py`; {args.num_prompts} generated portraits a target
(seed {args.prompt_seed}), {args.num_inference_steps} DDIM steps, guidance scale {args.guidance_scale:g}.
± is one standard error over portraits.

*Inside* and *outside*: the map's mean over picture pixels where the target is drawn (the hair, the hat, the clothes
of the rendering with the target; in generated portraits the probe's, of the original or the new one) and everywhere
else; *ratio*: of the two means. *AUC*: how often a pixel inside has a larger value than one outside, .5 for a map
that says nothing. *Allowed region*: the same against the region in which the judge lets the target change a
portrait, which for the hat is all of the hair too, and everywhere has a margin of 2 pixels. *Hit*: how often a map's
maximum lies in the region; *chance*: the region's share of the picture. With {TOLERANCE} px: the region grown by
{TOLERANCE} pixels, as the pointing game is usually played with 15 of 224. *Mass inside*: the share of the map's sum
that lies in the region; a flat map's is the chance.
"""


def band_cell(row: Row) -> str:
    """Inside and outside of a map, without errors."""
    summary = summarise(row)
    return f"{summary['inside']['mean']:.2f} / {summary['outside']['mean']:.2f}"


def summary_section(rows: Sequence[Row], args: argparse.Namespace) -> str:
    """The README's two tables: the first run's map by band, and every run's at the training's timesteps."""
    bands, many = [*args.bands, TRAINING_BAND], f"{args.noise_samples} noises"
    rows = [row for row in rows if row.portraits == "without target"]
    default = select(rows, map_name=DEFAULT_MODE, detail=many)
    lines = []
    for name in args.targets:
        own = {row.band: row for row in select(default, target_name=name, run_name=args.runs[0])}
        lines.append([TARGETS[name].prompt, "inside / outside", *(band_cell(own[band]) for band in bands)])
        lines.append(["", "AUC", *(cell(summarise(own[band]), "auc") for band in bands)])
    parts = [f"\n## In short\n\n`{DEFAULT_MODE}`, {many}, {LABELS_OF_RUNS[args.runs[0]]}, by timesteps:\n\n"]
    parts += [markdown_table(["", "", *map(band_text, bands)], lines)]

    others = [(DEFAULT_MODE, "one noise"), ("averaged", many), ("averaged_noise", many), ("paper", "one noise")]
    lines = []
    for name in args.targets:
        for run_name in args.runs:
            own = select(rows, target_name=name, run_name=run_name, band=TRAINING_BAND)
            summary = summarise(select(own, map_name=DEFAULT_MODE, detail=many)[0])
            line = [TARGETS[name].prompt, LABELS_OF_RUNS[run_name]]
            line += [cell(summary, measure) for measure in ("inside", "outside", "ratio", "auc")]
            line += [cell(summarise(select(own, map_name=mode, detail=d)[0]), "auc") for mode, d in others]
            words = [row for row in select(own, map_name=TARGET_WORDS) if row.detail.endswith("(used)")]
            lines.append([*line, cell(summarise(words[0]), "auc")])
    header = ["", "", "inside", "outside", "ratio", "AUC", *(f"`{mode}`, {d}" for mode, d in others), TARGET_WORDS]
    parts += ["\nAt the training's timesteps; from the second AUC on, those of other maps:\n\n"]
    return "".join([*parts, markdown_table(header, lines)])


def default_name(row: Row) -> str:
    """The band, and which portraits if they are not those of the original model's kind."""
    return band_text(row.band) + (", portraits with target" if row.portraits == "with target" else "")


def target_section(target_name: str, rows: Sequence[Row], args: argparse.Namespace) -> str:
    """All tables of a target."""
    scenes = render_scenes(target_name, args.num_portraits, args.portrait_seed, with_target=False)
    bands, many = [*args.bands, TRAINING_BAND], f"{args.noise_samples} noises"
    rows = select(rows, target_name=target_name)
    default = select(rows, map_name=DEFAULT_MODE, detail=many)
    parts = [
        f'\n## "{TARGETS[target_name].prompt}"\n\n',
        f"The target's region is {scenes.drawn.mean():.3f} of a picture. A perfect map of 16x16 latent pixels, which "
        f"mix inside and\noutside at the border, has AUC {ceiling(scenes, (SIZE // 4, SIZE // 4)):.3f}.\n",
    ]
    for run_name in args.runs:
        parts += [f"\n`{DEFAULT_MODE}`, {many}, {LABELS_OF_RUNS[run_name]}:\n\n"]
        parts += [separation_table(select(default, run_name=run_name), "timesteps", default_name)]
    plain = select(default, portraits="without target")
    lines = {LABELS_OF_RUNS[name]: select(plain, run_name=name) for name in (*args.runs, ORIGINAL)}
    parts += [f"\nAUC of `{DEFAULT_MODE}`, {many}, portraits without target:\n\n", auc_table(lines, bands)]
    for run_name in args.runs:
        found = select(rows, run_name=run_name, portraits="without target")
        details = dict.fromkeys((row.map_name, row.detail) for row in found if row.map_name in MODES)
        lines = {f"`{m}`, {d}": select(found, map_name=m, detail=d) for m, d in sorted(details)}
        lines["target words' attention"] = [
            row for row in select(found, map_name=TARGET_WORDS) if row.detail.endswith("(used)")
        ]
        heading = f"\nAUC of every map, {LABELS_OF_RUNS[run_name]}, portraits without target:\n\n"
        parts += [heading, auc_table(lines, bands)]
    parts += ["\nGenerated portraits, the pipeline's map (`averaged`, over all steps):\n\n"]
    generated = select(rows, portraits="generated", map_name="averaged")
    parts += [separation_table(generated, "", lambda row: LABELS_OF_RUNS[row.run_name])]
    return "".join(parts)


def write_results(args: argparse.Namespace, rows: Sequence[Row]) -> None:
    """Write results.json and table.md."""
    entries = [
        {
            "portraits": row.portraits,
            "target": row.target_name,
            "timesteps": row.band,
            "run": row.run_name,
            "map": row.map_name,
            "detail": row.detail,
            "measures": summarise(row),
        }
        for row in rows
    ]
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    loras = {
        f"{target_name}/{name}": file_digest(lora_folder(args, target_name, name) / WEIGHTS_NAME)
        for target_name in args.targets
        for name in adapter_names(args)
    }
    document = {"settings": settings, "base_model": base_model_digest(), "loras": loras, "rows": entries}
    text = json.dumps(without_nan(document), indent=1, allow_nan=False)
    (args.output_dir / "results.json").write_text(text + "\n", encoding="utf-8")

    parts = [explanation(args), summary_section(rows, args)]
    parts += [target_section(name, rows, args) for name in args.targets]
    run_name = args.runs[0]
    parts += [
        "\n## The pointing game\n\nBase phrases in the Reference Path, over all targets; the targets' words in the "
        f"Response Path of {LABELS_OF_RUNS[run_name]}.\nMaps of the layers of one resolution, averaged over "
        f"{args.noise_samples} noises; portraits without target.\n"
    ]
    for band in (*args.bands, TRAINING_BAND):
        found = game_rows(rows, run_name, portraits="without target", band=band)
        parts += [f"\nTimesteps {band_text(band)}:\n\n", game_table(found, game_name)]
    found = game_rows(select(rows, run_name=run_name), run_name, portraits="generated")
    parts += [f"\nPortraits generated with {LABELS_OF_RUNS[run_name]}, the probe's regions:\n\n"]
    parts += [game_table(found, game_name)]
    (args.output_dir / "table.md").write_text("".join(parts), encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------- picture


def outline(picture: Image.Image, region: np.ndarray) -> Image.Image:
    """Draw a region's (64, 64) border onto a picture that is a multiple as large."""
    scale = picture.width // region.shape[1]
    inside = np.kron(region, np.ones((scale, scale), dtype=bool))
    padded = np.pad(inside, 1, mode="edge")
    core = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    pixels = np.asarray(picture).copy()
    pixels[inside & ~core] = (255, 255, 255)
    return Image.fromarray(pixels)


def map_pictures(tools: Tools, scenes: Scenes, adapter: str, args: argparse.Namespace) -> list[list[tuple]]:
    """Per portrait its pictures with their captions: the region, the default map of each band, the phrases' maps."""
    pairs, side = prompt_pairs(scenes.prompts), 2 * SIZE
    table, target_weights = prompt_table(tools, pairs)
    latents = encode(tools, scenes.images)
    rows = [[] for _ in pairs]

    def add(row: int, text: str, values: np.ndarray | None, region: np.ndarray) -> None:
        picture = Image.fromarray(scenes.images[row]).resize((side, side), Image.Resampling.NEAREST)
        picture = picture if values is None else overlay_heat_map(picture, values)
        rows[row].append((text, outline(picture, region)))

    for i in range(len(pairs)):
        add(i, f"{TARGETS[scenes.target_name].prompt}?", None, scenes.drawn[i])
    for band in (*args.bands, TRAINING_BAND):
        samples = noise_samples(len(latents), band, args.noise_samples, args.portrait_seed, latents.shape[1:])
        maps = band_maps(tools, latents, table, target_weights, slice(None), samples, [adapter])
        if band != TRAINING_BAND:
            for i in range(len(pairs)):
                add(i, f"SFCM, t {band_text(band)}", maps.sfcm[adapter][DEFAULT_MODE][0, i], scenes.drawn[i])
    for i, pair in enumerate(pairs):
        add(i, f"words: {pair.target_text}", maps.target[adapter][maps.used][i, 0], scenes.drawn[i])
        for place, phrase in enumerate(pair.base_phrases[:3]):
            add(i, phrase, maps.phrases[maps.used][i, place], kind_regions(kind_of(phrase), scenes)[i])
    return rows


def draw_picture(rows: Sequence[Sequence[tuple]], title: str) -> Image.Image:
    """Rows of captioned pictures under a title, in few colours to keep the file small."""
    side, gap, text_height, head = 2 * SIZE, 5, 17, 22
    width = max(map(len, rows)) * (side + gap) + gap
    picture = Image.new("RGB", (width, head + len(rows) * (side + text_height + gap)), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size=12)
    pen.text((gap, 3), title, fill="black", font=font)
    for i, row in enumerate(rows):
        top = head + i * (side + text_height + gap)
        for place, (text, tile) in enumerate(row):
            left = gap + place * (side + gap)
            pen.text((left, top), text, fill="black", font=font)
            picture.paste(tile, (left, top + text_height))
    return picture.quantize(256)


# -------------------------------------------------------------------------------------------------------- command line


def adapter_names(args: argparse.Namespace) -> list[str]:
    """The LoRAs to be looked at, named as their folders are."""
    return [f"{run_name}-seed{seed}" for run_name in args.runs for seed in args.seeds]


def lora_folder(args: argparse.Namespace, target_name: str, name: str) -> Path:
    return args.lora_dir / "runs" / target_name / name


def load_adapters(tools: Tools, args: argparse.Namespace, target_name: str) -> None:
    """Put a target's LoRAs, and no others, on the UNet."""
    unet = tools.pipeline.unet
    if getattr(unet, "peft_config", None):
        unet.unload_lora()
    for name in adapter_names(args):
        folder = lora_folder(args, target_name, name)
        unet.load_lora_adapter(str(folder), weight_name=WEIGHTS_NAME, adapter_name=name, prefix="unet")
    unet.requires_grad_(False)


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--lora_dir",
        type=Path,
        default=ROOT / "runs" / "preservation",
        help="Output folder of benchmarks/preservation.py: LoRAs are in runs/<target>/<run>-seed<seed>.",
    )
    parser.add_argument(
        "--output_dir", type=Path, default=ROOT / "runs" / "map_quality", help="Tables, numbers and picture."
    )
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="Toy targets.")
    parser.add_argument(
        "--runs",
        nargs="+",
        choices=(*CONTROLS, *METHODS),
        default=["composed", "stage1", "plain"],
        help="Whose maps; the first one's are in the picture and the pointing game.",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[101], help="Training seeds.")
    parser.add_argument("--num_portraits", type=int, default=48, help="Rendered portraits a target.")
    parser.add_argument(
        "--portrait_seed", type=int, default=70101, help="Of renders, prompts and noise; nothing was chosen on them."
    )
    parser.add_argument("--noise_samples", type=int, default=4, help="Noise samples a band, as in the training.")
    parser.add_argument("--num_prompts", type=int, default=48, help="Generated portraits a target and LoRA.")
    parser.add_argument("--prompt_seed", type=int, default=70201, help="Of their prompts and noise.")
    parser.add_argument("--num_inference_steps", type=int, default=15)
    parser.add_argument("--guidance_scale", type=float, default=4.0)
    parser.add_argument("--batch_size", type=int, default=32, help="Portraits a forward.")
    parser.add_argument("--workers", type=int, default=2, help="Processes of one thread; each takes a target.")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(input_args)
    for name in ("num_portraits", "noise_samples", "num_prompts", "num_inference_steps", "batch_size", "workers"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    for target_name in args.targets:
        for name in adapter_names(args):
            weights = lora_folder(args, target_name, name) / WEIGHTS_NAME
            if not weights.is_file():
                parser.error(f"--lora_dir: {weights} does not exist; train it with benchmarks/preservation.py")
    args.bands = list(BANDS)
    return args


def measure_target(target_name: str, args: argparse.Namespace) -> tuple[list[Row], list[list[tuple]]]:
    """All rows of a target, and its part of the picture."""
    tools, adapters, rows = load_tools(args.device), [ORIGINAL, *adapter_names(args)], []
    load_adapters(tools, args, target_name)
    for with_target in (False, True):
        scenes = render_scenes(target_name, args.num_portraits, args.portrait_seed, with_target)
        kind = "with target" if with_target else "without target"
        # What is aligned on are portraits without the target; those with it are the exception.
        bands = [TRAINING_BAND] if with_target else [*args.bands, TRAINING_BAND]
        rows += measure_rendered(tools, scenes, kind, bands, adapters, args)
    rows += measure_generated(tools, target_name, adapters, args)
    few = render_scenes(target_name, PICTURED, args.portrait_seed, with_target=False)
    return rows, map_pictures(tools, few, adapters[1], args)


def main(args: argparse.Namespace) -> None:
    args.output_dir.mkdir(parents=True, exist_ok=True)
    rows, pictures = [], []
    with ProcessPoolExecutor(args.workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        for found, row_pictures in pool.map(measure_target, args.targets, [args] * len(args.targets)):
            rows += found
            pictures += row_pictures
    write_results(args, rows)
    title = (
        f"{LABELS_OF_RUNS[args.runs[0]]}, {DEFAULT_MODE}, {args.noise_samples} noises a map. White: the region. "
        f"Attention to words: t {band_text(TRAINING_BAND)}."
    )
    draw_picture(pictures, title).save(args.output_dir / "map_quality.png", optimize=True)
    print((args.output_dir / "table.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main(parse_args())
