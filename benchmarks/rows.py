"""The rows of a benchmark's table: their means, errors and intervals, and what is derived from several of them.

Legend: K training seeds, P prompts, R resamples of the prompts.
Source: [ours].
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from evaluation.measures import Estimate, estimate_mean, resample_prompts  # noqa: E402


ORIGINAL = "original model"
RESAMPLES = 1000


@dataclass(frozen=True)
class Row:
    """One row of a target's table.

    Attributes:
        label: its name in the table.
        run_name: how its LoRA was trained.
        strength: scale of the LoRA at inference.
        measures: (K, P) each.
        guided: whether it was drawn with SFCM guidance.
        seeds: the K training seeds.
    """

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


# ---------------------------------------------------------------------------------------------------------- statistics


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


def summarise(row: Row) -> dict[str, dict[str, float]]:
    """Per measure the mean, its standard error (prompts as clusters) and the spread of the training seeds' means."""
    summary = {}
    for name, values in row.measures.items():
        seeds = values.mean(axis=1)
        summary[name] = {
            "mean": float(values.mean()),
            "standard_error": standard_error(row.by_prompt(name)),
            "seed_spread": float(seeds.std(ddof=1)) if len(seeds) > 1 else float("nan"),
        }
    return summary


def overall_rows(tables: dict[str, list[Row]]) -> list[Row]:
    """The mean over targets of each row that all of them have.

    Prompt i of every target has the same portrait and noise behind it, so that the prompts stay the unit that is
    resampled. A measure counts if all targets have it.

    Args:
        tables: by target, its rows; the targets have as many prompts.

    Source: [ours].
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
    """The least change at which a LoRA turned down still responds as asked.

    Args:
        response: the response to match.
        strengths: ascending, from 0 (the original model).
        responses: the responses there, linear in between.
        changes: the changes there.

    Returns:
        The least change over the strengths that reach the response; if none does, the change where the response is
        highest, which flatters the LoRA.
    """
    grid = np.linspace(strengths[0], strengths[-1], 201)
    reached, change = np.interp(grid, strengths, responses), np.interp(grid, strengths, changes)
    enough = reached >= response
    return float(change[enough].min() if enough.any() else change[reached.argmax()])


def curve_of(rows: Iterable[Row], run_name: str) -> list[Row]:
    """The original model and a run's rows without guidance, by ascending strength."""
    chosen = [row for row in rows if row.run_name in ("original", run_name) and not row.guided]
    return sorted(chosen, key=lambda row: row.strength)


def distance_below_curve(
    row: Row, curve: Sequence[Row], rng: np.random.Generator
) -> dict[str, float | list[float] | bool]:
    """How far a run lies below a strength curve: the curve's change outside at the run's response minus its own.

    Args:
        row: the run.
        curve: as `curve_of` returns it.
        rng: of the bootstrap over prompts, in which run and curve are resampled together.

    Returns:
        The distance (positive: less pollution at the same response), its standard error, their quotient, the distance
        per training seed, and whether the response lies beyond all of the curve.
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


def with_interval(value: Estimate, signed: bool = False) -> str:
    """A mean for a table, with its interval."""
    sign = "+" if signed else ""
    ends = "" if value.low is None else f" [{value.low:{sign}.2f}, {value.high:{sign}.2f}]"
    return f"{value.value:{sign}.2f}{ends}"


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def without_nan(value: object) -> object:
    """The same for JSON, which has no NaN: None instead."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and np.isnan(value) else value
