"""What SFCM guidance takes away from a LoRA's pollution, and from its response: `python benchmarks/sfcm_guidance.py`.

Draws the same prompts from the same noise with the LoRAs that `benchmarks/preservation.py` trained, at growing
`sfcm_guidance`, and judges the portraits as that benchmark does. What is finished is not drawn again.

Source: [ours].
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.plane import Point, Series, plane_picture  # noqa: E402
from benchmarks.preservation import (  # noqa: E402
    QUIET,
    WEIGHTS_NAME,
    DrawSettings,
    add_drawing_flags,
    check_counts,
    draw_settings,
    evaluate_guided,
    load_guided_pipeline,
    load_originals,
)
from benchmarks.rows import (  # noqa: E402
    ORIGINAL,
    Row,
    estimate,
    markdown_table,
    number,
    resamples_of,
    summarise,
    without_nan,
)
from pipeline_spf_portrait import SPFPortraitPipeline  # noqa: E402
from toy_portraits.judge import PortraitJudge  # noqa: E402
from toy_portraits.world import TARGETS  # noqa: E402


MEASURES = {
    "response": "response",
    "change_outside": "change outside",
    "excess": "excess pollution",
    "kept_skin": "skin kept",
    "head_shift": "head shift, px",
}


@dataclass(frozen=True)
class Sweep:
    """A LoRA drawn at several strengths of the guidance.

    Attributes:
        run: which of the LoRAs of `preservation.py`.
        label: its name in table and plot.
        color: in the plot.
        options: further arguments of the call.
    """

    run: str
    label: str
    color: tuple[int, int, int]
    options: dict[str, float | bool]


SWEEPS = {
    "plain": Sweep("plain", "plain LoRA", (200, 60, 40), {}),
    "plain_quiet": Sweep("plain", "plain LoRA, recommended", (222, 150, 30), QUIET),
    "composed": Sweep("composed", "SPF-Portrait", (30, 90, 200), {}),
    "composed_quiet": Sweep("composed", "SPF-Portrait, weaker and quiet", (30, 150, 90), QUIET),
}


@dataclass(frozen=True)
class GuidedJob:
    """One row of one training seed."""

    target_name: str
    sweep: str
    sfcm_guidance: float
    seed: int


@lru_cache(maxsize=1)
def _tools(settings: DrawSettings) -> tuple[SPFPortraitPipeline, PortraitJudge]:
    return load_guided_pipeline(settings), PortraitJudge.from_pretrained()


def judge_job(job: GuidedJob, settings: DrawSettings, runs_dir: Path, cache_dir: Path) -> dict[str, np.ndarray]:
    """The measures of a job, (prompts,) each, and what was drawn for it."""
    pipeline, judge = _tools(settings)
    originals = load_originals(pipeline, job.target_name, settings, cache_dir)
    sweep = SWEEPS[job.sweep]
    folder = lora_folder(runs_dir, job.target_name, sweep.run, job.seed)
    return evaluate_guided(pipeline, judge, originals, folder, job.sfcm_guidance, sweep.options, settings, cache_dir)


def lora_folder(runs_dir: Path, target_name: str, run: str, seed: int) -> Path:
    return runs_dir / target_name / f"{run}-seed{seed}"


def check_loras(args: argparse.Namespace) -> None:
    """Raise a FileNotFoundError that names the first LoRA that is not there."""
    for target_name in args.targets:
        for sweep in args.sweeps:
            for seed in args.seeds:
                weights = lora_folder(args.runs_dir, target_name, SWEEPS[sweep].run, seed) / WEIGHTS_NAME
                if not weights.is_file():
                    raise FileNotFoundError(
                        f"{weights} does not exist: train it with benchmarks/preservation.py "
                        f"--targets {target_name} --runs plain stage1 composed --seeds {seed}."
                    )


def evaluate(args: argparse.Namespace, settings: DrawSettings) -> dict[str, list[Row]]:
    """All rows by target: the original model, then each sweep by growing guidance."""
    cache_dir, tables = args.output_dir / "cache", {}
    pipeline, judge = _tools(settings)
    for target_name in args.targets:
        load_originals(pipeline, target_name, settings, cache_dir)
    jobs = [
        GuidedJob(target_name, sweep, strength, seed)
        for target_name in args.targets
        for sweep in args.sweeps
        for strength in args.sfcm_guidance
        for seed in args.seeds
    ]
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn"), initializer=torch.set_num_threads,
                             initargs=(1,)) as pool:  # fmt: skip
        futures = [pool.submit(judge_job, job, settings, args.runs_dir, cache_dir) for job in jobs]
        results = dict(zip(jobs, (future.result() for future in futures), strict=True))
    for target_name in args.targets:
        originals = load_originals(pipeline, target_name, settings, cache_dir)
        untuned = judge.compare(originals.base_images, originals.full_images, TARGETS[target_name])
        rows = [Row(ORIGINAL, "original", 0.0, {name: values[None] for name, values in untuned.items()})]
        for sweep in args.sweeps:
            for strength in args.sfcm_guidance:
                seeds = [results[GuidedJob(target_name, sweep, strength, seed)] for seed in args.seeds]
                measures = {name: np.stack([own[name] for own in seeds]) for name in untuned}
                rows.append(Row(f"{SWEEPS[sweep].label}, s = {strength:g}", sweep, strength, measures))
        for row in rows:
            row.measures["excess"] = row.measures["change_outside"] - untuned["change_outside"]
        tables[target_name] = rows
    return tables


def table_of(target_name: str, rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        summary = summarise(row)
        lines.append([row.label, *(number(summary[m]["mean"], summary[m]["standard_error"]) for m in MEASURES)])
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


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--runs_dir", type=Path, default=ROOT / "runs" / "preservation" / "runs", help="Where the LoRAs are."
    )
    parser.add_argument(
        "--output_dir", type=Path, default=ROOT / "runs" / "sfcm_guidance", help="Cache, tables and plot."
    )
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="Toy targets.")
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS), help="Which LoRAs, drawn how.")
    parser.add_argument("--sfcm_guidance", nargs="+", type=float, default=[0.0, 0.25, 0.5, 0.75, 1.0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[101, 102, 103], help="Training seeds.")
    parser.add_argument("--workers", type=int, default=2, help="Processes of one thread each.")
    add_drawing_flags(parser)
    args = parser.parse_args(input_args)
    check_counts(parser, args)
    if not all(0 <= strength <= 1 for strength in args.sfcm_guidance):
        parser.error("--sfcm_guidance must be in [0, 1]")
    return args


def main(input_args: list[str] | None = None) -> None:
    args = parse_args(input_args)
    torch.set_num_threads(1)
    args.runs_dir, args.output_dir = args.runs_dir.resolve(), args.output_dir.resolve()
    check_loras(args)
    settings = draw_settings(args)
    tables = evaluate(args, settings)
    text = "\n".join([explanation(args), *(table_of(name, rows) for name, rows in tables.items())])
    (args.output_dir / "table.md").write_text(text, encoding="utf-8")
    panels = {f'"{TARGETS[name].prompt}"': plot_of(rows, args.sweeps) for name, rows in tables.items()}
    picture = plane_picture(panels, "change outside", columns=len(panels))
    picture.save(args.output_dir / "sfcm_guidance.png", optimize=True)
    results = {
        name: [{"label": row.label, "run": row.run_name, "measures": summarise(row)} for row in rows]
        for name, rows in tables.items()
    }
    document = json.dumps(
        without_nan({"settings": {k: str(v) for k, v in vars(args).items()}, "targets": results}), indent=2
    )
    (args.output_dir / "results.json").write_text(document + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
