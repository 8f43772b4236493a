"""The rows of a benchmark's tables: means, errors and intervals, what is derived from several rows, and the files.

Legend: K training seeds, P prompts, R resamples.
Source: [ours].
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from evaluation.measures import Estimate, interval, resample_prompts
from evaluation.report import without_nan
from toy_portraits.recipe import BASES
from toy_portraits.world import TARGETS


ORIGINAL, OVERALL = "original model", "Mean over targets"
RESAMPLES = 1000
# Which of several training seeds is the worst.
WORST = {"response": min, "excess": max, "base_change": max}
Summary = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Row:
    """One row of a target's table: how its LoRA was trained, its scale, and the measures, (K, P) each."""

    label: str
    run_name: str
    strength: float
    measures: dict[str, np.ndarray]
    way: str = ""  # to draw, of a `Job`
    seeds: tuple[int, ...] = ()

    @property
    def key(self) -> tuple[str, float, str]:
        return self.run_name, self.strength, self.way

    def by_prompt(self, name: str) -> np.ndarray:
        """(P,): a measure's mean over training seeds, the unit that standard errors count."""
        return self.measures[name].mean(axis=0)

    def worst(self, name: str) -> float | None:
        """The mean of the training seed that is worst by one of `WORST`; None for a row without several seeds."""
        return worst_of(self.measures[name].mean(axis=1), name)

    def of_seeds(self, seeds: Sequence[int]) -> Row:
        """The same row of some of its training seeds."""
        places = [self.seeds.index(seed) for seed in seeds]
        return replace(self, seeds=tuple(seeds), measures={k: values[places] for k, values in self.measures.items()})


def worst_of(by_seed: Iterable[float], name: str) -> float | None:
    """The worst training seed's of some means or shares; None for fewer than two, which have no worst."""
    values = [float(value) for value in by_seed]
    return WORST[name](values) if len(values) > 1 else None


def resamples_of(rows: Sequence[Row]) -> np.ndarray:
    """(R, P) indices of prompts, the same for all rows, so that rows are resampled together."""
    return resample_prompts(next(iter(rows[0].measures.values())).shape[1], RESAMPLES, 0)


def resampled(values: np.ndarray, resamples: np.ndarray) -> np.ndarray:
    """(R,): means of (K, P) values over resampled training seeds and, by (R, P), resampled prompts.

    Every value of as many seeds has the same resamples of them, so that those of one seed stay together.
    """
    seeds = np.random.default_rng(1).integers(0, len(values), (len(resamples), len(values)))
    weights = (seeds[..., None] == np.arange(len(values))).mean(axis=1)
    return np.take_along_axis(weights @ values, resamples, axis=1).mean(axis=1)


def estimate(row: Row, name: str, resamples: np.ndarray) -> Estimate:
    """A measure's mean and its 95 % interval over training seeds and prompts."""
    values = row.measures[name]
    return Estimate(float(values.mean()), *interval(resampled(values, resamples)))


def paired_difference(row: Row, other: Row, name: str, resamples: np.ndarray) -> Estimate:
    """A row's mean minus another's, of the training seeds that both have and paired by prompt, and its 95 % interval
    over seeds and prompts."""
    seeds = [seed for seed in row.seeds if seed in other.seeds]
    own, others = (one.of_seeds(seeds).measures[name] for one in (row, other))
    return Estimate(float((own - others).mean()), *interval(resampled(own - others, resamples)))


@dataclass(frozen=True)
class Share:
    """A row's mean over another row's, with the 95 % interval over training seeds and prompts, and of each seed."""

    whole: Estimate
    by_seed: dict[int, float]
    worst: float | None  # of the seeds, if there are several


def share_of(row: Row, other: Row, name: str) -> Share:
    """Divide one of `WORST` by another row's of the same training seeds; both are resampled together."""
    own, others = row.measures[name], other.of_seeds(row.seeds).measures[name]
    resamples = resamples_of([row])
    by_seed = dict(zip(row.seeds, (own.mean(axis=1) / others.mean(axis=1)).tolist(), strict=True))
    whole = Estimate(
        float(own.mean() / others.mean()), *interval(resampled(own, resamples) / resampled(others, resamples))
    )
    return Share(whole, by_seed, worst_of(by_seed.values(), name))


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


def with_mean(by_target: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """The rows of each section: the mean over targets first, if there are several."""
    return ({OVERALL: overall_rows(by_target)} if len(by_target) > 1 else {}) | by_target


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
    """The original model and a run's rows drawn as it is, by ascending strength."""
    chosen = [row for row in rows if row.run_name in ("original", run_name) and not row.way]
    return sorted(chosen, key=lambda row: row.strength)


def distance_below_curve(row: Row, curve: Sequence[Row]) -> dict[str, float | list | bool]:
    """How far a run lies below a strength curve: the curve's change outside at the run's response minus its own.

    The curve is that of the run's own training seeds. Run and curve are resampled together, seeds and prompts. A
    positive distance is less pollution at the same response.
    """
    # The original model has no training seed.
    curve = [point.of_seeds(row.seeds) if point.seeds else point for point in curve]
    strengths, names = np.array([point.strength for point in curve]), ("response", "change_outside")
    responses, changes = (np.array([point.measures[name].mean() for point in curve]) for name in names)

    def distance(response: float, change: float) -> float:
        return curve_change_at(response, strengths, responses, changes) - change

    resamples = resamples_of([row])
    own = zip(*(resampled(row.measures[name], resamples) for name in names), strict=True)
    points = zip(*(np.stack([resampled(p.measures[name], resamples) for p in curve], axis=1) for name in names))
    samples = [curve_change_at(r, strengths, *point) - c for (r, c), point in zip(own, points, strict=True)]
    response, change = (row.measures[name].mean() for name in names)
    per_seed = zip(*(row.measures[name].mean(axis=1) for name in names), strict=True)
    return {
        "distance": distance(response, change),
        "standard_error": float(np.std(samples, ddof=1)),
        "per_seed": [distance(*means) for means in per_seed],
        "beyond_the_curve": bool(response > responses.max()),
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


def with_worst(value: Estimate, worst: float | None) -> str:
    """A mean for a table, with its interval and the worst training seed's."""
    return with_interval(value) + ("" if worst is None else f", worst {worst:.2f}")


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


def write_results(
    folder: Path, args: argparse.Namespace, text: str, names: Sequence[str] = ("table.md", "results.json"),
    **document: object,
) -> None:  # fmt: skip
    """Write the tables, table.md, and all numbers with the flags, results.json; print the tables."""
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    numbers = json.dumps(without_nan({"settings": settings, **document}), indent=1, allow_nan=False)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in zip(names, (text, numbers + "\n"), strict=True):
        (folder / name).write_text(content, encoding="utf-8")
    print(text)
