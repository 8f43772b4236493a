"""Do the measures that a user has order LoRAs as the truth does? `python benchmarks/proxies.py`.

Takes the flags of `benchmarks/preservation.py`, and the portraits which that drew and kept. Every LoRA of every row is
one thing to order. What a user can measure without a probe (SSIM, CLIP, pixels outside the SFCM, the pollution index)
is rank-correlated with what the probe of the toy world knows.

Legend: N LoRAs, P prompts, R resamples of the prompts.
Source: [ours].
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import preservation
from benchmarks.parts import drawing, judging, tables
from benchmarks.parts.drawing import Originals
from benchmarks.parts.judging import Job
from evaluation import measures
from evaluation.judges import Judges, load_judges
from evaluation.measures import MEASURES, Compared, Estimate, Portraits
from toy_portraits.recipe import BASE_MODEL
from toy_portraits.world import SIZE


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
OF_BASE_PORTRAITS = ("base_change", "pollution")


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
    """What a user can measure of a job's portraits, (P,) each; guided and late ones have none of the base prompt
    alone."""
    found = judging.judge_job(job, drawing.draw_settings(args), args.output_dir / "cache")
    before = Portraits(originals.base_images, originals.full_images)
    after = Portraits(found.get("base_images", before.base), found["full_images"])
    pairs = drawing.prompt_pairs(originals.prompts)
    measured, _ = measures.measure([Compared(before, after, region, pairs)], _judges())
    untuned = measures.pixel_change(before.base, before.full, 1 - region)
    # The index over a reference LoRA is this over a number that is the same for all.
    measured["pollution"] = measured["change_outside"] - untuned + measured["base_change"]
    return {n: own for n, own in measured.items() if n in PROXIES and not (job.way and n in OF_BASE_PORTRAITS)}


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
    maps = [judging.judge_job(job, settings, args.output_dir / "cache")["maps"] for job in jobs if job.way == "guided"]
    if not maps:
        raise ValueError(f"--runs {' '.join(args.runs)}: no way to train for {name} that is drawn with an SFCM.")
    measuring = partial(measure_job, args=args, originals=originals, region=sfcm_region(maps, SIZE))
    with drawing.worker_processes(args.workers) as pool:
        found = list(pool.map(measuring, jobs))
    nothing, names = np.full(len(originals.prompts), np.nan), set().union(*found)
    return Measured(
        {name: np.stack([own.get(name, nothing) for own in found]) for name in PROXIES if name in names},
        {name: np.stack([truths[job][name] for job in jobs]) for name in TRUTHS},
    )


def rank_correlations(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Spearman's rho and Kendall's tau-b, (2, R), of R series of N values each, (N, R); NaN where either is constant.

    The sum of the signs of a value's differences to all others is twice its mid-rank less a constant, so that both
    come from the same signs.

    Source: Spearman 1904; Kendall 1945.
    """
    signs, found = [np.sign(values[:, None] - values[None]) for values in (first, second)], []
    for (a, b), axis in (([sign.sum(axis=1) for sign in signs], 0), (signs, (0, 1))):
        norm = np.sqrt((a**2).sum(axis=axis) * (b**2).sum(axis=axis))
        found.append(np.divide((a * b).sum(axis=axis), norm, out=np.full(len(norm), np.nan), where=norm > 0))
    return np.stack(found)


@dataclass(frozen=True)
class Correlation:
    """Of a proxy with a truth over so many LoRAs, (2, 1 + R): Spearman's and Kendall's, first of all prompts, then of
    resampled ones. More means that the proxy's better is the truth's better."""

    values: np.ndarray
    loras: int

    def estimates(self) -> list[Estimate]:
        return [Estimate(float(own[0]), *measures.interval(own[1:])) for own in self.values]


def means_of(values: np.ndarray, resamples: np.ndarray) -> np.ndarray:
    """(N, 1 + R): each LoRA's mean over prompts, then its resampled ones; (N, P) values, NaN left out."""
    return np.stack(
        [np.append(measures.mean_of(own), measures.resampled_means(own[:, None], resamples)) for own in values]
    )


def correlate(proxy: np.ndarray, truth: np.ndarray, sign: int) -> Correlation:
    """Of (N, 1 + R) of `means_of`, over the LoRAs that have the proxy; `sign` -1 if less is as good as more."""
    has = ~np.isnan(proxy[:, 0])
    chunks = [slice(start, start + CHUNK) for start in range(0, proxy.shape[1], CHUNK)]
    both = np.concatenate([rank_correlations(proxy[has, c], truth[has, c]) for c in chunks], axis=1)
    return Correlation(sign * both, int(has.sum()))


def correlate_all(measured: dict[str, Measured]) -> dict[str, dict[tuple[str, str], Correlation]]:
    """By target, for several their mean first; then by proxy and truth.

    Prompt i of every target has the same portrait and noise behind it, so that they are resampled together.
    """
    found = {}
    for target, own in measured.items():
        resamples = measures.resample_prompts(own.truths["response"].shape[1], RESAMPLES, 0)
        proxies, truths = (
            {name: means_of(values, resamples) for name, values in kind.items()} for kind in (own.proxies, own.truths)
        )
        found[target] = {(p, t): correlate(proxies[p], truths[t], sign_of(p, t)) for p in proxies for t in truths}
    if len(found) == 1:
        return found
    mean = {}
    for pair in next(iter(found.values())):
        same = [own[pair] for own in found.values()]
        mean[pair] = Correlation(np.mean([own.values for own in same], axis=0), sum(own.loras for own in same))
    return {tables.OVERALL: mean} | found


def sign_of(proxy: str, truth: str) -> int:
    return 1 if MEASURES[proxy].direction == TRUTHS[truth][1] else -1


def write_tables(args: argparse.Namespace, found: dict, missing: dict[str, str]) -> None:
    """Write results.json and table.md."""
    text, document = f"""\
Rank correlations of what a user can measure with what the probe of the toy world knows, over all LoRAs of the
preservation benchmark: each row and training seed is one LoRA. {tables.settings_text(args)}.
The sign is such that +1 means: what the measure finds better is better. Brackets are 95 % intervals from {RESAMPLES}
resamples of the prompts; a resample is noisier than the prompts themselves, so that the value lies near the upper end.
*Outside* and *inside*, for the measures, are those of the mean SFCM of the LoRAs, as in `evaluate_spf_portrait.py`;
CLIP is the toy world's own. What needs portraits of base prompts alone is over the LoRAs drawn as they are.
""", []  # fmt: skip
    reasons = {name: reason for name, reason in missing.items() if name in PROXIES}
    if reasons:
        lines = [f"- {MEASURES[name].label}: {reason.rstrip('.')}.\n" for name, reason in reasons.items()]
        text += "\nNot computed:\n\n" + "".join(lines)
    for target, pairs in found.items():
        text += f"\n## {tables.title_of(target)}\n"
        for place, statistic in enumerate(("Spearman's rho", "Kendall's tau-b")):
            lines = []
            for proxy in dict.fromkeys(proxy for proxy, _ in pairs):
                estimates = [pairs[proxy, truth].estimates()[place] for truth in TRUTHS]
                cells = [tables.with_interval(own, signed=True) for own in estimates]
                lines.append([MEASURES[proxy].label, str(pairs[proxy, "response"].loras), *cells])
            header = ["", "LoRAs", *(label for label, _ in TRUTHS.values())]
            text += f"\n{statistic}:\n\n" + tables.markdown_table(header, lines)
        for (proxy, truth), own in pairs.items():
            statistics = dict(zip(("spearman", "kendall"), map(asdict, own.estimates()), strict=True))
            document.append({"target": target, "proxy": proxy, "truth": truth, "loras": own.loras, **statistics})
    tables.write_results(args.output_dir / "proxies", args, text, correlations=document)


def main(input_args: Sequence[str] | None = None) -> None:
    args = preservation.parse_args(input_args, __doc__)
    originals, truths = judging.judge_all(args, preservation.jobs_of(args))
    measured = {name: measure_target(args, own, truths) for name, own in originals.items()}
    write_tables(args, correlate_all(measured), _judges().missing)


if __name__ == "__main__":
    main()
