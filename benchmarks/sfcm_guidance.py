"""What SFCM guidance takes away from a LoRA's pollution, and from its response: `python benchmarks/sfcm_guidance.py`.

Draws the same prompts from the same noise with LoRAs of `benchmarks/preservation.py`, at growing `sfcm_guidance`, and
judges the portraits as that benchmark does. What is finished is not trained or drawn again.

Source: [ours].
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.parts import drawing, judging, tables
from benchmarks.parts.judging import Job
from benchmarks.parts.plane import Point, Series, plane_figure
from benchmarks.parts.runs import run_folder, train_all
from benchmarks.parts.tables import Row


MEASURES = {
    "response": "response",
    "change_outside": "change outside",
    "excess": "excess pollution",
    "kept_skin": "skin kept",
    "head_shift": "head shift, px",
}
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Sweep:
    """A run of `preservation.py` drawn at several strengths of the guidance, `quiet` as the README recommends."""

    run: str
    label: str
    color: str
    quiet: bool = False


SWEEPS = {
    "plain": Sweep("plain", "plain LoRA", "#c83c28"),
    "plain_quiet": Sweep("plain", "plain LoRA, recommended", "#de961e", quiet=True),
    "composed": Sweep("composed", "SPF-Portrait", "#1e5ac8"),
}


def label_of(job: Job) -> str:
    return f"{SWEEPS[job.run_name].label}, s = {job.sfcm_guidance:g}"


def plot_of(rows: Sequence[Row]) -> list[Series]:
    """A curve a sweep from s = 0 to 1, and the original model."""
    resamples = tables.resamples_of(rows)

    def points(run_name: str) -> list[Point]:
        own = [row for row in rows if row.run_name == run_name]
        return [Point(*(tables.estimate(row, m, resamples) for m in ("response", "change_outside"))) for row in own]

    curves = [Series(sweep.label, sweep.color, points(name), curve=True) for name, sweep in SWEEPS.items()]
    return [Series(tables.ORIGINAL, "#3c3c3c", points("original")), *(curve for curve in curves if curve.points)]


def main(input_args: Sequence[str] | None = None) -> None:
    parser = drawing.make_parser(__doc__)
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS), help="Which LoRAs, drawn how.")
    args = drawing.read_flags(parser, input_args)
    chosen = [(target, name, seed) for target in args.targets for name in args.sweeps for seed in args.seeds]
    train_all(args, [(target, SWEEPS[name].run, seed) for target, name, seed in chosen])
    jobs = []
    for target, name, seed in chosen:
        sweep = SWEEPS[name]
        folder = run_folder(args.output_dir, target, sweep.run, seed)
        jobs += [Job(target, name, seed, 1.0, folder, "guided", strength, sweep.quiet) for strength in STRENGTHS]
    by_target = judging.judged_tables(args, jobs, label_of)

    text, results, panels = f"""\
{tables.settings_text(args)}.
*Recommended*: `adapter_in_unconditional=False, target_scale=0.75`.
Measures as in `preservation.py`; ± is one standard error over prompts.
""", {}, {}  # fmt: skip
    for target, rows in by_target.items():
        found, title = {row.label: tables.summarise(row.measures) for row in rows}, tables.title_of(target)
        text += f"\n{title}:\n\n" + tables.measure_table(MEASURES, found)
        results[target], panels[title] = found, plot_of(rows)
    folder = args.output_dir / "sfcm_guidance"
    tables.write_results(folder, args, text, targets=results)
    plane_figure(panels, "change outside", columns=len(panels)).savefig(folder / "sfcm_guidance.png")


if __name__ == "__main__":
    main()
