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

from toy_portraits.judge import ToyPrompt, base_prompts
from toy_portraits.world import LABELS, TARGETS, ToyTarget, render, sample_factors


# What the renderer knows of a phrase, by the phrase's last word.
PHRASE_KINDS = {"woman": "person", "man": "person", "hair": "hair", "jacket": "clothes"}
PHRASE_KINDS |= {name: name for name in ("background", "glasses")}
KINDS = tuple(dict.fromkeys(PHRASE_KINDS.values()))


def region_shares(regions: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(B, h, w) in [0, 1]: the share of each map pixel that a region (B, H, W) covers; H and W are multiples of it."""
    height, width = size
    blocks = regions.reshape(len(regions), height, regions.shape[1] // height, width, regions.shape[2] // width)
    return blocks.mean(axis=(2, 4), dtype=np.float64)


def area_under_curve(values: np.ndarray, shares: np.ndarray) -> float:
    """How often a picture pixel inside has a larger value than one outside; equal values count one half.

    `values` are (h, w), any real range; `shares` (h, w) in [0, 1] is how much of each pixel is inside. 0.5 for a map
    that says nothing, NaN if there is no inside or no outside.
    """
    _, group = np.unique(values, return_inverse=True)
    inside = np.bincount(group.ravel(), shares.ravel())
    outside = np.bincount(group.ravel(), 1 - shares.ravel())
    pairs = inside.sum() * outside.sum()
    below = np.cumsum(outside) - outside
    return float((inside * (below + outside / 2)).sum() / pairs) if pairs > 0 else float("nan")


def separation(maps: np.ndarray, shares: np.ndarray) -> dict[str, np.ndarray]:
    """How well maps (B, h, w) tell a region from the rest, by shares (B, h, w).

    (B,) each: `inside` and `outside`, the mean over picture pixels there, and `auc`. NaN without such pixels.
    """
    axes, rest = (1, 2), 1 - shares
    with np.errstate(invalid="ignore"):
        inside = (maps * shares).sum(axes) / shares.sum(axes)
        outside = (maps * rest).sum(axes) / rest.sum(axes)
    auc = np.array([area_under_curve(*pair) for pair in zip(maps, shares, strict=True)])
    return {"inside": inside, "outside": outside, "auc": auc}


def pointing_game(maps: np.ndarray, regions: np.ndarray) -> dict[str, np.ndarray]:
    """How likely a picture pixel under the maximum of maps (B, h, w) lies in regions (B, H, W) bool.

    (B,) each: `hit`, several maxima counting equally, so that a flat map scores the region's area; that `chance`; and
    `auc`. NaN where the region is empty.
    """
    shares, axes = region_shares(regions, maps.shape[1:]), (1, 2)
    peaks = maps == maps.max(axes, keepdims=True)
    hit = (shares * peaks).sum(axes) / peaks.sum(axes)
    found = {"hit": hit, "chance": shares.mean(axes), "auc": separation(maps, shares)["auc"]}
    return {name: np.where(regions.any(axes), values, np.nan) for name, values in found.items()}


@dataclass(frozen=True)
class Scenes:
    """Portraits whose regions are known, (B, 64, 64) each."""

    prompts: list[ToyPrompt]
    images: np.ndarray  # (B, 64, 64, 3) uint8, what is noised, or was drawn
    labels: np.ndarray
    drawn: np.ndarray  # bool: where the target is, or would be


def own_label(target: ToyTarget) -> int:
    """The label class of the target itself, the first of those in which it may change a portrait."""
    return LABELS.index(target.labels[0])


def render_scenes(target_name: str, count: int, seed: int) -> Scenes:
    """Render portraits without the target, others for each target; its region is where the same with it has it."""
    target = TARGETS[target_name]
    seed += list(TARGETS).index(target_name)
    # `base_prompts` draws these very factors first, so the prompts fit the portraits.
    factors = sample_factors(count, np.random.default_rng(seed))
    images, labels = render(factors)
    _, changed = render({**factors, target.factor: np.full(count, target.value)})
    return Scenes(base_prompts(target, count, seed), images, labels, changed == own_label(target))


def kind_of(phrase: str) -> str:
    """What the renderer calls what a phrase names. Raises KeyError for a phrase that is none of the toy world's."""
    return PHRASE_KINDS[phrase.split()[-1]]


def kind_regions(kind: str, scenes: Scenes) -> np.ndarray:
    """(B, 64, 64) bool: the region of a kind of phrase."""
    if kind == "person":
        return scenes.labels != LABELS.index("background")
    return scenes.labels == LABELS.index(kind)


def map_separation(maps: np.ndarray, scenes: Scenes) -> dict[str, np.ndarray]:
    """`separation` of maps (N, B, h, w), averaged over N, from the target's region."""
    shares = region_shares(scenes.drawn, maps.shape[-2:])
    samples = [separation(sample, shares) for sample in maps]
    return {name: np.mean([one[name] for one in samples], axis=0) for name in samples[0]}


def phrase_games(
    phrase_maps: np.ndarray, phrases: Sequence[Sequence[str]], scenes: Scenes
) -> dict[str, dict[str, np.ndarray]]:
    """The pointing game of each kind of base phrase; NaN for portraits whose prompt has no such phrase.

    `phrase_maps` are (B, P, h, w), in the order of each portrait's `phrases`.
    """
    games = {}
    for kind in KINDS:
        places = [next((i for i, text in enumerate(row) if kind_of(text) == kind), None) for row in phrases]
        missing = np.array([place is None for place in places])
        if not missing.all():
            maps = np.stack([phrase_maps[b, place or 0] for b, place in enumerate(places)])
            game = pointing_game(maps, kind_regions(kind, scenes))
            games[kind] = {name: np.where(missing, np.nan, values) for name, values in game.items()}
    return games


def ceiling(scenes: Scenes, size: tuple[int, int]) -> float:
    """The AUC of the best map of a size: each pixel's value is the region's share of it."""
    shares = region_shares(scenes.drawn, size)
    return float(separation(shares, shares)["auc"].mean())
