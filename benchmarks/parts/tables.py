"""The rows of a benchmark's tables: means, errors and intervals, what is derived from several rows, and the files.

Legend: K training seeds, P prompts, R resamples of the prompts.
Source: [ours].
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from evaluation.measures import Estimate, estimate_mean, interval, resample_prompts
from evaluation.report import without_nan
from toy_portraits.recipe import BASES
from toy_portraits.world import TARGETS


ORIGINAL, OVERALL = "original model", "Mean over targets"
RESAMPLES = 1000
Summary = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Row:
    """One row of a target's table: how its LoRA was trained, its scale, and the measures, (K, P) each."""

    label: str
    run_name: str
    strength: float
    measures: dict[str, np.ndarray]
    guided: bool = False
    seeds: tuple[int, ...] = ()

    @property
    def key(self) -> tuple[str, float, bool]:
        return self.run_name, self.strength, self.guided

    def by_prompt(self, name: str) -> np.ndarray:
        """(P,): a measure's mean over training seeds, the unit that standard errors count."""
        return self.measures[name].mean(axis=0)

    def of_seeds(self, seeds: Sequence[int]) -> Row:
        """The same row of some of its training seeds."""
        places = [self.seeds.index(seed) for seed in seeds]
        return replace(self, seeds=tuple(seeds), measures={k: values[places] for k, values in self.measures.items()})


def resamples_of(rows: Sequence[Row]) -> np.ndarray:
    """(R, P) indices of prompts, the same for all rows, so that rows are resampled together."""
    return resample_prompts(len(rows[0].by_prompt("response")), RESAMPLES, 0)


def estimate(row: Row, name: str, resamples: np.ndarray) -> Estimate:
    """A measure's mean and its 95 % interval over prompts."""
    return estimate_mean(row.measures[name].T, resamples)


def paired_difference(row: Row, other: Row, name: str, resamples: np.ndarray) -> Estimate:
    """A row's mean minus another's with the same training seeds, paired by prompt, and its 95 % interval."""
    return estimate_mean((row.by_prompt(name) - other.by_prompt(name))[:, None], resamples)


@dataclass(frozen=True)
class Share:
    """A row's mean over another row's, with the 95 % interval over training seeds and prompts, and of each seed."""

    whole: Estimate
    by_seed: dict[int, float]


def share_of(row: Row, other: Row, name: str) -> Share:
    """Divide a measure by another row's of the same training seeds; both are resampled together, seeds and prompts."""
    own, others = row.measures[name], other.of_seeds(row.seeds).measures[name]
    rng, (count, prompts) = np.random.default_rng(0), own.shape
    samples = []
    for _ in range(RESAMPLES):
        index = np.ix_(rng.integers(0, count, count), rng.integers(0, prompts, prompts))
        samples.append(own[index].mean() / others[index].mean())
    by_seed = dict(zip(row.seeds, (own.mean(axis=1) / others.mean(axis=1)).tolist(), strict=True))
    return Share(Estimate(float(own.mean() / others.mean()), *interval(np.array(samples))), by_seed)


def mean_and_error(values: np.ndarray) -> dict[str, float]:
    """Mean of independent values, and its standard error; NaN for too few of them."""
    error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
    return {"mean": float(values.mean()) if len(values) else float("nan"), "standard_error": error}


def summarise(measures: dict[str, np.ndarray]) -> Summary:
    """Per measure, (K, P) each: mean, standard error (prompts as clusters), spread of the seeds' means, and prompts.

    NaN does not count; a prompt where all seeds have none is left out.
    """
    summary = {}
    for name, values in measures.items():
        seen = np.ma.masked_invalid(values)
        prompts, seeds = (seen.mean(axis=axis).compressed() for axis in (0, 1))
        spread = float(seeds.std(ddof=1)) if len(seeds) > 1 else float("nan")
        summary[name] = mean_and_error(prompts) | {"seed_spread": spread, "prompts": len(prompts)}
    return summary


def overall_rows(tables: dict[str, list[Row]]) -> list[Row]:
    """The mean over targets of each row that all of them have, of the measures that all of them have.

    Prompt i of every target has the same portrait and noise behind it, so that the prompts stay the unit that is
    resampled.
    """
    found, by_target = [], [{row.key: row for row in rows} for rows in tables.values()]
    for key, row in by_target[0].items():
        same = [rows[key] for rows in by_target if key in rows]
        if len(same) == len(tables):
            names = [name for name in row.measures if all(name in own.measures for own in same)]
            found.append(replace(row, measures={n: np.mean([own.measures[n] for own in same], axis=0) for n in names}))
    return found


def curve_change_at(response: float, strengths: np.ndarray, responses: np.ndarray, changes: np.ndarray) -> float:
    """The least change at which a LoRA turned down still has a response.

    `strengths` ascend from 0, and responses and changes are linear in between. If none reaches the response, the
    change where it is highest, which flatters the LoRA.
    """
    grid = np.linspace(strengths[0], strengths[-1], 201)
    reached, change = np.interp(grid, strengths, responses), np.interp(grid, strengths, changes)
    enough = reached >= response
    return float(change[enough].min() if enough.any() else change[reached.argmax()])


def curve_of(rows: Iterable[Row], run_name: str) -> list[Row]:
    """The original model and a run's rows without guidance, by ascending strength."""
    chosen = [row for row in rows if row.run_name in ("original", run_name) and not row.guided]
    return sorted(chosen, key=lambda row: row.strength)


def distance_below_curve(row: Row, curve: Sequence[Row]) -> dict[str, float | list | bool]:
    """How far a run lies below a strength curve: the curve's change outside at the run's response minus its own.

    Run and curve are resampled together, by prompt. A positive distance is less pollution at the same response.
    """
    strengths = np.array([point.strength for point in curve])
    responses, changes = (np.stack([p.by_prompt(name) for p in curve]) for name in ("response", "change_outside"))

    def distance(own_response: float, own_change: float, index: np.ndarray | slice) -> float:
        at = curve_change_at(own_response, strengths, responses[:, index].mean(1), changes[:, index].mean(1))
        return at - own_change

    response, change = row.by_prompt("response"), row.by_prompt("change_outside")
    samples = np.random.default_rng(0).integers(0, len(response), (RESAMPLES, len(response)))
    error = float(np.std([distance(response[i].mean(), change[i].mean(), i) for i in samples], ddof=1))
    per_seed = zip(row.measures["response"], row.measures["change_outside"])
    return {
        "distance": distance(response.mean(), change.mean(), slice(None)),
        "standard_error": error,
        "per_seed": [distance(r.mean(), c.mean(), slice(None)) for r, c in per_seed],
        "beyond_the_curve": bool(response.mean() > responses.mean(axis=1).max()),
    }


def number(value: float, error: float | None = None, signed: bool = False) -> str:
    """A mean for a table, with its standard error."""
    text = f"{value:{'+' if signed else ''}.2f}"
    return text if error is None or np.isnan(error) else f"{text} ± {error:.2f}"


def with_interval(value: Estimate, signed: bool = False) -> str:
    """A mean for a table, with its interval."""
    sign = "+" if signed else ""
    ends = "" if value.low is None else f" [{value.low:{sign}.2f}, {value.high:{sign}.2f}]"
    return f"{value.value:{sign}.2f}{ends}"


def cell(summary: Summary, name: str, signed: bool = False, missing: str = "-") -> str:
    """A measure's mean and standard error, or what stands for one that the row does not have."""
    return number(summary[name]["mean"], summary[name]["standard_error"], signed) if name in summary else missing


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "".join("| " + " | ".join(row) + " |\n" for row in [header, ["---"] * len(header), *lines])


def measure_table(headings: dict[str, str], summaries: dict[str, Summary], signed: bool = False) -> str:
    """The measures that have headings, of summaries by label."""
    lines = [[label, *(cell(own, name, signed) for name in headings)] for label, own in summaries.items()]
    return markdown_table(["", *headings.values()], lines)


def title_of(target_name: str) -> str:
    """The title of a target's section, or of one over all of them."""
    return f'"{TARGETS[target_name].prompt}"' if target_name in TARGETS else target_name


def settings_text(args: argparse.Namespace) -> str:
    """What was trained, and how everything was drawn, for the head of a page."""
    seeds, base = ", ".join(map(str, args.seeds)), BASES[args.base]
    return (
        f"{base.title}, {args.num_prompts} prompts (seed {args.prompt_seed}), training seed(s) {seeds}, "
        f"{args.num_inference_steps} {base.sampler} steps, guidance scale {args.guidance_scale:g}; "
        f"{args.stage1_steps} + {args.stage2_steps} training steps"
    )


def write_results(folder: Path, args: argparse.Namespace, text: str, **document: object) -> None:
    """Write the tables, table.md, and all numbers with the flags, results.json; print the tables."""
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    numbers = json.dumps(without_nan({"settings": settings, **document}), indent=1, allow_nan=False)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("table.md", text), ("results.json", numbers + "\n")):
        (folder / name).write_text(content, encoding="utf-8")
    print(text)
