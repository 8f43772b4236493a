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

from evaluation.measures import Estimate, estimate_mean, resample_prompts


ORIGINAL = "original model"
RESAMPLES = 1000


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


def standard_error(values: np.ndarray) -> float:
    """Of the mean of independent values; NaN for a single one."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


def resamples_of(rows: Sequence[Row], seed: int = 0) -> np.ndarray:
    """(R, P) indices of prompts, the same for all rows, so that rows are resampled together."""
    return resample_prompts(len(rows[0].by_prompt("response")), RESAMPLES, seed)


def estimate(row: Row, name: str, resamples: np.ndarray) -> Estimate:
    """A measure's mean and its 95 % interval over prompts."""
    return estimate_mean(row.measures[name].T, resamples)


def paired_difference(row: Row, other: Row, name: str, resamples: np.ndarray) -> Estimate:
    """A row's mean minus another's with the same training seeds, paired by prompt, and its 95 % interval."""
    return estimate_mean((row.by_prompt(name) - other.by_prompt(name))[:, None], resamples)


def mean_and_error(values: np.ndarray) -> dict[str, float]:
    """Of independent values; NaN if there are none."""
    return {"mean": float(values.mean()) if len(values) else float("nan"), "standard_error": standard_error(values)}


def summarise(row: Row) -> dict[str, dict[str, float]]:
    """Per measure the mean, its standard error (prompts as clusters) and the spread of the training seeds' means."""
    summary = {}
    for name, values in row.measures.items():
        seeds = values.mean(axis=1)
        spread = float(seeds.std(ddof=1)) if len(seeds) > 1 else float("nan")
        error = standard_error(row.by_prompt(name))
        summary[name] = {"mean": float(values.mean()), "standard_error": error, "seed_spread": spread}
    return summary


def overall_rows(tables: dict[str, list[Row]]) -> list[Row]:
    """The mean over targets of each row that all of them have, of the measures that all of them have.

    Prompt i of every target has the same portrait and noise behind it, so that the prompts stay the unit that is
    resampled.
    """
    first, *others = ({row.key: row for row in rows} for rows in tables.values())
    found = []
    for key, row in first.items():
        same = [row, *(other[key] for other in others if key in other)]
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


def distance_below_curve(row: Row, curve: Sequence[Row], rng: np.random.Generator) -> dict[str, float | list | bool]:
    """How far a run lies below a strength curve: the curve's change outside at the run's response minus its own.

    `rng` is of the bootstrap over prompts, in which run and curve are resampled together. A positive distance is less
    pollution at the same response.
    """
    strengths = np.array([point.strength for point in curve])
    responses = np.stack([point.by_prompt("response") for point in curve])
    changes = np.stack([point.by_prompt("change_outside") for point in curve])

    def distance(own_response: float, own_change: float, index: np.ndarray | slice) -> float:
        at = curve_change_at(own_response, strengths, responses[:, index].mean(1), changes[:, index].mean(1))
        return at - own_change

    response, change = row.by_prompt("response"), row.by_prompt("change_outside")
    samples = rng.integers(0, len(response), (RESAMPLES, len(response)))
    error = float(np.std([distance(response[i].mean(), change[i].mean(), i) for i in samples], ddof=1))
    found = distance(response.mean(), change.mean(), slice(None))
    per_seed = zip(row.measures["response"], row.measures["change_outside"])
    return {
        "distance": found,
        "standard_error": error,
        "standard_errors_below": found / error if error > 0 else float("nan"),
        "per_seed": [distance(r.mean(), c.mean(), slice(None)) for r, c in per_seed],
        "beyond_the_curve": bool(response.mean() > responses.mean(axis=1).max()),
    }


# ------------------------------------------------------------------------------------------------------------- writing


def number(value: float, error: float | None = None, signed: bool = False) -> str:
    """A mean for a table, with its standard error."""
    text = f"{value:{'+' if signed else ''}.2f}"
    return text if error is None or np.isnan(error) else f"{text} ± {error:.2f}"


def cell(summary: dict[str, dict[str, float]], name: str, signed: bool = False, missing: str = "-") -> str:
    """A measure's mean and standard error, or what stands for one that the row does not have."""
    return number(summary[name]["mean"], summary[name]["standard_error"], signed) if name in summary else missing


def with_interval(value: Estimate, signed: bool = False) -> str:
    """A mean for a table, with its interval."""
    sign = "+" if signed else ""
    ends = "" if value.low is None else f" [{value.low:{sign}.2f}, {value.high:{sign}.2f}]"
    return f"{value.value:{sign}.2f}{ends}"


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "".join("| " + " | ".join(row) + " |\n" for row in [header, ["---"] * len(header), *lines])


def without_nan(value: object) -> object:
    """The same for JSON, which has no NaN: None instead."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and np.isnan(value) else value


def write_results(
    args: argparse.Namespace, text: str, files: tuple[str, str] = ("table.md", "results.json"), **document: object
) -> None:
    """Write the tables and, with the flags, all numbers into `args.output_dir`, and print the tables."""
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    numbers = json.dumps(without_nan({"settings": settings, **document}), indent=1, allow_nan=False)
    for name, content in zip(files, (text, numbers + "\n"), strict=True):
        (args.output_dir / name).write_text(content, encoding="utf-8")
    print(text)
