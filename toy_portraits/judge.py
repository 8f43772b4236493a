"""The judge: what a model under test changed in the original model's portraits, and whether it drew the target.

Two readings of the target are kept apart: the probe's classifier, and a pixel rule of a few lines that shares only the
probe's segmentation with it. Every measure is one number per portrait, so that prompts can be paired and resampled.

Legend: B portraits, 64x64 pixels, RGB in 0-255 as uint8; label masks hold indices into `LABELS`.
Source: [ours].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .probe import CLASS_FACTORS, PIXEL_FACTORS, PortraitProbe
from .world import HAIR_COLORS, LABELS, SIZE, ToyTarget, caption_phrases, join_phrases, sample_factors


PROBE_FOLDER = Path(__file__).parent / "probe"
MARGIN = 2  # pixels around the target's region where antialiasing and the VAE mix it with its surroundings
# The renderer's light is within 1 +- 0.12 and paints the hair behind the head at 0.85.
GAINS = np.linspace(0.74, 1.14, 21, dtype=np.float32)
MIN_HAIR_PIXELS = 12
HAT_BAND = 9  # pixels above the face: a brim and the better part of a dome
HAT_SHARE = 0.4
STRIPE_PERIODS = (5.0, 5.5, 6.0, 6.5, 7.0)
STRIPE_AMPLITUDE = 30.0
HAIR_PHRASE_SHARE = 0.6  # of the base prompts, as in the training sets


@dataclass(frozen=True)
class ToyPrompt:
    """A base prompt, the same with the target, and what the target stands in for (None: it was added)."""

    base_prompt: str
    full_prompt: str
    target_prompt: str
    replaced_phrase: str | None


@dataclass(frozen=True)
class PortraitReading:
    """What the probe read: per factor (B,) classes or pixels, and (B, 64, 64) labels."""

    factors: dict[str, np.ndarray]
    labels: np.ndarray


def base_prompts(target: ToyTarget, count: int, seed: int) -> list[ToyPrompt]:
    """Draw fresh prompts from the world.

    Args:
        target: the target. If it sets the hair colour, no base prompt names one.
        count: number of prompts.
        seed: source of all randomness.

    Returns:
        The prompts; the target is appended, or put in the place of the phrase it replaces.

    Source: [ours].
    """
    rng = np.random.default_rng(seed)
    factors = sample_factors(count, rng)
    prompts = []
    for index in range(count):
        phrases = caption_phrases(factors, index)
        if rng.random() >= HAIR_PHRASE_SHARE or target.factor == "hair_color":
            del phrases["hair_color"]
        replaced = None if target.replaces is None else phrases[target.replaces]
        full = {**phrases, target.replaces or "target": target.prompt}
        prompts.append(ToyPrompt(join_phrases(phrases), join_phrases(full), target.prompt, replaced))
    return prompts


def is_blonde(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Whether the median colour of the hair is nearest to blonde, under whatever light fits best.

    Args:
        images: (B, 64, 64, 3) uint8.
        labels: (B, 64, 64) label masks.

    Returns:
        (B,) bool; False where there is hardly any hair.
    """
    palette = np.array(list(HAIR_COLORS.values()), dtype=np.float32)
    lit = GAINS[:, None, None] * palette
    blonde = list(HAIR_COLORS).index("blonde")
    verdicts = np.zeros(len(images), dtype=bool)
    for i, mask in enumerate(labels == LABELS.index("hair")):
        if mask.sum() >= MIN_HAIR_PIXELS:
            distance = np.linalg.norm(lit - np.median(images[i][mask], axis=0), axis=-1).min(axis=0)
            verdicts[i] = distance.argmin() == blonde
    return verdicts


def wears_red_hat(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Whether a good share of the band above the face is saturated red; arguments and result as `is_blonde`."""
    red, green, blue = (images[..., c].astype(np.float32) for c in range(3))
    # ginger hair has 0.42 as much green as red, the hat 0.17; lips, as red as the hat, are never above the face
    saturated = (red > 90) & (green < 0.3 * red) & (blue < 0.4 * red)
    verdicts = np.zeros(len(images), dtype=bool)
    for i, skin in enumerate(labels == LABELS.index("skin")):
        wide = np.flatnonzero(skin.sum(axis=1) >= 8)
        if len(wide):
            columns = np.flatnonzero(skin.any(axis=0))
            band = saturated[i, max(wide[0] - HAT_BAND, 0) : wide[0], columns[0] : columns[-1] + 1]
            verdicts[i] = band.size > 0 and band.mean() > HAT_SHARE
    return verdicts


def _stripe_amplitude(gray: np.ndarray, mask: np.ndarray) -> float:
    """The largest swing, in 0-255, of the rows' mean brightness inside a mask over the periods of stripes."""
    rows = np.flatnonzero(mask.sum(axis=1) >= 4)
    if len(rows) < 6:
        return 0.0
    profile = np.array([gray[row][mask[row]].mean() for row in rows])
    amplitudes = []
    for period in STRIPE_PERIODS:
        phase = 2 * np.pi * rows / period
        basis = np.column_stack([np.ones(len(rows)), rows - rows.mean(), np.sin(phase), np.cos(phase)])
        amplitudes.append(np.hypot(*np.linalg.lstsq(basis, profile, rcond=None)[0][2:]))
    return float(max(amplitudes))


def wears_stripes(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Whether the clothes' brightness swings along y as stripes do; arguments and result as `is_blonde`."""
    verdicts = np.zeros(len(images), dtype=bool)
    for i, mask in enumerate(labels == LABELS.index("clothes")):
        columns = np.flatnonzero(mask.any(axis=0))
        if len(columns):
            gray, middle = images[i].astype(np.float32).mean(axis=-1), (columns[0] + columns[-1] + 1) // 2
            # a generated shirt's stripes may not meet in the middle, so that both halves together show none
            halves = [_stripe_amplitude(gray[:, side], mask[:, side]) for side in (np.s_[:middle], np.s_[middle:])]
            verdicts[i] = np.mean(halves) > STRIPE_AMPLITUDE
    return verdicts


PIXEL_RULES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "hair_color": is_blonde,
    "hat": wears_red_hat,
    "clothes": wears_stripes,
}


def target_region(first_labels: np.ndarray, second_labels: np.ndarray, target: ToyTarget) -> np.ndarray:
    """Where the target may change a portrait: its labels in either picture, with a margin.

    Args:
        first_labels, second_labels: (B, 64, 64) label masks of the two pictures.
        target: the target; its `labels` count.

    Returns:
        (B, 64, 64) bool.
    """
    wanted = [LABELS.index(label) for label in target.labels]
    region = torch.from_numpy(np.isin(first_labels, wanted) | np.isin(second_labels, wanted))
    return torch.nn.functional.max_pool2d(region[:, None].float(), 2 * MARGIN + 1, 1, MARGIN)[:, 0].bool().numpy()


def kept_factors(target: ToyTarget) -> tuple[str, ...]:
    """The probe's discrete factors a target has to leave alone: all but its own.

    Hair colour does not count where the target may change hair: a hat hides all of a man's hair.
    """
    hidden = {target.factor} | ({"hair_color"} if "hair" in target.labels else set())
    return tuple(factor for factor in CLASS_FACTORS if factor not in hidden)


class PortraitJudge:
    """The measures, with a probe to read factors and regions.

    Args:
        probe: the probe, in evaluation mode.
        batch_size: portraits read at a time.
    """

    def __init__(self, probe: PortraitProbe, batch_size: int = 64):
        self.probe, self.batch_size = probe, batch_size

    @classmethod
    def from_pretrained(cls, folder: str | Path = PROBE_FOLDER) -> PortraitJudge:
        """A judge with the probe of a folder (default: the embedded one)."""
        return cls(PortraitProbe.from_pretrained(folder))

    def read(self, images: np.ndarray) -> PortraitReading:
        """Read portraits.

        Args:
            images: (B, 64, 64, 3) uint8.

        Returns:
            Factors and labels.

        Raises:
            ValueError: not such pictures.
        """
        if images.dtype != np.uint8 or images.shape[1:] != (SIZE, SIZE, 3):
            raise ValueError(f"The judge reads (B, {SIZE}, {SIZE}, 3) uint8, not {images.shape} {images.dtype}.")
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1)
        with torch.no_grad():
            parts = [self.probe(part) for part in pixels.split(self.batch_size)]
        out = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        factors = {name: out[name].argmax(1).numpy() for name in CLASS_FACTORS}
        factors |= {name: out[name].numpy() for name in PIXEL_FACTORS}
        return PortraitReading(factors, out["mask"].argmax(1).numpy().astype(np.uint8))

    def response(
        self, images: np.ndarray, target: ToyTarget, reading: PortraitReading | None = None
    ) -> dict[str, np.ndarray]:
        """Whether the target is there, by the probe and by the pixel rule.

        Args:
            images: (B, 64, 64, 3) uint8.
            target: the target.
            reading: of these images, if they were read before.

        Returns:
            `response` and `response_pixels`, (B,) floats, 0 or 1. On portraits of the base prompt this is the leak.
        """
        reading = reading or self.read(images)
        return {
            "response": (reading.factors[target.factor] == target.value).astype(np.float64),
            "response_pixels": PIXEL_RULES[target.factor](images, reading.labels).astype(np.float64),
        }

    def compare(self, original: np.ndarray, images: np.ndarray, target: ToyTarget) -> dict[str, np.ndarray]:
        """Judge a model's portraits against the original model's, of the base prompt and the same noise.

        Args:
            original: (B, 64, 64, 3) uint8, the original model's portraits of the base prompts.
            images: (B, 64, 64, 3) uint8, portraits of the model under test.
            target: the target.

        Returns:
            (B,) floats each: `response` and `response_pixels` of `images`; `change` and `change_outside` (the target's
            region), mean absolute difference in 0-255; `kept_<factor>`, 1 where the probe reads the factor alike in
            both; `kept`, their mean; `head_shift` in pixels.

        Raises:
            ValueError: the two stacks differ in shape.

        Source: [ours].
        """
        if original.shape != images.shape:
            raise ValueError(
                f"{images.shape} portraits cannot be compared with {original.shape} of the original model."
            )
        before, after = self.read(original), self.read(images)
        difference = np.abs(original.astype(np.float64) - images).mean(axis=-1)
        outside = ~target_region(before.labels, after.labels, target)
        area = outside.sum(axis=(1, 2))
        measures = self.response(images, target, after)
        measures["change"] = difference.mean(axis=(1, 2))
        measures["change_outside"] = (difference * outside).sum(axis=(1, 2)) / np.maximum(area, 1)
        for factor in kept_factors(target):
            measures[f"kept_{factor}"] = (before.factors[factor] == after.factors[factor]).astype(np.float64)
        measures["kept"] = np.mean([measures[f"kept_{factor}"] for factor in kept_factors(target)], axis=0)
        measures["head_shift"] = np.hypot(
            before.factors["head_x"] - after.factors["head_x"], before.factors["head_y"] - after.factors["head_y"]
        ).astype(np.float64)
        return measures
