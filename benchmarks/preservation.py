"""Does SPF-Portrait keep a portrait, and what else does? `python benchmarks/preservation.py`.

For every toy target and training seed it trains LoRAs in all the ways of `RUNS` through the real training script, at
equal steps and equal gradient samples, draws the same prompts from the same noise with each, with and without SFCM
guidance, and judges the portraits against the original model's. Plain LoRA turned down is a control too, since a
weaker LoRA pollutes less. What is trained with the true regions is a ceiling: nobody but the renderer knows them.
What is finished is not trained or drawn again, so an interrupted run goes on where it stopped.

Source: [ours].
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import preservation_report
from benchmarks.parts import drawing, judging
from benchmarks.parts.judging import Job
from benchmarks.parts.training import run_folder
from benchmarks.preservation_runs import RUNS, chosen, train, trainings
from toy_portraits.world import TARGETS


SFCM_GUIDANCE = 1.0


def train_all(args: argparse.Namespace) -> None:
    """Train everything, `--workers` at a time."""
    with ThreadPoolExecutor(args.workers) as pool:
        for wave in trainings(args):
            list(pool.map(lambda item: train(args, *item), wave))


def jobs_of(args: argparse.Namespace) -> list[Job]:
    """Every run at every strength, and every way to train once more with guidance."""
    jobs = []
    for target, name, seed in chosen(args):
        run, folder = RUNS[name], run_folder(args.output_dir, target, name, seed)
        jobs += [Job(target, name, seed, strength, folder) for strength in run.strengths]
        if run.parent is None:
            jobs.append(Job(target, name, seed, 1.0, folder, SFCM_GUIDANCE, run.quiet))
    return jobs


def parse_args(input_args: Sequence[str] | None = None, description: str | None = __doc__) -> argparse.Namespace:
    parser = drawing.make_parser(description, "preservation")
    parser.add_argument(
        "--runs", nargs="+", choices=RUNS, default=list(RUNS), help="Which rows; the original model always is one."
    )
    parser.add_argument("--ablation_targets", nargs="+", choices=TARGETS, default=["blonde_hair"])
    parser.add_argument("--ablation_seeds", nargs="+", type=int, help="The first of --seeds if not given.")
    parser.add_argument("--stage1_steps", type=int, default=120)
    parser.add_argument("--stage2_steps", type=int, default=120)
    parser.add_argument("--train_args", default="", help="Further flags of the training script, in one string.")
    args = drawing.read_flags(parser, input_args)
    args.ablation_seeds = args.ablation_seeds or args.seeds[:1]
    if unknown := set(args.ablation_seeds) - set(args.seeds):
        parser.error(
            f"--ablation_seeds {min(unknown)} is none of --seeds, whose LoRAs the ablations are compared with"
        )
    return args


def main(args: argparse.Namespace) -> None:
    """Train, judge, and write the tables and pictures."""
    train_all(args)
    settings = drawing.draw_settings(args)
    originals, results = judging.judge_all(jobs_of(args), settings, args.output_dir / "cache", args.workers)
    _, judge = judging.tools(settings.device)
    tables = {
        name: preservation_report.rows_of(name, judging.judge_original(judge, own), results)
        for name, own in originals.items()
    }
    preservation_report.write_tables(args, tables)
    preservation_report.write_pictures(args, tables, results, originals)


if __name__ == "__main__":
    main(parse_args())
