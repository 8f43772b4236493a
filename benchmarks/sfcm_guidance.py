"""What SFCM guidance takes away from a LoRA's pollution, and from its response: `python benchmarks/sfcm_guidance.py`.

Draws the same prompts from the same noise with the LoRAs that `benchmarks/preservation.py` trained, at growing
`sfcm_guidance`, and judges the portraits as that benchmark does. What is finished is not drawn again.

Source: [ours].
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.parts import drawing, judging
from benchmarks.parts.judging import Job
from benchmarks.parts.plane import Color, Point, Series, plane_figure
from benchmarks.parts.tables import (
    ORIGINAL,
    Row,
    cell,
    estimate,
    markdown_table,
    resamples_of,
    summarise,
    write_results,
)
from toy_portraits.world import TARGETS


MEASURES = {
    "response": "response",
    "change_outside": "change outside",
    "excess": "excess pollution",
    "kept_skin": "skin kept",
    "head_shift": "head shift, px",
}


@dataclass(frozen=True)
class Sweep:
    """A run of `preservation.py` drawn at several strengths of the guidance, `quiet` as the README recommends."""

    run: str
    label: str
    color: Color
    quiet: bool = False


SWEEPS = {
    "plain": Sweep("plain", "plain LoRA", (200, 60, 40)),
    "plain_quiet": Sweep("plain", "plain LoRA, recommended", (222, 150, 30), quiet=True),
    "composed": Sweep("composed", "SPF-Portrait", (30, 90, 200)),
    "composed_quiet": Sweep("composed", "SPF-Portrait, weaker and quiet", (30, 150, 90), quiet=True),
}


def jobs_of(args: argparse.Namespace) -> list[Job]:
    """Raises FileNotFoundError for the first LoRA that is not there."""
    jobs = []
    for target in args.targets:
        for name in args.sweeps:
            for seed in args.seeds:
                folder = args.runs_dir / target / f"{SWEEPS[name].run}-seed{seed}"
                try:
                    drawing.weights_of(folder)
                except FileNotFoundError as error:
                    advice = f"--targets {target} --runs plain stage1 composed --seeds {seed}"
                    message = f"{error} Train it with benchmarks/preservation.py {advice}."
                    raise FileNotFoundError(message) from None
                jobs += [Job(target, name, seed, 1.0, folder, s, SWEEPS[name].quiet) for s in args.sfcm_guidance]
    return jobs


def label_of(job: Job) -> str:
    return f"{SWEEPS[job.run_name].label}, s = {job.sfcm_guidance:g}"


def table_of(target_name: str, rows: Sequence[Row]) -> str:
    lines = [[row.label, *(cell(summarise(row), name) for name in MEASURES)] for row in rows]
    return f'"{TARGETS[target_name].prompt}":\n\n' + markdown_table(["", *MEASURES.values()], lines)


def plot_of(rows: Sequence[Row], sweeps: Sequence[str]) -> list[Series]:
    """A curve a sweep from s = 0 to 1, and the original model."""
    resamples = resamples_of(rows)

    def point(row: Row, bars: bool = False) -> Point:
        both = [estimate(row, name, resamples) for name in ("response", "change_outside")]
        ends = [(e.low, e.high) if bars and e.low is not None else None for e in both]
        return Point(both[0].value, both[1].value, *ends)

    series = [Series(ORIGINAL, (60, 60, 60), [point(rows[0], bars=True)])]
    for sweep in sweeps:
        points = [point(row) for row in rows if row.run_name == sweep]
        series.append(Series(SWEEPS[sweep].label, SWEEPS[sweep].color, points, curve=True))
    return series


def explanation(args: argparse.Namespace) -> str:
    """What the numbers are, and the settings they were made with."""
    return (
        f"{args.num_prompts} prompts (seed {args.prompt_seed}), LoRAs of training seed(s) "
        f"{', '.join(map(str, args.seeds))}, {args.num_inference_steps} DDIM steps, guidance scale "
        f"{args.guidance_scale:g}.\n*Recommended*: `adapter_in_unconditional=False, target_scale=0.75`.\n"
        "Measures as in `preservation.py`; ± is one standard error over prompts.\n"
    )


def parse_args(input_args: Sequence[str] | None = None) -> argparse.Namespace:
    parser = drawing.make_parser(__doc__, "sfcm_guidance")
    parser.add_argument("--runs_dir", type=Path, default=drawing.ROOT / "runs/preservation/runs", help="Of the LoRAs.")
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS), help="Which LoRAs, drawn how.")
    parser.add_argument("--sfcm_guidance", nargs="+", type=float, default=[0.0, 0.25, 0.5, 0.75, 1.0])
    args = drawing.read_flags(parser, input_args)
    if not all(0 <= strength <= 1 for strength in args.sfcm_guidance):
        parser.error("--sfcm_guidance must be in [0, 1]")
    return args


def main(input_args: Sequence[str] | None = None) -> None:
    args = parse_args(input_args)
    jobs, settings = jobs_of(args), drawing.draw_settings(args)
    originals, results = judging.judge_all(jobs, settings, args.output_dir / "cache", args.workers)
    _, judge = judging.tools(settings.device)
    tables = {
        name: judging.make_rows(name, judging.judge_images(judge, own, own.full_images, None), results, label_of)
        for name, own in originals.items()
    }
    panels = {f'"{TARGETS[name].prompt}"': plot_of(rows, args.sweeps) for name, rows in tables.items()}
    plane_figure(panels, "change outside", columns=len(panels)).savefig(args.output_dir / "sfcm_guidance.png")
    found = {
        name: [{"label": row.label, "run": row.run_name, "measures": summarise(row)} for row in rows]
        for name, rows in tables.items()
    }
    text = "\n".join([explanation(args), *(table_of(name, rows) for name, rows in tables.items())])
    write_results(args, text, targets=found)


if __name__ == "__main__":
    main()
