"""Do the measures that a user has order LoRAs as the truth does? `python benchmarks/proxies.py`.

Takes the flags of `benchmarks/preservation.py`, and the portraits which that drew and kept: nothing is trained, and
nothing drawn again. Every LoRA of every row is one thing to order. What a user can measure without a probe (SSIM,
CLIP, pixels outside the SFCM, the pollution index) is rank-correlated with what the probe of the toy world knows.

Legend: N LoRAs, P prompts, R resamples of the prompts.
Source: [ours].
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import preservation
from benchmarks.parts import drawing, judging
from benchmarks.parts.drawing import ROOT, Originals
from benchmarks.parts.judging import Job
from benchmarks.parts.tables import markdown_table, with_interval, write_results
from evaluation.judges import Judges, load_judges
from evaluation.measures import (
    MEASURES,
    Compared,
    Estimate,
    Portraits,
    interval,
    mean_of,
    measure,
    pixel_change,
    resample_prompts,
    resampled_means,
)
from prompts import make_prompt_pair
from toy_portraits.recipe import BASE_MODEL
from toy_portraits.world import TARGETS


RESAMPLES = 400
CHUNK = 50  # resamples correlated at a time
# What the probe knows, and whether more or less of it is better.
TRUTHS = {
    "kept": ("factors kept", "higher"),
    "kept_skin": ("skin kept", "higher"),
    "change_outside": ("change outside the true region", "lower"),
    "head_shift": ("head shift", "lower"),
    "response": ("response", "higher"),
}
PROXIES = (
    "ssim", "lpips", "clip_i", "dino", "seg_cons", "identity", "change", "change_outside", "base_change", "pollution",
    "clip_t", "clip_t_inside", "direction",
)  # fmt: skip
OF_BASE_PORTRAITS = ("base_change", "pollution", "leak")  # guided rows have none


# ----------------------------------------------------------------------------------------------------------- measuring


@lru_cache(maxsize=1)
def _judges() -> Judges:
    """What judges here: the toy CLIP, and whatever of the defaults can be had."""
    names = ("dino_model_name_or_path", "segmenter_model_name_or_path", "face_model_name")
    clip = {"clip_model_name_or_path": str(BASE_MODEL / "clip")}
    judges = load_judges(argparse.Namespace(**clip, **dict.fromkeys(names)), "cpu", ask_network=False)
    judges.inception = None  # a number of the whole set
    return judges


def sfcm_region(maps: Sequence[np.ndarray], size: int) -> np.ndarray:
    """Where the target may change each portrait, as `evaluate_spf_portrait.py` takes it: the mean of the LoRAs' SFCMs.

    `maps` are (P, h, w) in [0, 1] each; returns (P, size, size).
    """
    mean = torch.from_numpy(np.mean(maps, axis=0, dtype=np.float64))[:, None]
    return F.interpolate(mean, (size, size), mode="bilinear", align_corners=False)[:, 0].numpy()


def measure_job(
    job: Job, args: argparse.Namespace, originals: Originals, region: np.ndarray
) -> dict[str, np.ndarray]:
    """What a user can measure of a job's portraits, (P,) each; kept on disk."""
    settings, cache_dir = drawing.draw_settings(args), args.output_dir / "cache"
    found = judging.judge_job(job, settings, cache_dir)
    base_images = originals.base_images if job.guided else found["base_images"]

    def make() -> dict[str, np.ndarray]:
        pairs = []
        for prompt in originals.prompts:
            goal = prompt.target_prompt
            goal = (prompt.replaced_phrase, goal) if prompt.replaced_phrase else goal
            pairs.append(make_prompt_pair(prompt.base_prompt, [goal]))
        before = Portraits(originals.base_images, originals.full_images)
        after = Portraits(base_images, found["full_images"])
        return measure([Compared(before, after, region, pairs)], _judges())[0]

    digest = hashlib.sha256(found["full_images"].tobytes() + base_images.tobytes() + region.tobytes()).hexdigest()
    measuring = ("evaluation/judges", "evaluation/measures")
    code = drawing.file_digest(*(ROOT / f"{name}.py" for name in measuring))
    key = ["proxies", job.target_name, digest, code, sorted(_judges().missing)]
    measures = drawing.cached_arrays(cache_dir, key, make)
    return {name: values for name, values in measures.items() if not (job.guided and name in OF_BASE_PORTRAITS)}


@dataclass(frozen=True)
class Measured:
    """All LoRAs of a target: by measure (N, P), NaN where a LoRA has no such measure."""

    proxies: dict[str, np.ndarray]
    truths: dict[str, np.ndarray]


def measure_target(args: argparse.Namespace, originals: Originals, truths: dict[Job, dict]) -> Measured:
    """Measure all LoRAs of a target; `truths` is what the probe found, by job.

    Raises:
        ValueError: no row was drawn with guidance, so that there is no SFCM.
    """
    settings, name = drawing.draw_settings(args), originals.target_name
    jobs = [job for job in truths if job.target_name == name]
    if not any(job.guided for job in jobs):
        raise ValueError(f"--runs {' '.join(args.runs)}: no way to train for {name} that is drawn with an SFCM.")
    maps = [judging.judge_job(job, settings, args.output_dir / "cache")["maps"] for job in jobs if job.guided]
    region = sfcm_region(maps, originals.base_images.shape[1])
    with drawing.worker_processes(args.workers) as pool:
        count = len(jobs)
        found = list(pool.map(measure_job, jobs, [args] * count, [originals] * count, [region] * count))
    untuned = pixel_change(originals.base_images, originals.full_images, 1 - region)
    nothing = np.full(len(originals.prompts), np.nan)
    for own in found:
        # The index over a reference LoRA is this over a number that is the same for all.
        own["pollution"] = own["change_outside"] - untuned + own.get("base_change", nothing)
    names = [name for name in PROXIES if any(name in own for own in found)]
    return Measured(
        {name: np.stack([own.get(name, nothing) for own in found]) for name in names},
        {name: np.stack([truths[job][name] for job in jobs]) for name in TRUTHS},
    )


# --------------------------------------------------------------------------------------------------------- correlating


def rank_correlations(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Spearman's rho and Kendall's tau-b of many pairs of series at once.

    The sum of the signs of a value's differences to all others is twice its mid-rank less a constant, so that both
    come from the same signs.

    `first` and `second` are (N, R), R series of N values; (R,) each, NaN where either is constant.

    Source: Spearman 1904; Kendall 1945.
    """
    signs = [np.sign(values[:, None] - values[None]) for values in (first, second)]
    ranks = [sign.sum(axis=1) for sign in signs]
    return tuple(
        np.divide((a * b).sum(axis=axis), norm, out=np.full(first.shape[1], np.nan), where=norm > 0)
        for (a, b), axis in ((ranks, 0), (signs, (0, 1)))
        for norm in [np.sqrt((a**2).sum(axis=axis) * (b**2).sum(axis=axis))]
    )


@dataclass(frozen=True)
class Correlation:
    """Of a proxy with a truth over N LoRAs: the value, and (R,) values of resampled prompts, both signed so that more
    means that the proxy's better is the truth's better; first Spearman's, then Kendall's."""

    values: tuple[float, float]
    samples: tuple[np.ndarray, np.ndarray]
    loras: int

    def estimates(self) -> tuple[Estimate, Estimate]:
        return tuple(Estimate(value, *interval(own)) for value, own in zip(self.values, self.samples, strict=True))


def means_of(values: np.ndarray, resamples: np.ndarray) -> np.ndarray:
    """(N, 1 + R): each LoRA's mean over prompts, then its resampled ones; (N, P) values, NaN left out."""
    return np.stack([np.append(mean_of(own), resampled_means(own[:, None], resamples)) for own in values])


def correlate(proxy: np.ndarray, truth: np.ndarray, sign: int) -> Correlation:
    """Correlate (N, 1 + R) of `means_of` over the LoRAs that have the proxy; `sign` -1 if less is as good as more."""
    has = ~np.isnan(proxy[:, 0])
    parts = [
        rank_correlations(proxy[has, start : start + CHUNK], truth[has, start : start + CHUNK])
        for start in range(0, proxy.shape[1], CHUNK)
    ]
    both = [sign * np.concatenate(own) for own in zip(*parts)]
    return Correlation(tuple(float(own[0]) for own in both), tuple(own[1:] for own in both), int(has.sum()))


def mean_correlation(found: Sequence[Correlation]) -> Correlation:
    """The mean over targets; prompt i of every target has the same portrait and noise behind it."""
    values = tuple(float(np.mean([own.values[k] for own in found])) for k in (0, 1))
    samples = tuple(np.mean([own.samples[k] for own in found], axis=0) for k in (0, 1))
    return Correlation(values, samples, sum(own.loras for own in found))


def correlate_all(measured: dict[str, Measured]) -> dict[str, dict[tuple[str, str], Correlation]]:
    """By target, and for several "mean over targets" and "all targets together"; then by proxy and truth."""
    first = next(iter(measured.values()))
    resamples = resample_prompts(next(iter(first.truths.values())).shape[1], RESAMPLES, 0)
    means = {
        target: [{n: means_of(values, resamples) for n, values in kind.items()} for kind in (own.proxies, own.truths)]
        for target, own in measured.items()
    }
    if len(means) > 1:
        kinds = list(zip(*means.values()))
        means["all targets together"] = [
            {name: np.concatenate([own[name] for own in kind]) for name in kind[0]} for kind in kinds
        ]
    found = {
        target: {(p, t): correlate(proxies[p], truths[t], sign_of(p, t)) for p in proxies for t in truths}
        for target, (proxies, truths) in means.items()
    }
    if len(measured) == 1:
        return found
    mean = {p: mean_correlation([found[target][p] for target in measured]) for p in next(iter(found.values()))}
    return {"mean over targets": mean} | found


def sign_of(proxy: str, truth: str) -> int:
    return 1 if MEASURES[proxy].direction == TRUTHS[truth][1] else -1


# ------------------------------------------------------------------------------------------------------------- writing


def write_tables(args: argparse.Namespace, found: dict, missing: dict[str, str]) -> None:
    """Write PROXIES.md and proxies.json."""
    parts, document = [explanation(args, missing)], []
    for target, pairs in found.items():
        title = f'"{TARGETS[target].prompt}"' if target in TARGETS else target
        parts.append(f"\n## {title[0].upper()}{title[1:]}\n")
        for place, statistic in enumerate(("Spearman's rho", "Kendall's tau-b")):
            lines = []
            for proxy in dict.fromkeys(proxy for proxy, _ in pairs):
                cells = [with_interval(pairs[proxy, truth].estimates()[place], signed=True) for truth in TRUTHS]
                lines.append([MEASURES[proxy].label, str(pairs[proxy, next(iter(TRUTHS))].loras), *cells])
            header = ["", "LoRAs", *(label for label, _ in TRUTHS.values())]
            parts.append(f"\n{statistic}:\n\n" + markdown_table(header, lines))
        for (proxy, truth), own in pairs.items():
            statistics = dict(zip(("spearman", "kendall"), map(asdict, own.estimates()), strict=True))
            document.append({"target": target, "proxy": proxy, "truth": truth, "loras": own.loras, **statistics})
    write_results(args, "".join(parts), ("PROXIES.md", "proxies.json"), correlations=document)


def explanation(args: argparse.Namespace, missing: dict[str, str]) -> str:
    left_out = "".join(
        f"- {MEASURES[name].label}: {reason.rstrip('.')}.\n" for name, reason in missing.items() if name in PROXIES
    )
    text = f"""\
Rank correlations of what a user can measure with what the probe of the toy world knows, over all LoRAs of the
preservation benchmark: each row and training seed is one LoRA. {args.num_prompts} prompts (seed {args.prompt_seed}),
{args.num_inference_steps} DDIM steps, guidance scale {args.guidance_scale:g}. The sign is such that +1 means: what the
measure finds better is better. Brackets are 95 % intervals from {RESAMPLES} resamples of the prompts; a resample is
noisier than the prompts themselves, so that the value lies near the upper end. *Outside* and *inside*, for the
measures, are those of the mean SFCM of the LoRAs, as in `evaluate_spf_portrait.py`; CLIP is the toy world's own. What
needs portraits of base prompts alone is over the LoRAs drawn without guidance.
"""
    return text + (f"\nNot computed:\n\n{left_out}" if left_out else "")


def main(input_args: Sequence[str] | None = None) -> None:
    args = preservation.parse_args(input_args, __doc__)
    settings, cache_dir = drawing.draw_settings(args), args.output_dir / "cache"
    originals, truths = judging.judge_all(preservation.jobs_of(args), settings, cache_dir, args.workers)
    measured = {name: measure_target(args, own, truths) for name, own in originals.items()}
    write_tables(args, correlate_all(measured), _judges().missing)


if __name__ == "__main__":
    main()
