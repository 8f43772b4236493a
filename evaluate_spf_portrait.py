"""Is my LoRA clean? What a LoRA moves besides its target, measured against the original model's own portraits. [ours]

Draws the same prompts from the same seeds with the original model and with each LoRA, alone and with the target, and
writes a report: preservation, response, pollution, and which checkpoint of a run to keep. `--toy` shows it on the toy
world, where the truth is known.
"""

from evaluation.arguments import REGIONS, parse_args
from programs.console import import_libraries, phase_bar


if __name__ == "__main__":
    # Flags are read before the libraries are imported, which takes seconds: --help and a wrong flag answer at once.
    ARGS = parse_args()
    import_libraries()

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import groupby
from pathlib import Path
from typing import Any

import diffusers
import torch

from evaluation.drawing import draw_portraits, on_pipeline, open_compared, picture_folders, save_regions
from evaluation.inputs import ORIGINAL, LoraSource, find_loras, picture_names, read_masks, read_prompts
from evaluation.judges import Judges, load_judges
from evaluation.measures import MEASURES, measure
from evaluation.report import PAGE, picture_rows, prepare_folder, write_report, write_tables
from evaluation.summary import Judged, summarise
from families.pipelines import load_drawing_pipeline
from programs.loading import choose_device, without_false_alarms
from prompts import PromptPair
from toy_portraits.judge import PortraitJudge
from toy_portraits.world import TARGETS


def run(args: argparse.Namespace) -> Path:
    """Returns the page."""
    # Everything that may be wrong with what is given is found before the first portrait.
    pairs, loras = read_prompts(args), find_loras(args)
    names = picture_names(args, len(pairs))
    device = choose_device(args.device)
    if args.region == "masks":
        for name in names:
            read_masks(args.region_masks, [name], (64, 64))
    prepare_folder(args.output_dir)

    # The models: what draws, on which each LoRA is tried, and what judges.
    flag = "pretrained_model_name_or_path"
    pipeline = load_drawing_pipeline(getattr(args, flag), getattr(torch, args.dtype), flag, args.base_config)
    pipeline.to(device).set_progress_bar_config(disable=True)
    if "safety_checker" in pipeline.components:  # SDXL has none
        pipeline.safety_checker = None
    for lora in loras:
        with on_pipeline(pipeline, lora, args.lora_scale):
            pass
    judges = load_judges(args, device, ask_network=args.toy is None)
    if args.toy is not None:
        judges.probe, judges.target = PortraitJudge.from_pretrained(), TARGETS[args.toy]
    for reason, names_of in groupby(sorted(judges.missing, key=judges.missing.get), key=judges.missing.get):
        print(f"not measured: {', '.join(MEASURES[name].label for name in names_of)}: {reason}", flush=True)

    models = [ORIGINAL, *loras]
    folders = picture_folders(args.output_dir, models)
    for number, (model, folder) in enumerate(zip(models, folders, strict=True), start=1):
        print(f"drawing {number} of {len(models)}: {model.name}", flush=True)
        with_lora = nullcontext() if model is ORIGINAL else on_pipeline(pipeline, model, args.lora_scale)
        with with_lora, phase_bar("drawing", len(names), "portrait") as bar:
            draw_portraits(pipeline, pairs, args, folder, model is not ORIGINAL, bar)

    document = measure_all(args, pairs, models, folders, judges)
    report(args, pairs, folders, document)
    print(document["verdict"])
    return args.output_dir / PAGE


def measure_all(
    args: argparse.Namespace, pairs: Sequence[PromptPair], models: Sequence[LoraSource], folders: Sequence[Path],
    judges: Judges,
) -> dict[str, Any]:  # fmt: skip
    """The document of what was drawn, whose tables are written after each LoRA: an end loses the last one alone."""
    names = picture_names(args, len(pairs))
    if args.region != "masks":
        save_regions(folders, names, args, judges.probe)
    judged, lines = [], []
    for model, folder in zip(models, folders, strict=True):
        print(f"measuring {len(judged) + 1} of {len(models)}: {model.name}", flush=True)
        with phase_bar("measuring", len(names), "portrait") as bar:
            parts = open_compared(folders[0], folder, names, pairs, args.region_masks, bar)
            found, whole = measure(parts, judges, args.neutral_prompt)
        values = {name: numbers.reshape(len(pairs), args.num_seeds) for name, numbers in found.items()}
        judged.append(Judged(model.name, "" if model is ORIGINAL else str(model.path), model.role, values, whole))
        lines += [{"lora": model.name, "portrait": n, **{m: found[m][i] for m in found}} for i, n in enumerate(names)]
        document = summarise(judged, judges.missing, args.num_resamples, args.seed)
        write_tables(args.output_dir, document, lines)
    return document


def report(
    args: argparse.Namespace, pairs: Sequence[PromptPair], folders: Sequence[Path], document: dict[str, Any]
) -> None:
    """The page, its plot and metrics.json, of a document that has all LoRAs."""
    document["region"] = REGIONS[args.region]
    document["prompts"] = [
        {"prompt": f"p{i:03d}", "base": pair.base_prompt, "target": pair.target_text, "full": pair.full_prompt}
        for i, pair in enumerate(pairs)
    ]
    document["seeds"] = list(range(args.seed, args.seed + args.num_seeds))
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "toy_prompts"}
    document["settings"] = settings
    for entry, folder in zip(document["loras"], folders, strict=True):
        entry["pictures"] = folder.relative_to(args.output_dir).as_posix()
    names = picture_names(args, len(pairs))
    rows = (
        (entry["name"], picture_rows(pairs, names, folders[0], folder, args.num_pictures))
        for entry, folder in zip(document["loras"][1:], folders[1:], strict=True)
    )
    write_report(args.output_dir, document, rows)


def evaluate(args: argparse.Namespace) -> None:
    diffusers.utils.logging.disable_progress_bar()
    try:
        with without_false_alarms():
            print(run(args))
    except (ValueError, OSError) as error:
        raise SystemExit(f"evaluate_spf_portrait.py: error: {' '.join(str(error).split())}") from error


def main(input_args: list[str] | None = None) -> None:
    evaluate(parse_args(input_args))


if __name__ == "__main__":
    evaluate(ARGS)
