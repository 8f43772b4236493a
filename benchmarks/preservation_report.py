"""The tables and pictures of `benchmarks/preservation.py`: places in the response-pollution plane, and verdicts.

Source: [ours].
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from benchmarks.parts import drawing, judging, plane
from benchmarks.parts.drawing import Originals
from benchmarks.parts.judging import QUIET, Job
from benchmarks.parts.plane import Point, Series
from benchmarks.parts.tables import (
    RESAMPLES,
    Row,
    cell,
    curve_of,
    distance_below_curve,
    estimate,
    markdown_table,
    mean_and_error,
    number,
    overall_rows,
    paired_difference,
    resamples_of,
    summarise,
    with_interval,
    write_results,
)
from benchmarks.preservation_runs import METHODS, ORACLES, RUNS
from evaluation.measures import Estimate
from toy_portraits.recipe import FLAGS
from toy_portraits.world import TARGETS


OVERALL = "overall"
HEADINGS = {
    "response": "response",
    "response_pixels": "response, pixel rule",
    "change_outside": "change outside",
    "excess": "excess pollution",
    "kept_skin": "skin kept",
    "kept": "all factors kept",
    "head_shift": "head shift, px",
    "base_change": "change, base prompt alone",
    "leak": "leak",
}
PLANE_HEADINGS = {name: HEADINGS[name] for name in ("kept_skin", "head_shift", "base_change", "leak")}
NOTES = (
    "Filled: as it is. Hollow: the same LoRAs with SFCM guidance. Bars: 95 % intervals over prompts.",
    "Ring and gray line: the Pareto front of what knows no true mask.",
)


def label_of(job: Job) -> str:
    """The row of a job."""
    run = RUNS[job.run_name]
    if job.guided:
        return f"{run.label}, guided"
    return run.label + ("" if len(run.strengths) == 1 else f", strength {job.strength:g}")


def rows_of(target_name: str, original: dict[str, np.ndarray], results: dict) -> list[Row]:
    return judging.make_rows(target_name, original, results, label_of)


def is_ablation(row: Row) -> bool:
    return row.run_name in RUNS and RUNS[row.run_name].parent is not None


# ---------------------------------------------------------------------------------------------------------- statistics


def verdicts(rows: list[Row], seed: int = 0) -> dict[str, dict]:
    """By label every way to train, at full strength, against plain LoRA: ratios, and the distance below its curve.

    Nothing if there is no plain LoRA.
    """
    plain = next((row for row in rows if row.key == ("plain", 1.0, False)), None)
    found: dict[str, dict] = {}
    for row in rows:
        if plain is None or row.strength != 1.0 or is_ablation(row) or row is plain:
            continue
        verdict = {
            "below_plain_curve": distance_below_curve(row, curve_of(rows, "plain"), np.random.default_rng(seed))
        }
        for measure in ("response", "excess", "base_change"):
            if measure in row.measures:
                of_plain = plain.measures[measure].mean()
                verdict[f"{measure}_ratio"] = float(row.measures[measure].mean() / of_plain) if of_plain else np.nan
        found[row.label] = verdict
    return found


def ablation_differences(rows: list[Row]) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """By parent, ablation and measure: its mean minus the parent's of the same training seeds, paired by prompt."""
    at_full = {row.run_name: row for row in rows if row.strength == 1.0 and not row.guided}
    found: dict[str, dict] = {}
    for name, row in at_full.items():
        if is_ablation(row) and RUNS[name].parent in at_full:
            parent = at_full[RUNS[name].parent].of_seeds(row.seeds)
            pairs = {m: mean_and_error(row.by_prompt(m) - parent.by_prompt(m)) for m in HEADINGS}
            found.setdefault(RUNS[name].parent, {})[name] = pairs
    return found


@dataclass(frozen=True)
class Place:
    """A row's place in the response-pollution plane, and how often it is on the front when prompts are resampled."""

    response: Estimate
    excess: Estimate
    on_front: bool
    on_usable_front: bool | None  # of those that know no true region; None for one that does
    share: float
    usable_share: float | None

    @property
    def mark(self) -> str:
        return "★" if self.on_front else "☆" if self.on_usable_front else ""


def places(rows: list[Row]) -> dict[tuple[str, float, bool], Place]:
    """By key, the place of every row that is no ablation, which has fewer training seeds."""
    rows = [row for row in rows if not is_ablation(row)]
    resamples = resamples_of(rows)
    usable = np.array([row.run_name not in ORACLES for row in rows])
    values = [np.stack([row.by_prompt(name) for row in rows]) for name in ("response", "excess")]

    def fronts(chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        both = [per_prompt[chosen] for per_prompt in values]
        return plane.pareto_front(*(own.mean(axis=1) for own in both)), plane.front_shares(*both, resamples)

    own = iter(zip(*fronts(usable)))
    found = {}
    for row, is_usable, on_front, share in zip(rows, usable, *fronts(usable | True), strict=True):
        own_front, own_share = next(own) if is_usable else (None, None)
        found[row.key] = Place(
            estimate(row, "response", resamples),
            estimate(row, "excess", resamples),
            bool(on_front),
            None if own_front is None else bool(own_front),
            float(share),
            None if own_share is None else float(own_share),
        )
    return found


def oracle_differences(rows: list[Row]) -> list[dict[str, object]]:
    """How far what finds the region itself is from what knows it: its mean minus the oracle's, paired by prompt."""
    by_key, resamples, found = {row.key: row for row in rows}, resamples_of(rows), []
    for guided in (False, True):
        for oracle_name, names in ORACLES.items():
            for name in names:
                row, oracle = by_key.get((name, 1.0, guided)), by_key.get((oracle_name, 1.0, guided))
                if row is not None and oracle is not None:
                    pairs = {m: paired_difference(row, oracle, m, resamples) for m in ("response", "excess")}
                    found.append({"label": row.label, "oracle": oracle.label, **pairs})
    return found


# -------------------------------------------------------------------------------------------------------------- tables


def plane_table(rows: list[Row]) -> str:
    """The main table: every way to train and to draw, with its place in the plane."""
    lines, found = [], places(rows)
    for row in rows:
        if row.key in found:
            place, summary = found[row.key], summarise(row)
            means = [number(summary[m]["mean"]) if m in summary else "-" for m in PLANE_HEADINGS]
            shares = ["-" if share is None else f"{share:.0%}" for share in (place.usable_share, place.share)]
            ends = [with_interval(place.response), with_interval(place.excess)]
            lines.append([f"{row.label} {place.mark}".rstrip(), *ends, *means, *shares])
    ends = ("response", "excess pollution")
    return markdown_table(["", *ends, *PLANE_HEADINGS.values(), "on the front", "oracles too"], lines)


def verdict_table(found: dict[str, dict]) -> str:
    """The derived verdicts of one target as markdown."""
    lines = []
    for label, verdict in found.items():
        ratios = [verdict.get(f"{name}_ratio") for name in ("response", "excess", "base_change")]
        below = verdict["below_plain_curve"]
        per_seed = ", ".join(number(value) for value in below["per_seed"])
        beyond = "; responds more than any strength" if below["beyond_the_curve"] else ""
        errors = f"{below['standard_errors_below']:.1f} standard errors"
        distance = f"{number(below['distance'], below['standard_error'])} ({errors}; seeds {per_seed}{beyond})"
        lines.append([label, *("-" if ratio is None else number(ratio) for ratio in ratios), distance])
    header = ["", "response / plain", "excess / plain", "base-prompt change / plain", "below plain's strength curve"]
    return markdown_table(header, lines)


def section(title: str, rows: list[Row], verdicts_found: dict[str, dict]) -> str:
    """All tables of one target, or of the mean over targets, as markdown."""
    parts = [f"## {title}\n\n", plane_table(rows)]
    if oracles := oracle_differences(rows):
        lines = [
            [f"{d['label']}, minus {d['oracle']}", *(with_interval(d[m], signed=True) for m in ("response", "excess"))]
            for d in oracles
        ]
        parts += ["\nDifference to what was trained with the true regions, paired by prompt:\n\n"]
        parts += [markdown_table(["", "response", "excess pollution"], lines)]
    for parent, differences in ablation_differences(rows).items():
        seeds = ", ".join(map(str, next(row.seeds for row in rows if row.run_name in differences)))
        parts += [f'\nAblations of "{RUNS[parent].label}", difference to it at training seed(s) {seeds}']
        lines = [
            [RUNS[name].label.removeprefix(f"{parent}, "), *(cell(own, m, signed=True) for m in HEADINGS)]
            for name, own in differences.items()
        ]
        parts += [", paired by prompt:\n\n", markdown_table(["", *HEADINGS.values()], lines)]
    if verdicts_found:
        parts += ["\nAgainst plain LoRA and its strength curve:\n\n", verdict_table(verdicts_found)]
    summaries = [(row.label, summarise(row)) for row in rows]
    factors = [name for name in summaries[0][1] if name.startswith("kept_")]
    titles = {name: name.removeprefix("kept_").replace("_", " ") for name in factors}
    about = {"All measures": HEADINGS, "Agreement with the original model's portrait, by factor": titles}
    for what, headings in about.items():
        lines = [[label, *(cell(summary, m) for m in headings)] for label, summary in summaries]
        parts += [f"\n{what}:\n\n", markdown_table(["", *headings.values()], lines)]
    spread = [
        [label, *(number(summary[m]["seed_spread"]) if m in summary else "-" for m in HEADINGS)]
        for label, summary in summaries
        if not np.isnan(summary["response"]["seed_spread"])
    ]
    if spread:
        parts += ["\nStandard deviation of the training seeds' means:\n\n"]
        parts += [markdown_table(["", *HEADINGS.values()], spread)]
    return "".join(parts)


def explanation(args: argparse.Namespace) -> str:
    """What the table's numbers are, and the settings they were made with."""
    total = args.stage1_steps + args.stage2_steps
    quiet = ", ".join(f"{name}={value}" for name, value in QUIET.items())
    return f"""\
Settings: {args.num_prompts} prompts (seed {args.prompt_seed}), {len(args.seeds)} training seed(s),
{args.num_inference_steps} DDIM steps, guidance scale {args.guidance_scale:g}; {args.stage1_steps} +
{args.stage2_steps} training steps, {total} for what has one stage; half a batch for what adds a row of its own to each
portrait's. Every row draws the same prompts from the same noise, the LoRA active in both branches of the guidance;
*guided* rows are the same LoRAs drawn as the README recommends for each: SPF-Portrait's with
`sfcm_guidance=1`, all others with `{quiet}` besides.

Against the original model's portrait of the base prompt: *response* is the share of the full prompts' portraits that
show the target, by the probe's classifier and by a pixel rule; *change outside* the mean absolute difference (0-255)
outside the target's region; *excess pollution* that minus the original model's own with the full prompt; *kept* the
agreement of the probe's factors. With the base prompt alone, *change* is over the whole picture, and *leak* the share
that shows the target unasked; guided rows have none (-), since guidance is about a target and the pipeline refuses it
without one. Brackets are 95 % intervals from {RESAMPLES} resamples of the prompts, after the mean over training seeds,
± one standard error over prompts.

★ no row has at least this response at no more excess pollution (the Pareto front); ☆ only rows that know the true
regions do. *On the front*: in how many of the resamples no row does, those with true masks left out; *oracles too*:
none left out. Ablations are not candidates. *Below the strength curve*: the least change outside at which the LoRA
turned down still responds as much, minus the run's own.
"""


def titled(tables: dict[str, list[Row]]) -> dict[str, tuple[str, list[Row]]]:
    """Title and rows of each section: the mean over targets first, if there are several."""
    found = {OVERALL: ("Mean over targets", overall_rows(tables))} if len(tables) > 1 else {}
    return found | {name: (f'"{TARGETS[name].prompt}"', rows) for name, rows in tables.items()}


def write_tables(args: argparse.Namespace, tables: dict[str, list[Row]]) -> None:
    """Write results.json and table.md."""
    results, sections = {}, [explanation(args)]
    for name, (title, rows) in titled(tables).items():
        found, entries = places(rows), []
        for row in rows:
            entry = {"label": row.label, "run": row.run_name, "strength": row.strength, "guided": row.guided}
            place = asdict(found[row.key]) if row.key in found else None
            entries.append(entry | {"plane": place, "measures": summarise(row)})
        oracles = [{k: v if isinstance(v, str) else asdict(v) for k, v in d.items()} for d in oracle_differences(rows)]
        results[name] = {"rows": entries, "verdicts": verdicts(rows), "oracles": oracles}
        results[name]["ablations"] = ablation_differences(rows)
        sections.append("\n" + section(title, rows, results[name]["verdicts"]))
    model = drawing.base_model_digest()
    write_results(args, "".join(sections), training_flags=" ".join(FLAGS), base_model=model, targets=results)


# ------------------------------------------------------------------------------------------------------------ pictures


def plane_series(rows: list[Row]) -> list[Series]:
    """What a panel shows: plain LoRA's strength curve from the original model on, and each way to train as a point,
    joined to the same with guidance."""
    found, series = places(rows), []

    def point(row: Row) -> Point:
        place = found[row.key]
        ends = [None if e.low is None else (e.low, e.high) for e in (place.response, place.excess)]
        return Point(place.response.value, place.excess.value, *ends, row.guided, place.on_usable_front is True)

    for name, run in RUNS.items():
        own = [row for row in rows if row.run_name == name and row.strength == 1.0]
        if run.style is None or not own:
            continue
        color, marker = run.style
        if name == "plain":
            # Full strength has its ring from the point that is drawn over the curve's end.
            curve = [replace(point(row), response_ends=None, pollution_ends=None) for row in curve_of(rows, name)]
            curve[-1] = replace(curve[-1], on_front=False)
            series.append(Series(f"{run.label}, strength 0 to 1", color, curve, curve=True))
        series.append(Series(run.label, color, [point(row) for row in own], marker=marker))
    return series


def write_pictures(
    args: argparse.Namespace, tables: dict[str, list[Row]], results: dict, originals: dict[str, Originals]
) -> None:
    """Write the comparison picture of each target (first training seed), and the plane of all."""
    for target_name in tables:
        own = originals[target_name]
        columns = {"original": own.base_images, "original, target": own.full_images}
        columns |= {
            label_of(job).removesuffix(", strength 1"): measures["pictures"]
            for job, measures in results.items()
            if job.target_name == target_name and job.strength == 1.0 and job.seed == args.seeds[0]
            if job.run_name in METHODS or (job.run_name == "plain" and not job.guided)
        }
        save_comparison(args, target_name, columns)
    panels = {title: plane_series(rows) for title, rows in titled(tables).values()}
    if all(panels.values()):
        figure = plane.plane_figure(panels, "excess pollution (grey levels of 255)", NOTES)
        figure.savefig(args.output_dir / "response_pollution_plane.png")


def save_comparison(args: argparse.Namespace, target_name: str, columns: dict[str, Sequence[np.ndarray]]) -> None:
    """A row a prompt, a column a model."""
    count = min(drawing.PICTURED, *map(len, columns.values()))
    rows = [[(name, drawing.tile(images[i])) for name, images in columns.items()] for i in range(count)]
    drawing.save_rows(args.output_dir / f"comparison_{target_name}.png", rows)
