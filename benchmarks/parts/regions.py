"""Maps held against regions that are known: portraits of the renderer, and measures of how well a map fits a region.

A map has a value per latent pixel. A region enters as the *share* of each latent pixel's 4x4 picture pixels that
belong to it, so that neither is interpolated.

Legend: B portraits, h/w map size (16x16), H/W of the pictures (64x64).
Source: [ours].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from prompts import PromptPair, make_prompt_pair
from toy_portraits.judge import ToyPrompt, base_prompts, target_region
from toy_portraits.world import LABELS, TARGETS, ToyTarget, render, sample_factors


# The literature forgives 15 of 224 pixels; of 64 that is 4, which is one latent pixel.
TOLERANCE = 4
RESAMPLES = 1000
TARGET_WORDS = "target words"
# What the renderer knows of a phrase, by the phrase's last word.
PHRASE_KINDS = {"woman": "person", "man": "person", "hair": "hair", "jacket": "clothes"}
PHRASE_KINDS |= {name: name for name in ("background", "glasses")}
KINDS = tuple(dict.fromkeys(PHRASE_KINDS.values()))


# ------------------------------------------------------------------------------------------------------------ measures


def region_shares(regions: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(B, h, w) in [0, 1]: the share of each map pixel that a region (B, H, W) covers; H and W are multiples of it."""
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
    """How well maps (B, h, w) tell a region from the rest, by shares (B, h, w).

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
    """(B,): how likely a picture pixel under a map's maximum lies in a region.

    Several maxima count equally, so that a flat map scores the region's area, which is chance.
    """
    peaks = maps == maps.max(axis=(1, 2), keepdims=True)
    return (shares * peaks).sum(axis=(1, 2)) / peaks.sum(axis=(1, 2))


def mass_inside(maps: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """The share (B,) of a map's sum that lies in a region. A map of zeros gives the area."""
    total = maps.sum(axis=(1, 2))
    inside = (maps * shares).sum(axis=(1, 2))
    return np.where(total > 0, inside / np.where(total > 0, total, 1), shares.mean(axis=(1, 2)))


def pointing_game(maps: np.ndarray, regions: np.ndarray) -> dict[str, np.ndarray]:
    """All of the pointing game of maps (B, h, w), zeros or more, and regions (B, H, W) bool.

    Returns:
        (B,) each: `hit` and its `chance` (the region's area), the same with a `TOLERANCE`, the `mass` inside, and the
        `auc`. NaN where the region is empty.
    """
    shares, tolerant = (region_shares(own, maps.shape[1:]) for own in (regions, grow(regions, TOLERANCE)))
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
    """Portraits whose regions are known, (B, 64, 64) each."""

    target_name: str
    prompts: list[ToyPrompt]
    images: np.ndarray  # (B, 64, 64, 3) uint8, what is noised, or was drawn
    labels: np.ndarray
    drawn: np.ndarray  # bool: where the target itself is, or would be
    # bool: where the judge lets the target change a portrait; for the hat all of the hair too, and always a margin.
    allowed: np.ndarray


def own_label(target: ToyTarget) -> int:
    """The label class of the target itself, the first of those in which it may change a portrait."""
    return LABELS.index(target.labels[0])


def render_scenes(target_name: str, count: int, seed: int, with_target: bool) -> Scenes:
    """Render portraits without the target or with it, others for each target; the regions come from both."""
    target = TARGETS[target_name]
    seed += list(TARGETS).index(target_name)
    # `base_prompts` draws these very factors first, so the prompts fit the portraits.
    factors = sample_factors(count, np.random.default_rng(seed))
    changed = {**factors, target.factor: np.full(count, target.value)}
    both = render(factors), render(changed)
    (_, labels), (_, changed_labels) = both
    return Scenes(
        target_name,
        base_prompts(target, count, seed),
        *both[with_target],
        changed_labels == own_label(target),
        target_region(labels, changed_labels, target),
    )


def kind_of(phrase: str) -> str:
    """What the renderer calls what a phrase names. Raises KeyError for a phrase that is none of the toy world's."""
    return PHRASE_KINDS[phrase.split()[-1]]


def kind_regions(kind: str, scenes: Scenes) -> np.ndarray:
    """(B, 64, 64) bool: the region of a kind of phrase."""
    if kind == "person":
        return scenes.labels != LABELS.index("background")
    return scenes.labels == LABELS.index(kind)


def prompt_pairs(prompts: Sequence[ToyPrompt]) -> list[PromptPair]:
    return [make_prompt_pair(prompt.base_prompt, prompt.target_prompt, prompt.full_prompt) for prompt in prompts]


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
    """The pointing game of each kind of base phrase; NaN for portraits whose prompt has no such phrase.

    `phrase_maps` are (B, P, h, w), in the order of each portrait's `phrases`.
    """
    games = {}
    for kind in KINDS:
        places = [next((i for i, text in enumerate(row) if kind_of(text) == kind), None) for row in phrases]
        if any(place is not None for place in places):
            maps = np.stack([phrase_maps[b, place or 0] for b, place in enumerate(places)])
            missing = np.array([place is None for place in places])
            game = pointing_game(maps, kind_regions(kind, scenes))
            games[kind] = {name: np.where(missing, np.nan, values) for name, values in game.items()}
    return games


def ceiling(scenes: Scenes, size: tuple[int, int]) -> float:
    """The AUC of the best map of a size: each pixel's value is the region's share of it."""
    shares = region_shares(scenes.drawn, size)
    return float(separation(shares, shares)["auc"].mean())
