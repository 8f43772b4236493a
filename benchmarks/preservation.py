"""Does SPF-Portrait keep a portrait, and what else does? `python benchmarks/preservation.py`.

For every toy target and training seed it trains LoRAs in all the ways of `RUNS` through the real training script, at
equal steps and equal gradient samples, draws the same prompts from the same noise with each, as it is, with SFCM
guidance, and with the LoRA off in the first steps, and judges the portraits against the original model's. Plain LoRA
turned down is a control too, since a weaker LoRA pollutes less. What is trained with the true regions is a ceiling:
nobody but the renderer knows them. What is finished is not trained or drawn again, so an interrupted run goes on where
it stopped.

Source: [ours].
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.parts import drawing, judging, plane, tables
from benchmarks.parts.judging import LATE, QUIET, Job
from benchmarks.parts.plane import Point, Series
from benchmarks.parts.runs import ORACLES, RUNS, Run, Training, run_folder, train_all, trainable
from benchmarks.parts.tables import Row, Share, number, with_interval, with_worst
from evaluation.measures import Estimate
from toy_portraits.recipe import FLAGS
from toy_portraits.world import TARGETS


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
AXES = {name: HEADINGS[name] for name in ("response", "excess")}
SHARES = {name: HEADINGS[name] for name in tables.WORST}
BESIDE_AXES = {name: HEADINGS[name] for name in ("kept_skin", "head_shift", "base_change", "leak")}
NOTES = (
    "Filled: as it is. Hollow: the same LoRAs with SFCM guidance. Half filled: drawn late. Bars: 95 % intervals.",
    "Ring and gray line: the Pareto front of what knows no true mask.",
)


# ---------------------------------------------------------------------------------------------------------------- rows


def chosen(args: argparse.Namespace) -> list[Training]:
    """What the tables show, in their order; ablations have targets of their own."""
    return [
        (target, name, seed)
        for target in args.targets
        for name, run in RUNS.items()
        if name in args.runs and (run.parent is None or target in args.ablation_targets)
        for seed in run.seeds_of(args.seeds)
    ]


def jobs_of(args: argparse.Namespace) -> list[Job]:
    """Every run at every strength, and every way to train once more with guidance, and once more late."""
    jobs = []
    for target, name, seed in chosen(args):
        run, folder = RUNS[name], run_folder(args.output_dir, target, name, seed)
        jobs += [Job(target, name, seed, strength, folder) for strength in run.strengths]
        if run.parent is None:
            jobs.append(Job(target, name, seed, 1.0, folder, "guided", quiet=run.quiet))
            jobs.append(Job(target, name, seed, 1.0, folder, "late"))
    return jobs


def label_of(job: Job) -> str:
    """The row of a job."""
    run = RUNS[job.run_name]
    if job.way:
        return f"{run.label}, {job.way}"
    return run.label + ("" if len(run.strengths) == 1 else f", strength {job.strength:g}")


def is_ablation(row: Row) -> bool:
    return row.run_name in RUNS and RUNS[row.run_name].parent is not None


# ---------------------------------------------------------------------------------------------------------- statistics


def below_plain_curve(rows: list[Row]) -> dict[str, dict]:
    """By label how far every way to train lies below plain LoRA's strength curve, if there is one."""
    curve = tables.curve_of(rows, "plain")
    itself = {point.key for point in curve}
    ways = [row for row in rows if row.strength == 1.0 and row.key not in itself and not is_ablation(row)]
    return {row.label: tables.distance_below_curve(row, curve) for row in ways if len(curve) > 1}


def shares_of_plain(rows: list[Row]) -> dict[str, dict[str, Share]]:
    """By label and measure what every way to train and to draw has of plain LoRA, if there is one, and what every
    ablation of several training seeds has."""
    plain = next((row for row in rows if row.key == ("plain", 1.0, "")), None)
    ways = [row for row in rows if row.run_name in RUNS and row.strength == 1.0 and row is not plain]
    ways = [] if plain is None else [row for row in ways if not is_ablation(row) or len(row.seeds) > 1]
    return {
        row.label: {name: tables.share_of(row, plain, name) for name in SHARES if name in row.measures} for row in ways
    }


def ablation_differences(rows: list[Row]) -> dict[tuple[str, tuple[int, ...]], dict[str, dict[str, Estimate]]]:
    """By parent and training seeds, then by ablation and measure: its mean minus the parent's, paired by seed and
    prompt."""
    at_full = {row.run_name: row for row in rows if row.strength == 1.0 and not row.way}
    resamples, found = tables.resamples_of(rows), {}
    for name, row in at_full.items():
        if is_ablation(row) and (parent := at_full.get(RUNS[name].parent)) is not None:
            pairs = {m: tables.paired_difference(row, parent, m, resamples) for m in HEADINGS}
            found.setdefault((parent.run_name, row.seeds), {})[name] = pairs
    return found


@dataclass(frozen=True)
class Place:
    """A row's place in the response-pollution plane, and how often it is on the front when seeds and prompts are
    resampled.

    `worst` is that of several training seeds, by axis. What is *usable* is about those alone that know no true region;
    None for one that does.
    """

    response: Estimate
    excess: Estimate
    worst: dict[str, float | None]
    on_front: bool
    on_usable_front: bool | None
    share: float
    usable_share: float | None

    @property
    def mark(self) -> str:
        return "★" if self.on_front else "☆" if self.on_usable_front else ""


def places(rows: list[Row]) -> dict[tuple[str, float, str], Place]:
    """By key, the place of every row that is no ablation."""
    rows = [row for row in rows if not is_ablation(row)]
    resamples = tables.resamples_of(rows)

    def front(some: list[Row]) -> dict[tuple[str, float, str], tuple[bool, float]]:
        on_front = plane.pareto_front(*(np.array([row.measures[n].mean() for row in some]) for n in AXES)).tolist()
        samples = (np.stack([tables.resampled(row.measures[n], resamples) for row in some], axis=1) for n in AXES)
        shares = plane.front_shares(*samples).tolist()
        return dict(zip((row.key for row in some), zip(on_front, shares), strict=True))

    everyone, usable = front(rows), front([row for row in rows if row.run_name not in ORACLES])
    found = {}
    for row in rows:
        (on_front, share), own = everyone[row.key], usable.get(row.key, (None, None))
        estimates = [tables.estimate(row, name, resamples) for name in AXES]
        worst = {name: row.worst(name) for name in AXES}
        found[row.key] = Place(*estimates, worst, on_front, own[0], share, own[1])
    return found


def oracle_differences(rows: list[Row]) -> dict[str, dict[str, Estimate]]:
    """How far what finds the region itself is from what knows it, both drawn alike: its mean minus the oracle's,
    paired by training seed and prompt."""
    by_key, resamples, found = {row.key: row for row in rows}, tables.resamples_of(rows), {}
    ways = dict.fromkeys(row.way for row in rows)
    pairs = [(name, oracle, way) for way in ways for oracle, own in ORACLES.items() for name in own]
    for name, oracle_name, way in pairs:
        row, oracle = by_key.get((name, 1.0, way)), by_key.get((oracle_name, 1.0, way))
        if row is not None and oracle is not None:
            label = f"{row.label}, minus {oracle.label}"
            found[label] = {m: tables.paired_difference(row, oracle, m, resamples) for m in AXES}
    return found


# -------------------------------------------------------------------------------------------------------------- tables


def plane_table(rows: list[Row]) -> str:
    """The main table: every way to train and to draw, with its place in the plane."""
    lines, found = [], places(rows)
    for row in rows:
        if row.key in found:
            place = found[row.key]
            means = [number(row.measures[m].mean()) if m in row.measures else "-" for m in BESIDE_AXES]
            shares = ["-" if share is None else f"{share:.0%}" for share in (place.usable_share, place.share)]
            ends = [with_worst(own, place.worst[m]) for m, own in zip(AXES, (place.response, place.excess))]
            lines.append([f"{row.label} {place.mark}".rstrip(), *ends, *means, *shares])
    return tables.markdown_table(["", *AXES.values(), *BESIDE_AXES.values(), "on the front", "oracles too"], lines)


def with_seeds(share: Share) -> str:
    return f"{with_interval(share.whole)} ({', '.join(map(number, share.by_seed.values()))})"


def section(title: str, rows: list[Row]) -> str:
    """All tables of one target, or of the mean over targets, as markdown."""
    parts = {f"## {title}": plane_table(rows)}
    if found := shares_of_plain(rows):
        lines = []
        for label, own in found.items():
            lines.append([label, *(with_seeds(own[name]) if name in own else "-" for name in SHARES)])
        seeds = ", ".join(map(str, max((row.seeds for row in rows if row.label in found), key=len)))
        about = f"""\
As a share of plain LoRA's of the same training seeds, intervals over seeds and prompts; in parentheses seeds
{seeds}, or the first of them:"""
        parts[about] = tables.markdown_table(["", *SHARES.values()], lines)
    if found := oracle_differences(rows):
        lines = [[label, *(with_interval(own[m], signed=True) for m in AXES)] for label, own in found.items()]
        about = "Difference to what was trained with the true regions, paired by training seed and prompt:"
        parts[about] = tables.markdown_table(["", *AXES.values()], lines)
    for (parent, seeds), differences in ablation_differences(rows).items():
        lines = []
        for name, own in differences.items():
            cells = [with_interval(own[m], signed=True) for m in HEADINGS]
            lines.append([RUNS[name].label.removeprefix(f"{parent}, "), *cells])
        of_seeds = f"training seed(s) {', '.join(map(str, seeds))}"
        about = f'Ablations of "{RUNS[parent].label}", difference to it at {of_seeds}, paired by seed and prompt:'
        parts[about] = tables.markdown_table(["", *HEADINGS.values()], lines)
    if found := below_plain_curve(rows):
        lines = []
        for label, own in found.items():
            beyond = "; responds more than any strength" if own["beyond_the_curve"] else ""
            seeds = f"(seeds {', '.join(map(number, own['per_seed']))}{beyond})"
            lines.append([label, f"{number(own['distance'], own['standard_error'])} {seeds}"])
        parts["Below plain LoRA's strength curve:"] = tables.markdown_table(["", "change outside"], lines)
    factors = [name for name in rows[0].measures if name.startswith("kept_") and name not in HEADINGS]
    headings = HEADINGS | {name: name.replace("kept_", "kept: ").replace("_", " ") for name in factors}
    summaries = {row.label: tables.summarise(row.measures) for row in rows}
    parts["All measures:"] = tables.measure_table(headings, summaries)
    return "".join(f"\n{about}\n\n{table}" for about, table in parts.items())


def explanation(args: argparse.Namespace) -> str:
    """What the table's numbers are, and the settings they were made with."""
    quiet, late = (", ".join(f"{name}={value}" for name, value in own.items()) for own in (QUIET, LATE))
    most = ", ".join(f"*{run.label}*" for run in RUNS.values() if run.most_seeds is None and run.parent is None)
    return f"""\
Settings: {tables.settings_text(args)},
{args.stage1_steps + args.stage2_steps} for what has one stage; half a batch for what adds a row of its own to each
portrait's. Every row draws the same prompts from the same noise, the LoRA active in both branches of the guidance;
*guided* rows are the same LoRAs drawn as the README recommends for each: SPF-Portrait's with
`sfcm_guidance=1`, all others with `{quiet}` besides. *Late* rows
are the same LoRAs drawn with `{late}` instead: above this ratio of noise to signal, so in
the first steps, the LoRA is off and the original model draws the base prompt.

Against the original model's portrait of the base prompt: *response* is the share of the full prompts' portraits that
show the target, by the probe's classifier and by a pixel rule; *change outside* the mean absolute difference (0-255)
outside the target's region; *excess pollution* that minus the original model's own with the full prompt; *kept* the
agreement of the probe's factors. With the base prompt alone, *change* is over the whole picture, and *leak* the share
that shows the target unasked; guided and late rows have none (-), since both are about a target and the pipeline
refuses them without one. A LoRA drawn late draws base prompts alone as in its row without that.

All training seeds are behind {most},
and behind the ablations that a claim rests on; behind the other ways are the first {Run.most_seeds}, behind the other
ablations the first. Brackets are 95 % intervals from {tables.RESAMPLES} resamples in which training seeds and prompts
are both drawn anew: the same prompts for all rows, and each row's seeds from its own, alike for rows of as many. Where
there is one seed, prompts alone are drawn; with few, such an interval is rather too narrow. *Worst* is the training
seed of the least response, or of the most excess pollution, by its mean over prompts and targets. ± is one standard
error over prompts, after the mean over training seeds.

★ no row has at least this response at no more excess pollution (the Pareto front); ☆ only rows that know the true
regions do. *On the front*: in how many of the resamples of seeds and prompts no row does, those with true masks left
out; *oracles too*: none left out. Ablations are not candidates. *Below the strength curve*: the least change outside
at which plain LoRA of the same training seeds, turned down, still responds as much, minus the run's own, ± one
standard error over seeds and prompts.
"""


def write_tables(args: argparse.Namespace, by_target: dict[str, list[Row]]) -> None:
    """Write results.json and table.md."""
    results, sections = {}, [explanation(args)]
    for name, rows in tables.with_mean(by_target).items():
        found, shares, entries = places(rows), shares_of_plain(rows), []
        for row in rows:
            entry = {"label": row.label, "run": row.run_name, "strength": row.strength, "way": row.way}
            place = asdict(found[row.key]) if row.key in found else None
            share = {name: asdict(own) for name, own in shares.get(row.label, {}).items()} or None
            entries.append(entry | {"plane": place, "of_plain": share, "measures": tables.summarise(row.measures)})
        results[name] = {"rows": entries}
        sections.append(section(tables.title_of(name), rows))
    model, flags = drawing.base_model_digest(args.base), " ".join(FLAGS)
    document = {"training_flags": flags, "base_model": model, "targets": results}
    tables.write_results(args.output_dir, args, "".join(sections), **document)


def plane_series(rows: list[Row]) -> list[Series]:
    """What a panel shows: plain LoRA's strength curve from the original model on, and each way to train as a point,
    joined on either side to the same with guidance and to the same drawn late."""
    found, series = places(rows), []

    def points(some: list[Row]) -> list[Point]:
        own = [(found[row.key], row.way) for row in some]
        return [Point(place.response, place.excess, way, bool(place.on_usable_front)) for place, way in own]

    for name, run in RUNS.items():
        own = [row for row in rows if row.run_name == name and row.strength == 1.0]
        own.sort(key=lambda row: ("guided", "", "late").index(row.way))
        if run.style is None or not own:
            continue
        color, marker = run.style
        if name == "plain":
            curve = points(tables.curve_of(rows, name))
            series.append(Series(f"{run.label}, strength 0 to 1", color, curve, curve=True))
        series.append(Series(run.label, color, points(own), marker=marker))
    return series


def write_plane(args: argparse.Namespace, by_target: dict[str, list[Row]]) -> None:
    """Draw the plane of each section, unless there are ablations alone."""
    panels = {tables.title_of(name): plane_series(rows) for name, rows in tables.with_mean(by_target).items()}
    if all(panels.values()):
        figure = plane.plane_figure(panels, "excess pollution (grey levels of 255)", NOTES)
        figure.savefig(args.output_dir / "response_pollution_plane.png")


def parse_args(input_args: Sequence[str] | None = None, description: str | None = __doc__) -> argparse.Namespace:
    # Nothing was chosen on these seeds and prompts.
    parser = drawing.make_parser(description, seeds=[301, 302, 303, 304, 305], prompt_seed=91117, num_prompts=64)
    about = "Which rows, by default all that the base can be trained by; the original model always is one."
    parser.add_argument("--runs", nargs="+", choices=RUNS, help=about)
    parser.add_argument("--ablation_targets", nargs="+", choices=TARGETS, default=["blonde_hair"])
    args = drawing.read_flags(parser, input_args)
    known = trainable(args.base)
    args.runs = known if args.runs is None else args.runs
    if lost := [name for name in args.runs if name not in known]:
        parser.error(f"--runs {' '.join(lost)}: --base {args.base} is not trained with the paper's objective")
    return args


def main(args: argparse.Namespace) -> None:
    """Train, judge, and write the tables and the picture."""
    train_all(args, chosen(args))
    by_target = judging.judged_tables(args, jobs_of(args), label_of)
    write_tables(args, by_target)
    write_plane(args, by_target)


if __name__ == "__main__":
    main(parse_args())
