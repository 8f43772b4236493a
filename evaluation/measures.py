"""How far a LoRA moved the original model's portraits, whether its target is there, and how sure that is.

Pure functions of arrays; whoever calls them brings pictures and embeddings.

Legend: B portraits, H/W picture size in pixels, E size of an embedding, P prompts, S seeds of each prompt,
R resamples, K checkpoints. Pictures are RGB in 0-255.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


CONFIDENCE = 0.95
CLEAN_INDEX = 0.1  # pollution below this share of the reference LoRA's is near 0
CLEAN_CHANGE = 1.0  # and, without a reference, below one grey level of 255


@dataclass(frozen=True)
class Measure:
    """One row of the report.

    Attributes:
        label: how the report calls it.
        group: "preservation", "response", "pollution" or "truth".
        direction: "higher" or "lower", whichever is better.
        about: what it is, in a sentence.
    """

    label: str
    group: str
    direction: str
    about: str


MEASURES = {
    "change": Measure(
        "pixel change", "preservation", "lower", "Mean absolute difference to the original portrait, 0-255."
    ),
    "change_outside": Measure(
        "pixel change outside", "preservation", "lower", "The same outside the target's region, 0-255."
    ),
    "ssim": Measure("SSIM", "preservation", "higher", "Structural similarity to the original portrait, at most 1."),
    "lpips": Measure("LPIPS", "preservation", "lower", "Perceptual distance to the original portrait, AlexNet."),
    "clip_i": Measure("CLIP-I", "preservation", "higher", "Cosine of the CLIP image embeddings of both portraits."),
    "dino": Measure("DINO", "preservation", "higher", "Cosine of the DINOv2 embeddings of both portraits."),
    "identity": Measure("identity", "preservation", "higher", "Cosine of both faces, where both are found."),
    "seg_cons": Measure("Seg-Cons", "preservation", "higher", "Share of pixels that face parsing labels alike."),
    "fid": Measure("FID", "preservation", "lower", "Fréchet distance of both sets of portraits, Inception features."),
    "fd_dino": Measure("FD-DINOv2", "preservation", "lower", "The same with DINOv2 features."),
    "clip_t": Measure("CLIP-T", "response", "higher", "Cosine of portrait and target text, CLIP."),
    "clip_t_inside": Measure(
        "CLIP-T inside", "response", "higher", "The same, with the original portrait outside the target's region."
    ),
    "direction": Measure(
        "direction", "response", "higher",
        "Cosine of the change inside the region and that from base to full prompt, CLIP.",
    ),
    "pollution": Measure(
        "pollution", "pollution", "lower", "What else moved: 0 is the original model, 1 the reference LoRA."
    ),
    "base_change": Measure(
        "base prompt alone: pixel change", "pollution", "lower", "Change of the base prompt's portrait, 0-255."
    ),
    "leak": Measure(
        "leak", "pollution", "lower",
        "Share of base-prompt portraits that CLIP finds nearer to the target's text than to the neutral one.",
    ),
    "truth_kept": Measure("factors kept", "truth", "higher", "Agreement of the factors that the probe reads."),
    "truth_change_outside": Measure(
        "change outside the true region", "truth", "lower", "Outside the target's labels, as the probe reads them."
    ),
    "truth_response": Measure("target there", "truth", "higher", "Share of portraits in which the probe reads it."),
    "truth_leak": Measure("target there unasked", "truth", "lower", "The same with the base prompt alone."),
}  # fmt: skip
@dataclass(frozen=True)
class Judge:
    """A model that measures ask: the one that is taken where none is named, and the measures that need it."""

    default: str | None
    measures: tuple[str, ...]


JUDGES = {
    "clip": Judge("openai/clip-vit-large-patch14", ("clip_i", "clip_t", "clip_t_inside", "direction", "leak")),
    "dino": Judge("facebook/dinov2-base", ("dino", "fd_dino")),
    "segmenter": Judge("jonathandinu/face-parsing", ("seg_cons",)),
    "face": Judge(None, ("identity",)),
}
# Which measure stands for which truth where that is known: their order over LoRAs should be the same, or reversed.
PROXIES = {
    "change_outside": "truth_kept",
    "ssim": "truth_kept",
    "lpips": "truth_kept",
    "clip_i": "truth_kept",
    "dino": "truth_kept",
    "identity": "truth_kept",
    "seg_cons": "truth_kept",
    "fid": "truth_kept",
    "fd_dino": "truth_kept",
    "pollution": "truth_kept",
    "clip_t": "truth_response",
    "clip_t_inside": "truth_response",
    "direction": "truth_response",
    "leak": "truth_leak",
}


# ------------------------------------------------------------------------------------------------------------ measures


def pixel_change(original: np.ndarray, adapted: np.ndarray, weight: np.ndarray | None = None) -> np.ndarray:
    """Mean absolute difference of portraits.

    Args:
        original, adapted: (B, H, W, 3) in 0-255.
        weight: (B, H, W) in [0, 1], how much each pixel counts; None counts all alike.

    Returns:
        (B,) in 0-255; NaN where no pixel counts.

    Source: [ours].
    """
    difference = np.abs(original.astype(np.float64) - adapted).mean(-1)
    if weight is None:
        return difference.mean((1, 2))
    total = weight.sum((1, 2), dtype=np.float64)
    return np.divide((difference * weight).sum((1, 2)), total, out=np.full(len(total), np.nan), where=total > 0)


def ssim(original: np.ndarray, adapted: np.ndarray) -> np.ndarray:
    """Structural similarity of portraits, one after another: a whole set in double would not fit into memory.

    Args:
        original, adapted: (B, H, W, 3) in 0-255, H and W at least 6.

    Returns:
        (B,), at most 1.

    Source: Wang et al., "Image Quality Assessment", IEEE Transactions on Image Processing 13(4), 2004; the mean over
        the whole picture, mirrored at its edges, and all channels.
    """
    return np.array([_ssim_of(*pair) for pair in zip(original, adapted, strict=True)])


def _ssim_of(first: np.ndarray, second: np.ndarray) -> float:
    # In double, since variances are differences of large numbers here.
    first, second = first.astype(np.float64), second.astype(np.float64)
    steady = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_first, mean_second = _windowed_mean(first), _windowed_mean(second)
    square_first, square_second, product = mean_first**2, mean_second**2, mean_first * mean_second
    variances = _windowed_mean(first**2) - square_first + _windowed_mean(second**2) - square_second
    covariance = _windowed_mean(first * second) - product
    luminance = (2 * product + steady[0]) / (square_first + square_second + steady[0])
    return float((luminance * (2 * covariance + steady[1]) / (variances + steady[1])).mean())


def _windowed_mean(values: np.ndarray) -> np.ndarray:
    """The mean around each pixel of (H, W, 3), weighted by a Gaussian of 11 pixels and a deviation of 1.5."""
    weights = np.exp(-((np.arange(-5, 6) / 1.5) ** 2) / 2)
    weights /= weights.sum()
    for axis in (0, 1):
        length, edges = values.shape[axis], [(0, 0)] * 3
        edges[axis] = (5, 5)
        padded = np.pad(values, edges, mode="reflect")
        parts = (np.take(padded, range(start, start + length), axis) for start in range(11))
        values = sum(weight * part for weight, part in zip(weights, parts))
    return values


def only_inside(original: np.ndarray, adapted: np.ndarray, region: np.ndarray) -> np.ndarray:
    """The adapted portraits inside the region, and the original ones outside.

    Args:
        original, adapted: (B, H, W, 3) in 0-255.
        region: (B, H, W) in [0, 1].

    Returns:
        (B, H, W, 3) uint8.

    Source: [ours].
    """
    original = original.astype(np.float64)
    return np.rint(original + region[..., None] * (adapted - original)).astype(np.uint8)


def cosine(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Cosines of embeddings.

    Args:
        first, second: (B, E).

    Returns:
        (B,) in [-1, 1]; NaN where either is zero or NaN.

    Source: [ours].
    """
    first, second = first.astype(np.float64), second.astype(np.float64)
    norms = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
    return np.divide((first * second).sum(-1), norms, out=np.full(len(norms), np.nan), where=norms > 0)


def unit(embeds: np.ndarray) -> np.ndarray:
    """Embeddings (B, E) at length 1, float64. Source: [ours]."""
    embeds = embeds.astype(np.float64)
    return embeds / np.linalg.norm(embeds, axis=-1, keepdims=True)


def direction_similarity(
    image_before: np.ndarray, image_after: np.ndarray, text_before: np.ndarray, text_after: np.ndarray
) -> np.ndarray:
    """Whether a portrait changed in CLIP's space as its prompt did.

    Args:
        image_before, image_after, text_before, text_after: (B, E) embeddings of any length, taken at length 1.

    Returns:
        (B,) in [-1, 1]; NaN where portrait or prompt did not change.

    Source: Gal et al., "StyleGAN-NADA", arXiv 2108.00946.
    """
    return cosine(unit(image_after) - unit(image_before), unit(text_after) - unit(text_before))


def label_agreement(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Share of pixels with one label: (B, H, W) integers each, result (B,) in [0, 1]. Source: [paper] Seg-Cons."""
    return (first == second).mean((1, 2))


def nearer_to(images: np.ndarray, target_text: np.ndarray, neutral_text: np.ndarray) -> np.ndarray:
    """Where CLIP finds a portrait nearer to the target's text than to the neutral one.

    Args:
        images, target_text, neutral_text: (B, E).

    Returns:
        (B,) 1.0 or 0.0.

    Source: [ours].
    """
    return (cosine(images, target_text) > cosine(images, neutral_text)).astype(np.float64)


# ----------------------------------------------------------------------------------------------------------- intervals


@dataclass(frozen=True)
class Estimate:
    """A number and the ends of its interval; `low` and `high` are None where there is none."""

    value: float
    low: float | None
    high: float | None


def resample_prompts(prompts: int, resamples: int, seed: int) -> np.ndarray:
    """Prompts drawn with replacement: the seeds of a prompt stay together, since they are alike.

    Args:
        prompts: P.
        resamples: R.
        seed: source of all randomness.

    Returns:
        (R, P) indices of prompts; (0, P) for a single prompt, of which nothing can be resampled.

    Source: [ours] a bootstrap of clusters.
    """
    return np.random.default_rng(seed).integers(0, prompts, (resamples if prompts > 1 else 0, prompts))


def interval(samples: np.ndarray) -> tuple[float | None, float | None]:
    """The 2.5 % and 97.5 % quantiles of (R,) resampled values, NaN left out; None for too few. Source: [ours]."""
    samples = samples[~np.isnan(samples)]
    if len(samples) < 2:
        return None, None
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(samples, [tail, 1 - tail])
    return float(low), float(high)


def resampled_means(values: np.ndarray, resamples: np.ndarray) -> np.ndarray:
    """Means of (P, S) values, NaN left out, over each of (R, P) resamples: (R,), NaN where nothing is left."""
    counts = (~np.isnan(values)).sum(1)[resamples].sum(1)
    totals = np.nansum(values, axis=1)[resamples].sum(1)
    return np.divide(totals, counts, out=np.full(len(resamples), np.nan), where=counts > 0)


def mean_of(values: np.ndarray) -> float:
    """Mean of all that is not NaN; NaN if all is."""
    found = values[~np.isnan(values)]
    return float(found.mean()) if len(found) else float("nan")


def estimate_mean(values: np.ndarray, resamples: np.ndarray) -> Estimate:
    """The mean of a measure with its interval.

    Args:
        values: (P, S); NaN does not count.
        resamples: as of `resample_prompts`.

    Returns:
        The estimate; NaN if there is nothing to average.

    Source: [ours].
    """
    return Estimate(mean_of(values), *interval(resampled_means(values, resamples)))


# ----------------------------------------------------------------------------------------------------------- pollution


@dataclass(frozen=True)
class Changes:
    """What pollution is made of, (P, S) each: change outside with the full prompt, change with the base prompt."""

    outside: np.ndarray
    base: np.ndarray


def _excess(
    changes: Changes, original: Changes, mean: Callable[[np.ndarray], np.ndarray | float]
) -> np.ndarray | float:
    """`(outside - outside of the original model) + base`, in grey levels; `mean` is over a sample of portraits.

    What the original model moves outside the region when it is asked for the target is no LoRA's doing. Both terms
    are pixel changes in one unit, so they can be added.
    """
    return mean(changes.outside) - mean(original.outside) + mean(changes.base)


def pollution_samples(
    changes: Changes, original: Changes, reference: Changes | None, resamples: np.ndarray
) -> tuple[float, np.ndarray]:
    """The pollution index and its (R,) resampled values, which `estimate_pollution` makes an interval of.

    A ratio of sums: were each term normalised alone, one in which the reference hardly moves would rule the index.
    """

    def over_resamples(values: np.ndarray) -> np.ndarray:
        return resampled_means(values, resamples)

    value = _excess(changes, original, mean_of)
    samples = _excess(changes, original, over_resamples)
    if reference is not None:
        value = value / _excess(reference, original, mean_of)
        samples = samples / _excess(reference, original, over_resamples)
    return value, samples


def estimate_pollution(
    changes: Changes, original: Changes, reference: Changes | None, resamples: np.ndarray
) -> Estimate:
    """The pollution index: 0 for the original model and 1 for the reference LoRA.

    Args:
        changes: of the LoRA.
        original: of the original model, asked for the target untuned; its `base` is 0.
        reference: of the LoRA that counts as 1; None leaves the index in grey levels.
        resamples: as of `resample_prompts`; LoRA, original and reference are resampled together.

    Returns:
        The estimate. It may be negative, or larger than 1.

    Source: [ours].
    """
    value, samples = pollution_samples(changes, original, reference, resamples)
    return Estimate(value, *interval(samples))


def can_be_reference(reference: Changes, original: Changes, resamples: np.ndarray) -> bool:
    """Whether a LoRA pollutes at all, by its interval: else nothing can be measured in units of it."""
    estimate = estimate_pollution(reference, original, None, resamples)
    return (estimate.value if estimate.low is None else estimate.low) > 0


def flags_of(
    pollution: Estimate, normalised: bool, response: np.ndarray, original: np.ndarray, resamples: np.ndarray
) -> list[str]:
    """What is wrong with a LoRA that looks clean, or does nothing.

    Args:
        pollution: its index.
        normalised: whether that is in units of a reference LoRA, or in grey levels.
        response: (P, S), of the LoRA with the full prompts.
        original: (P, S), of the original model with the full prompts.
        resamples: as of `resample_prompts`.

    Returns:
        "over-aligned": nothing moved, and the target is not there either. "no response": the target is not there.
        The target is there if the response is above the original model's by its interval.

    Source: [paper] over-alignment; [ours] the rule.
    """
    difference = estimate_mean(response - original, resamples)
    least = difference.value if difference.low is None else difference.low
    if least > 0:
        return []
    near_zero = pollution.value < (CLEAN_INDEX if normalised else CLEAN_CHANGE)
    return ["over-aligned"] if near_zero else ["no response"]


# --------------------------------------------------------------------------------------------------------- checkpoints


def knee(pollution: Sequence[float], response: Sequence[float], origin: tuple[float, float]) -> int | None:
    """The checkpoint to keep: the most response for its pollution.

    Both are stretched to [0, 1] over the checkpoints and the original model, and the checkpoint with the largest
    response minus pollution is taken: the one that lies highest above the line from the least to the most of both.

    Args:
        pollution: K numbers, such as the pollution index.
        response: K numbers.
        origin: pollution and response of the original model.

    Returns:
        Its index, the first of equals; None if no checkpoint lies above the line.

    Source: Satopää et al., "Finding a Kneedle in a Haystack", ICDCS Workshops 2011; [ours] with the original model.
    """
    axes = []
    for values, start in zip((pollution, response), origin):
        points = np.array([start, *values], dtype=np.float64)
        span = points.max() - points.min()
        axes.append((points - points.min()) / span if span > 0 else np.zeros_like(points))
    heights = (axes[1] - axes[0])[1:]
    # Rounding alone lifts no point above the line, nor above its equals.
    return int(np.flatnonzero(heights > heights.max() - 1e-9)[0]) if heights.max() > 1e-9 else None
