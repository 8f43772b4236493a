"""Which settings to take: `python benchmarks/choose.py --candidates "default=" "wide=--sfcm_gamma 1"`.

Trains the composed run of `benchmarks/preservation.py` with the further flags of each candidate, beside plain LoRA, on
training seeds and prompts that no reported result uses. All candidates start from the same stage 1 of a seed. Writes
choice.md and choice.json: what each keeps, which one is chosen, by which rule, and what that was chosen on.

Source: [ours].
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import continual, map_quality, preservation, sfcm_modes
from benchmarks.parts import drawing, judging, tables
from benchmarks.parts.drawing import file_digest
from benchmarks.parts.judging import Job
from benchmarks.parts.runs import RUNS, UNWATCHED, run_folder, train_all, train_into, training_command
from benchmarks.parts.tables import Row, Share, markdown_table, with_worst
from loras import LORA_WEIGHTS
from toy_portraits.recipe import training_flags
from training.arguments import parse_args as parse_training_args


LEAST_SEED = 0.9  # of plain LoRA's response, for every training seed
# What a candidate may not set, since it is the same for all of them.
SHARED = (
    "pretrained_model_name_or_path", "train_data_dir", "seed", "output_dir", "stage1_steps", "stage1_lora_path",
)  # fmt: skip
PREFIX = "candidate_"  # of a candidate's runs
Shares = dict[str, dict[str, Share]]  # of plain LoRA's, by candidate and by measure of `tables.WORST`


# --------------------------------------------------------------------------------------------------------------- flags


def read_candidates(words: Sequence[str]) -> dict[str, str]:
    """The flags of each candidate by name, of words like "name=--flag value".

    Raises:
        ValueError: a word has no such form, or a name comes twice.
    """
    found = {}
    for word in words:
        name, equals, flags = word.partition("=")
        if not equals or not re.fullmatch(r"[\w-]+", name):
            raise ValueError(f'--candidates "{word}": give a name of letters, digits, _ or -, then = and flags')
        if name in found:
            raise ValueError(f"--candidates {name}: the name is given twice")
        found[name] = flags
    return found


def check_flags(args: argparse.Namespace) -> None:
    """Read each candidate's flags as the training script will, which ends here if it cannot take them.

    Raises:
        ValueError: a candidate, or --train_args, sets what has to be the same for all of them.
    """
    if sfcm_modes.LOST.keys() & set(shlex.split(" ".join(args.candidates.values()))):
        sfcm_modes.register()
    shared = [*training_flags(args.targets[0], args.base), "--seed", str(args.seeds[0]), *UNWATCHED]
    for name in ("stage1_steps", "stage2_steps", "output_dir"):
        shared += [f"--{name}", str(getattr(args, name))]
    shared += shlex.split(RUNS["composed"].flags)
    before = parse_training_args(shared).asked
    for name, flags in {"": "", **args.candidates}.items():
        asked = parse_training_args([*shared, *shlex.split(args.train_args), *shlex.split(flags)]).asked
        for flag in SHARED:
            if asked[flag] != before[flag]:
                where = f"--candidates {name}" if name else "--train_args"
                raise ValueError(f"{where}: --{flag} is not to be set there, it is the same for all candidates")


def check_unreported(args: argparse.Namespace) -> None:
    """
    Raises:
        ValueError: a training seed or the prompt seed is one that a benchmark reports.
    """
    reported = [benchmark.parse_args([]) for benchmark in (preservation, continual, map_quality)]
    for seed in args.seeds:
        if any(seed in own.seeds for own in reported):
            raise ValueError(f"--seeds {seed}: reported results are made with it; choose with others")
    if any(args.prompt_seed == own.prompt_seed for own in reported):
        raise ValueError(f"--prompt_seed {args.prompt_seed}: reported results are made with it; choose with another")


def parse_args(input_args: Sequence[str] | None = None) -> argparse.Namespace:
    defaults = {"seeds": [401, 402], "prompt_seed": 95551, "num_prompts": 48, "num_inference_steps": 8}
    parser = drawing.make_parser(__doc__, **defaults)
    about = 'What each adds to the flags of the composed run, like "wide=--sfcm_gamma 1"; "default=" adds nothing.'
    parser.add_argument("--candidates", nargs="+", required=True, help=about)
    about = "Share of plain LoRA's response that the chosen candidate has at least."
    parser.add_argument("--least_response", type=float, default=1.0, help=about)
    args = drawing.read_flags(parser, input_args)
    try:
        args.candidates = read_candidates(args.candidates)
        check_unreported(args)
        check_flags(args)
    except ValueError as error:
        parser.error(str(error))
    return args


# ------------------------------------------------------------------------------------------------------------ training


def train(args: argparse.Namespace) -> None:
    """Plain LoRA and stage 1 of every target and seed, then all candidates from that stage 1."""
    places = [(target, seed) for target in args.targets for seed in args.seeds]
    train_all(args, [(target, run, seed) for run in ("plain", "stage1") for target, seed in places])

    def train_candidate(target: str, seed: int, name: str) -> None:
        command = training_command(args, target, "composed", seed) + shlex.split(args.candidates[name])
        stage1 = file_digest(run_folder(args.output_dir, target, "stage1", seed) / LORA_WEIGHTS)
        train_into(run_folder(args.output_dir, target, PREFIX + name, seed), command, args.base, stage1=stage1)

    with ThreadPoolExecutor(args.workers) as pool:
        wanted = [(target, seed, name) for target, seed in places for name in args.candidates]
        list(pool.map(lambda one: train_candidate(*one), wanted))


def jobs_of(args: argparse.Namespace) -> list[Job]:
    """Plain LoRA and every candidate, each target and seed, drawn without guidance."""
    return [
        Job(target, run, seed, 1.0, run_folder(args.output_dir, target, run, seed))
        for target in args.targets
        for seed in args.seeds
        for run in ("plain", *(PREFIX + name for name in args.candidates))
    ]


def label_of(job: Job) -> str:
    return RUNS["plain"].label if job.run_name == "plain" else job.run_name.removeprefix(PREFIX)


# ------------------------------------------------------------------------------------------------------------ choosing


def shares_of(rows: list[Row]) -> Shares:
    """What each candidate of a section has of plain LoRA.

    Raises:
        ValueError: plain LoRA has none of a measure, so that there is nothing to have a share of.
    """
    (plain,) = (row for row in rows if row.run_name == "plain")
    candidates = [row for row in rows if row.run_name.startswith(PREFIX)]
    for name in tables.WORST:
        if (mean := plain.measures[name].mean()) <= 0:
            raise ValueError(f"plain LoRA's {name} is {mean:.2f}: nothing to have a share of; train it longer.")
    return {row.label: {name: tables.share_of(row, plain, name) for name in tables.WORST} for row in candidates}


def choose(shares: Shares, least_response: float) -> tuple[str, list[str]]:
    """The chosen candidate, and all that respond enough.

    The least mean excess among those whose mean response is at least `least_response` and no training seed's below
    `LEAST_SEED`; if there is none, the highest mean response. Of two alike the first.
    """
    enough = [
        name
        for name, own in shares.items()
        if own["response"].whole.value >= least_response
        and all(share >= LEAST_SEED for share in own["response"].by_seed.values())
    ]
    if enough:
        return min(enough, key=lambda name: shares[name]["excess"].whole.value), enough
    return max(shares, key=lambda name: shares[name]["response"].whole.value), []


def explanation(args: argparse.Namespace, where: str, winner: str, enough: list[str]) -> str:
    """The head of choice.md: what is chosen, the rule, and what it was chosen on."""
    rule = f"at least {args.least_response:g} of plain LoRA's response on average, and {LEAST_SEED:g} with each seed"
    why = f"It has the least mean excess pollution of those that have {rule}: {', '.join(enough)}."
    if not enough:
        why = f"**No candidate has {rule}**; it has the highest mean response."
    flags = f"`{args.candidates[winner]}`" if args.candidates[winner] else "no further flags"
    return f"""\
# A choice of settings

Chosen: **{winner}**, {flags}.
{why}
This is the rule, applied to the section {where}; where none responds enough, the highest mean response is chosen.

Chosen on: {tables.settings_text(args)}
(plain LoRA: {args.stage1_steps + args.stage2_steps}). No reported result uses these training seeds or these prompts.
Each candidate is the composed run of `benchmarks/preservation.py` with its further flags, from the same stage 1 of a
seed, drawn without guidance.

Shares of plain LoRA's of the same training seeds and prompts; in brackets 95 % intervals from {tables.RESAMPLES}
resamples of training seeds and prompts together. *Worst* is the training seed of the least response, of the most
excess pollution, and of the most change with the base prompt alone.
"""


def write_choice(args: argparse.Namespace, by_target: dict[str, list[Row]]) -> None:
    """Write choice.md and choice.json. The mean over targets decides, if there are several."""
    sections = {name: shares_of(rows) for name, rows in tables.with_mean(by_target).items()}
    where = next(iter(sections))
    winner, enough = choose(sections[where], args.least_response)
    text, document = explanation(args, tables.title_of(where), winner, enough), {}
    headings = [preservation.HEADINGS[name] for name in tables.WORST]
    for section, shares in sections.items():
        lines = []
        for name, own in shares.items():
            cells = [with_worst(share.whole, share.worst) for share in own.values()]
            flags = args.candidates[name]
            lines.append([f"{name} (chosen)" if name == winner else name, f"`{flags}`" if flags else "", *cells])
        text += f"\n## {tables.title_of(section)}\n\n" + markdown_table(["", "flags", *headings], lines)
        document[section] = {name: {m: asdict(share) for m, share in own.items()} for name, own in shares.items()}
    measures = {name: {row.label: tables.summarise(row.measures) for row in rows} for name, rows in by_target.items()}
    tables.write_results(
        args.output_dir, args, text, ("choice.md", "choice.json"), chosen=winner, enough=enough, least_seed=LEAST_SEED,
        base_model=drawing.base_model_digest(args.base), of_plain=document, measures=measures,
    )  # fmt: skip


def main(args: argparse.Namespace) -> None:
    """Train, judge, choose."""
    train(args)
    write_choice(args, judging.judged_tables(args, jobs_of(args), label_of))


if __name__ == "__main__":
    main(parse_args())
