"""What is measured of a LoRA's portraits, each measure one function and one entry in `MEASURES`, and intervals. [ours]

Legend: B or n portraits, H/W picture size in pixels, E size of an embedding, P prompts, S seeds of each prompt,
R resamples. Pictures are RGB in 0-255.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np


CONFIDENCE = 0.95
# What judges where the user names no other.
DEFAULT_MODELS = {
    "clip": "openai/clip-vit-large-patch14", "dino": "facebook/dinov2-base", "segmenter": "jonathandinu/face-parsing",
}  # fmt: skip


@dataclass(frozen=True)
class Portraits:
    """What a model drew, n portraits of all: `base` and `full` (n, H, W, 3) uint8."""

    base: np.ndarray
    full: np.ndarray


@dataclass(frozen=True)
class Compared:
    """A model's portraits beside the original model's, n of all, and who judges them."""

    original: Portraits
    adapted: Portraits
    region: np.ndarray  # (n, H, W) in [0, 1], where the target may change them
    pairs: Sequence[Any]  # n, the prompt of each
    judges: Any = None  # a `Judges`
    neutral_prompt: str | None = None  # what the leak is measured against; None is the base prompt
    # What a judge found, so that measures share it.
    _found: dict = field(default_factory=dict, init=False, repr=False)

    # The original model's of the base prompt; the adapted model's with the target, and of the base prompt alone.
    before = property(lambda self: self.original.base)
    after = property(lambda self: self.adapted.full)
    alone = property(lambda self: self.adapted.base)
    inside = property(lambda self: only_inside(self.before, self.after, self.region))

    def images(self, judge: str, *which: str) -> list[np.ndarray]:
        """What a judge makes of "before", "after", "alone" or "inside"."""
        read = getattr(self.judges, judge).images
        return [self._once((judge, name), lambda name=name: read(getattr(self, name))) for name in which]

    def texts(self, name: str) -> np.ndarray:
        """CLIP's embeddings of every pair's "target_text", "base_prompt" or "full_prompt", (n, E)."""
        return self._once(name, lambda: self.judges.clip.texts([getattr(pair, name) for pair in self.pairs]))

    def truth(self, name: str) -> np.ndarray:
        """What the toy world's probe reads in `before` and `after`, (n,)."""
        judges = self.judges
        return self._once("truth", lambda: judges.probe.compare(self.before, self.after, judges.target))[name]

    def _once(self, key: Any, find: Callable[[], Any]) -> Any:
        if key not in self._found:
            self._found[key] = find()
        return self._found[key]


@dataclass(frozen=True)
class Measure:
    """One row of the report."""

    label: str
    group: str  # "preservation", "response", "pollution" or "truth"
    direction: str  # "higher" or "lower", whichever is better
    about: str
    of: Callable[[Compared], Any] | None = None  # measures portraits, (n,); None for what comes from other measures
    asks: tuple[str, ...] = ()  # the judges that it needs
    stands_for: str | None = None  # a truth: their order over LoRAs should be the same, or reversed
    whole: str | None = None  # the judge that makes one number of all that `of` gave of both models' portraits


def _leak(part: Compared) -> np.ndarray:
    (alone,) = part.images("clip", "alone")
    if part.neutral_prompt is None:
        return nearer_to(alone, part.texts("full_prompt"), part.texts("base_prompt"))
    # A neutral text says nothing of the portrait, so neither does what is held against it.
    return nearer_to(alone, part.texts("target_text"), part.judges.clip.texts([part.neutral_prompt] * len(alone)))


def _direction(part: Compared) -> np.ndarray:
    texts = part.texts("base_prompt"), part.texts("full_prompt")
    return direction_similarity(*part.images("clip", "before", "inside"), *texts)


# In the order of the report.
MEASURES = {
    "change": Measure(
        "pixel change", "preservation", "lower", "Mean absolute difference to the original portrait, 0-255.",
        lambda part: pixel_change(part.before, part.after)),
    "change_outside": Measure(
        "pixel change outside", "preservation", "lower", "The same outside the target's region, 0-255.",
        lambda part: pixel_change(part.before, part.after, 1 - part.region), stands_for="truth_kept"),
    "ssim": Measure("SSIM", "preservation", "higher", "Structural similarity to the original portrait, at most 1.",
        lambda part: ssim(part.before, part.after), stands_for="truth_kept"),
    "lpips": Measure("LPIPS", "preservation", "lower", "Perceptual distance to the original portrait, AlexNet.",
        lambda part: part.judges.lpips(part.before, part.after), ("lpips",), "truth_kept"),
    "clip_i": Measure("CLIP-I", "preservation", "higher", "Cosine of the CLIP image embeddings of both portraits.",
        lambda part: cosine(*part.images("clip", "before", "after")), ("clip",), "truth_kept"),
    "dino": Measure("DINO", "preservation", "higher", "Cosine of the DINOv2 embeddings of both portraits.",
        lambda part: cosine(*part.images("dino", "before", "after")), ("dino",), "truth_kept"),
    "identity": Measure("identity", "preservation", "higher", "Cosine of both faces, where both are found.",
        lambda part: cosine(*part.images("face", "before", "after")), ("face",), "truth_kept"),
    "seg_cons": Measure("Seg-Cons", "preservation", "higher", "Share of pixels that face parsing labels alike.",
        lambda part: label_agreement(*part.images("segmenter", "before", "after")), ("segmenter",), "truth_kept"),
    "fid": Measure("FID", "preservation", "lower", "Fréchet distance of both sets of portraits, Inception features.",
        lambda part: part.images("inception", "before", "after"), ("frechet", "inception"), "truth_kept", "frechet"),
    "fd_dino": Measure("FD-DINOv2", "preservation", "lower", "The same with DINOv2 features.",
        lambda part: part.images("dino", "before", "after"), ("frechet", "dino"), "truth_kept", "frechet"),
    "clip_t": Measure("CLIP-T", "response", "higher", "Cosine of portrait and target text, CLIP.",
        lambda part: cosine(*part.images("clip", "after"), part.texts("target_text")), ("clip",), "truth_response"),
    "clip_t_inside": Measure(
        "CLIP-T inside", "response", "higher", "The same, with the original portrait outside the target's region.",
        lambda part: cosine(*part.images("clip", "inside"), part.texts("target_text")), ("clip",), "truth_response"),
    "direction": Measure("direction", "response", "higher",
        "Cosine of the change inside the region and that from base to full prompt, CLIP.",
        _direction, ("clip",), "truth_response"),
    "pollution": Measure(
        "pollution", "pollution", "lower", "What else moved: 0 is the original model, 1 the reference LoRA.",
        stands_for="truth_kept"),
    "base_change": Measure(
        "base prompt alone: pixel change", "pollution", "lower", "Change of the base prompt's portrait, 0-255.",
        lambda part: pixel_change(part.before, part.alone)),
    "leak": Measure("leak", "pollution", "lower",
        "Share of base-prompt portraits that CLIP finds nearer to the target's text than to the neutral one.",
        _leak, ("clip",), "truth_leak"),
    "truth_kept": Measure("factors kept", "truth", "higher", "Agreement of the factors that the probe reads.",
        lambda part: part.truth("kept"), ("probe",)),
    "truth_change_outside": Measure(
        "change outside the true region", "truth", "lower", "Outside the target's labels, as the probe reads them.",
        lambda part: part.truth("change_outside"), ("probe",)),
    "truth_response": Measure("target there", "truth", "higher", "Share of portraits in which the probe reads it.",
        lambda part: part.truth("response"), ("probe",)),
    "truth_leak": Measure("target there unasked", "truth", "lower", "The same with the base prompt alone.",
        lambda part: part.judges.probe.response(part.alone, part.judges.target)["response"], ("probe",)),
}  # fmt: skip


def measure(
    parts: Iterable[Compared], judges: Any, neutral_prompt: str | None = None
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """All measures of one model, but for those that ask for a judge that is None; one part at a time is in memory.

    Returns: Measures of each portrait, (B,), and those of the whole set, NaN for one portrait.
    """
    asked = {
        name: own
        for name, own in MEASURES.items()
        if own.of is not None and all(getattr(judges, judge) is not None for judge in own.asks)
    }
    found: dict[str, list] = {name: [] for name in asked}
    for part in parts:
        judged = replace(part, judges=judges, neutral_prompt=neutral_prompt)
        for name, own in asked.items():
            found[name].append(own.of(judged))
    values = {name: np.concatenate(found[name]) for name, own in asked.items() if own.whole is None}
    several = len(values["change"]) > 1
    whole = {
        name: getattr(judges, own.whole)(*map(np.concatenate, zip(*found[name]))) if several else float("nan")
        for name, own in asked.items()
        if own.whole is not None
    }
    return values, whole


def pixel_change(original: np.ndarray, adapted: np.ndarray, weight: np.ndarray | None = None) -> np.ndarray:
    """Mean absolute difference of portraits, (B,), by pixels' weight (B, H, W); NaN where that is 0 everywhere."""
    difference = np.abs(original.astype(np.float64) - adapted).mean(-1)
    if weight is None:
        return difference.mean((1, 2))
    total = weight.sum((1, 2), dtype=np.float64)
    return np.divide((difference * weight).sum((1, 2)), total, out=np.full(len(total), np.nan), where=total > 0)


def ssim(original: np.ndarray, adapted: np.ndarray) -> np.ndarray:
    """Structural similarity of portraits (B, H, W, 3), H and W at least 6: (B,) at most 1.

    Source: Wang et al., "Image Quality Assessment", IEEE Transactions on Image Processing 13(4), 2004; the mean over
    the whole picture, mirrored at its edges, and all channels.
    """
    # One after another, since doubles of all take much memory.
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
        length = values.shape[axis]
        padded = np.pad(values, [(5 * (axis == other), 5 * (axis == other)) for other in range(3)], mode="reflect")
        rows = np.moveaxis(padded, axis, 0)
        values = np.moveaxis(sum(weight * rows[i : i + length] for i, weight in enumerate(weights)), 0, axis)
    return values


def only_inside(original: np.ndarray, adapted: np.ndarray, region: np.ndarray) -> np.ndarray:
    """(B, H, W, 3) uint8: the adapted portraits inside the region, (B, H, W) in [0, 1], and the original ones outside.
    """
    original = original.astype(np.float64)
    return np.rint(original + region[..., None] * (adapted - original)).astype(np.uint8)


def cosine(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Cosines of embeddings (B, E): (B,) in [-1, 1], NaN where either is zero or NaN."""
    first, second = first.astype(np.float64), second.astype(np.float64)
    norms = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
    return np.divide((first * second).sum(-1), norms, out=np.full(len(norms), np.nan), where=norms > 0)


def direction_similarity(
    image_before: np.ndarray, image_after: np.ndarray, text_before: np.ndarray, text_after: np.ndarray
) -> np.ndarray:
    """Whether a portrait changed in CLIP's space as its prompt did: (B,) in [-1, 1], NaN where either did not change.

    Embeddings are (B, E). Source: Gal et al., "StyleGAN-NADA", arXiv 2108.00946.
    """
    embeds = (embed.astype(np.float64) for embed in (image_before, image_after, text_before, text_after))
    before, after, base, full = (embed / np.linalg.norm(embed, axis=-1, keepdims=True) for embed in embeds)
    return cosine(after - before, full - base)


def label_agreement(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Share of pixels (B, H, W) with one label: (B,) in [0, 1]. Source: [paper] Seg-Cons."""
    return (first == second).mean((1, 2))


def nearer_to(images: np.ndarray, target_text: np.ndarray, neutral_text: np.ndarray) -> np.ndarray:
    """1.0 where portraits are nearer to the target's text than to the neutral one, else 0.0; embeddings (B, E)."""
    return (cosine(images, target_text) > cosine(images, neutral_text)).astype(np.float64)


@dataclass(frozen=True)
class Estimate:
    """A number and the ends of its interval; `low` and `high` are None where there is none."""

    value: float
    low: float | None
    high: float | None


def resample_prompts(prompts: int, resamples: int, seed: int) -> np.ndarray:
    """(R, P) indices of prompts with replacement, (0, P) for a single one: a prompt's seeds stay together."""
    return np.random.default_rng(seed).integers(0, prompts, (resamples if prompts > 1 else 0, prompts))


def interval(samples: np.ndarray) -> tuple[float | None, float | None]:
    """The 2.5 % and 97.5 % quantiles of (R,) resampled values, NaN left out; None for too few."""
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
    """The mean of (P, S) values with its interval from `resample_prompts`; NaN does not count."""
    return Estimate(mean_of(values), *interval(resampled_means(values, resamples)))
