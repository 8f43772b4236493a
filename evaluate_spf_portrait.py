"""Is my LoRA clean? What a LoRA moves besides its target, measured against the original model's own portraits.

Draws the same prompts from the same seeds with the original model and with each LoRA, alone and with the target, and
writes a report: preservation, response, pollution, and which checkpoint of a run to keep. `--toy` shows it on the toy
world, where the truth is known.

Source: [ours].
"""

from __future__ import annotations

from evaluation.arguments import REGIONS, parse_args
from programs.console import import_libraries, phase_bar


if __name__ == "__main__":
    # Flags are read before the libraries are imported, which takes seconds: --help and a wrong flag answer at once.
    ARGS = parse_args()
    import_libraries()

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from evaluation.inputs import ORIGINAL_MODEL, LoraSource, find_loras, picture_name, read_masks, read_prompts
from evaluation.judges import Judges, add_pictures, frechet_distance, load_judges
from evaluation.measures import (
    MEASURES,
    cosine,
    direction_similarity,
    label_agreement,
    nearer_to,
    only_inside,
    pixel_change,
    ssim,
)
from evaluation.report import PictureRow, response_plot, write_csv, write_html, write_json, write_lines
from evaluation.summary import Judged, summarise
from loras.loading import load_lora
from pictures import overlay_heat_map
from pipeline_spf_portrait import SPFPortraitPipeline
from programs.loading import InputError, choose_device, load_pipeline, naming
from prompts import PromptPair, make_prompt_pair
from toy_portraits.judge import PortraitJudge, base_prompts, target_region
from toy_portraits.world import TARGETS


ORIGINAL = LoraSource(ORIGINAL_MODEL, Path(), "original")
AT_A_TIME = 4  # portraits in memory while they are measured
TABLES, PAGE, NUMBERS = ("metrics.csv", "portraits.csv"), "report.html", "metrics.json"


@dataclass(frozen=True)
class Portraits:
    """What a model drew, n portraits of all: `base` and `full` (n, H, W, 3) uint8."""

    base: np.ndarray
    full: np.ndarray


@dataclass(frozen=True)
class Compared:
    """A model's portraits beside the original model's, n of all, and what measuring them takes besides.

    Attributes:
        original, adapted: the portraits.
        region: (n, H, W) in [0, 1], where the target may change them.
        pairs: n, the prompt of each.
    """

    original: Portraits
    adapted: Portraits
    region: np.ndarray
    pairs: Sequence[PromptPair]


# ------------------------------------------------------------------------------------------------------------- drawing


def draw(
    pipeline: SPFPortraitPipeline, pairs: Sequence[PromptPair], args: argparse.Namespace, with_map: bool
) -> Iterator[tuple[list[str], Portraits, np.ndarray | None]]:
    """Draw every prompt with every seed, with the base prompt alone and with the target.

    Args:
        pipeline: with a LoRA on it, or none.
        pairs: P prompts.
        args: seeds and sampler; the noise of a seed is the same for every model and prompt.
        with_map: whether to return the SFCMs.

    Yields:
        Names of at most `batch_size` portraits, the portraits, and their (n, h, w) maps in [0, 1]; all seeds of a
        prompt come together.
    """
    seeds = range(args.seed, args.seed + args.num_seeds)
    size = {} if args.resolution is None else {"height": args.resolution, "width": args.resolution}
    for prompt, pair in enumerate(pairs):
        for start in range(0, args.num_seeds, args.batch_size):
            chosen = seeds[start : start + args.batch_size]

            def call(chosen=chosen, **options):
                return pipeline(
                    num_images_per_prompt=len(chosen),
                    generator=[torch.Generator().manual_seed(seed) for seed in chosen],
                    num_inference_steps=args.num_inference_steps,
                    guidance_scale=args.guidance_scale,
                    output_type="np",
                    **size,
                    **options,
                )

            options = {"target_prompt": list(pair.target_argument), "base_phrases": list(pair.base_phrases)}
            if with_map:
                options |= {"return_sfcm": True, "free_phrases": list(pair.free_phrases)}
            output = call(prompt=pair.base_prompt, **options)
            base = call(prompt=pair.base_prompt).images
            pictures = (np.rint(part * 255).astype(np.uint8) for part in (base, output.images))
            maps = output.sfcm[:, 0].numpy() if with_map else None
            yield [picture_name(prompt, seed) for seed in chosen], Portraits(*pictures), maps


def file_names(args: argparse.Namespace, count: int) -> list[str]:
    """The names of all portraits' files, in the order in which they are drawn."""
    seeds = range(args.seed, args.seed + args.num_seeds)
    return [picture_name(prompt, seed) for prompt in range(count) for seed in seeds]


def picture_folders(args: argparse.Namespace, models: Sequence[LoraSource]) -> list[Path]:
    """A folder for each model. Its number tells apart what is alike where signs that no folder takes are left out."""
    names = ("".join(c if c.isalnum() or c in "-_." else "_" for c in model.name)[:60] for model in models)
    return [args.output_dir / "pictures" / f"{i:02d}-{name}" for i, name in enumerate(names)]


def open_portraits(folder: Path, names: Sequence[str]) -> Portraits:
    def read(kind: str) -> np.ndarray:
        return np.stack([np.asarray(Image.open(folder / f"{name}-{kind}.png")) for name in names])

    return Portraits(read("base"), read("full"))


def open_maps(folder: Path, names: Sequence[str]) -> np.ndarray:
    """(n, h, w), the SFCMs of a LoRA's portraits."""
    return np.stack([np.load(folder / f"{name}-sfcm.npy") for name in names])


def draw_all(
    pipeline: SPFPortraitPipeline, pairs: Sequence[PromptPair], models: Sequence[LoraSource],
    folders: Sequence[Path], args: argparse.Namespace,
) -> None:  # fmt: skip
    """Draw with each model into its folder: what is measured later is what was drawn, and none of it is in memory."""
    for number, (model, folder) in enumerate(zip(models, folders, strict=True), start=1):
        print(f"drawing {number} of {len(models)}: {model.name}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        if model is not ORIGINAL:
            use_lora(pipeline, model, args.lora_scale)
        with phase_bar("drawing", len(pairs) * args.num_seeds, "portrait") as bar:
            for names, portraits, maps in draw(pipeline, pairs, args, with_map=model is not ORIGINAL):
                save_drawn(folder, names, portraits, maps)
                bar.update(len(names))
        if model is not ORIGINAL:
            pipeline.unload_lora_weights()


def save_drawn(folder: Path, names: Sequence[str], portraits: Portraits, maps: np.ndarray | None) -> None:
    for i, name in enumerate(names):
        Image.fromarray(portraits.base[i]).save(folder / f"{name}-base.png")
        Image.fromarray(portraits.full[i]).save(folder / f"{name}-full.png")
        if maps is not None:
            np.save(folder / f"{name}-sfcm.npy", maps[i])


def use_lora(pipeline: SPFPortraitPipeline, lora: LoraSource, scale: float) -> None:
    """Have this LoRA on the pipeline, which has none."""
    load_lora(pipeline, str(lora.path), "evaluated")
    pipeline.set_adapters("evaluated", scale)


# ----------------------------------------------------------------------------------------------------------- measuring


def parts_of(names: Sequence[str]) -> Iterator[Sequence[str]]:
    return (names[start : start + AT_A_TIME] for start in range(0, len(names), AT_A_TIME))


def save_regions(
    folders: Sequence[Path], names: Sequence[str], args: argparse.Namespace, probe: PortraitJudge | None
) -> None:
    """Write where the target may change each portrait, the same for all LoRAs, beside the original model's portraits.

    Args:
        folders: of the original model and each LoRA.
        names: of the portraits.
        args: `region`, which is not "masks", and `toy`.
        probe: for the region "probe".
    """
    for some in parts_of(names):
        if args.region == "probe":
            before = probe.read(open_portraits(folders[0], some).base).labels
            after = (probe.read(open_portraits(folder, some).full).labels for folder in folders[1:])
            regions = np.any([target_region(before, own, TARGETS[args.toy]) for own in after], axis=0)
        else:
            regions = np.mean([open_maps(folder, some) for folder in folders[1:]], axis=0)
        for name, region in zip(some, regions, strict=True):
            np.save(folders[0] / f"{name}-region.npy", region)


def open_regions(folder: Path, names: Sequence[str], size: tuple[int, int], args: argparse.Namespace) -> np.ndarray:
    """(n, H, W) in [0, 1]: masks, or what `save_regions` wrote, in the portraits' size."""
    if args.region == "masks":
        return read_masks(args.region_masks, names, size)
    found = np.stack([np.load(folder / f"{name}-region.npy") for name in names])
    regions = torch.from_numpy(found)[:, None].double()
    return F.interpolate(regions, size, mode="bilinear", align_corners=False)[:, 0].numpy()


def open_compared(
    original: Path, adapted: Path, names: Sequence[str], pairs: Sequence[PromptPair], args: argparse.Namespace
) -> Iterator[Compared]:
    """All portraits of a model from its folder, a few at a time.

    Args:
        original, adapted: folders.
        names: of all portraits, in the order of `pairs` with the seeds of each together.
        pairs: the prompts.
        args: the flags.
    """
    of_name = dict(zip(names, (pair for pair in pairs for _ in range(args.num_seeds)), strict=True))
    for some in parts_of(names):
        before = open_portraits(original, some)
        region = open_regions(original, some, before.base.shape[1:3], args)
        yield Compared(before, open_portraits(adapted, some), region, [of_name[name] for name in some])


def measure(
    parts: Iterable[Compared], judges: Judges, neutral_prompt: str | None = None, probe: PortraitJudge | None = None,
    toy: str | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, float]]:  # fmt: skip
    """All measures of one model; of its portraits, one part at a time is in memory.

    Args:
        parts: all B portraits.
        judges: what measures them.
        neutral_prompt: what the leak is measured against; None is the base prompt.
        probe: of the toy world, for the truth.
        toy: its target.

    Returns:
        Measures of each portrait, (B,), and those of the whole set.
    """
    found, embeds = [], []
    inception = None if judges.inception is None else judges.inception()
    for part in parts:
        before, after = part.original.base, part.adapted.full
        own = measure_pixels(part, judges)
        if judges.clip is not None:
            own |= measure_with_clip(part, judges, neutral_prompt)
        if judges.dino is not None:
            embeds.append((judges.dino.images(before), judges.dino.images(after)))
            own["dino"] = cosine(*embeds[-1])
        if inception is not None:
            add_pictures(inception, before, after)
        if probe is not None:
            truth = probe.compare(before, after, TARGETS[toy])
            own |= {f"truth_{name}": truth[name] for name in ("kept", "change_outside", "response")}
            own["truth_leak"] = probe.response(part.adapted.base, TARGETS[toy])["response"]
        found.append(own)
    values, whole = {name: np.concatenate([own[name] for own in found]) for name in found[0]}, {}
    several = len(values["change"]) > 1
    if embeds and judges.torchmetrics:
        whole["fd_dino"] = frechet_distance(*map(np.concatenate, zip(*embeds))) if several else float("nan")
    if inception is not None:
        whole["fid"] = float(inception.compute()) if several else float("nan")
    return values, whole


def measure_pixels(part: Compared, judges: Judges) -> dict[str, np.ndarray]:
    """What is measured from pixels, labels and faces, (n,) each."""
    before, after = part.original.base, part.adapted.full
    found = {
        "change": pixel_change(before, after),
        "change_outside": pixel_change(before, after, 1 - part.region),
        "base_change": pixel_change(before, part.adapted.base),
        "ssim": ssim(before, after),
    }
    if judges.lpips is not None:
        found["lpips"] = judges.lpips(before, after)
    if judges.segmenter is not None:
        found["seg_cons"] = label_agreement(judges.segmenter.labels(before), judges.segmenter.labels(after))
    if judges.face is not None:
        found["identity"] = cosine(judges.face.images(before), judges.face.images(after))
    return found


def measure_with_clip(part: Compared, judges: Judges, neutral_prompt: str | None) -> dict[str, np.ndarray]:
    """CLIP's measures, (n,) each."""
    clip, before = judges.clip, judges.clip.images(part.original.base)
    after = clip.images(part.adapted.full)
    inside = clip.images(only_inside(part.original.base, part.adapted.full, part.region))
    targets, base, full = (
        clip.texts([getattr(pair, name) for pair in part.pairs])
        for name in ("target_text", "base_prompt", "full_prompt")
    )
    # A neutral text says nothing of the portrait, so neither does what is held against it.
    if neutral_prompt is None:
        asked, neutral = full, base
    else:
        asked, neutral = targets, clip.texts([neutral_prompt] * len(targets))
    return {
        "clip_i": cosine(before, after),
        "clip_t": cosine(after, targets),
        "clip_t_inside": cosine(inside, targets),
        "direction": direction_similarity(before, inside, base, full),
        "leak": nearer_to(clip.images(part.adapted.base), asked, neutral),
    }


# ----------------------------------------------------------------------------------------------------------- writing


def picture_rows(
    args: argparse.Namespace, pairs: Sequence[PromptPair], names: Sequence[str], original: Path, adapted: Path
) -> list[PictureRow]:
    """The first seeds of as many prompts as possible, --num_pictures rows."""
    order = sorted(range(len(names)), key=lambda i: (i % args.num_seeds, i))[: args.num_pictures]
    rows = []
    for i in sorted(order):
        before, after = (open_portraits(folder, names[i : i + 1]) for folder in (original, adapted))
        shown = [Image.fromarray(pictures[0]) for pictures in (before.base, after.base, after.full)]
        shown.append(overlay_heat_map(shown[-1], open_maps(adapted, names[i : i + 1])[0]))
        rows.append(PictureRow(f"{names[i]}: {pairs[i // args.num_seeds].full_prompt}", shown))
    return rows


def prepare_folder(folder: Path) -> None:
    """The output folder, without what an evaluation that did not come to measuring drew into it.

    Raises:
        InputError: it cannot be made, or holds measures, which were hours of work and are of other portraits.
    """
    with naming(f"--output_dir {folder}"):
        for name in (*TABLES, NUMBERS, PAGE):
            if (folder / name).exists():
                raise ValueError(f"holds {name} of an earlier evaluation: give another folder, or delete this one")
        folder.mkdir(parents=True, exist_ok=True)
        for picture in (folder / "pictures").glob("[0-9][0-9]*-*/p[0-9]*-s[0-9]*-*.*"):
            picture.unlink()


def say_missing(missing: dict[str, str]) -> None:
    """A line for each reason why something is not measured."""
    for reason, measures in groupby(sorted(missing, key=lambda name: missing[name]), key=lambda name: missing[name]):
        print(f"not measured: {', '.join(MEASURES[name].label for name in measures)}: {reason}", flush=True)


def run(args: argparse.Namespace) -> Path:
    """Draw, measure and write; everything that may be wrong with the input is found before the first portrait."""
    pairs, loras = toy_prompts(args) if args.toy_prompts else read_prompts(args), find_loras(args)
    device, names = choose_device(args.device), file_names(args, len(pairs))
    if args.region == "masks":
        for name in names:
            read_masks(args.region_masks, [name], (64, 64))
    prepare_folder(args.output_dir)
    flag = "pretrained_model_name_or_path"
    pipeline = load_pipeline(SPFPortraitPipeline, getattr(args, flag), getattr(torch, args.dtype), flag)
    pipeline.to(device).set_progress_bar_config(disable=True)
    pipeline.safety_checker = None
    for lora in loras:
        use_lora(pipeline, lora, args.lora_scale)
        pipeline.unload_lora_weights()
    judges = load_judges(args, device, ask_network=args.toy is None)
    say_missing(judges.missing)
    probe = PortraitJudge.from_pretrained() if args.toy else None

    models = [ORIGINAL, *loras]
    folders = picture_folders(args, models)
    draw_all(pipeline, pairs, models, folders, args)
    document = measure_all(args, pairs, names, models, folders, judges, probe)
    write_report(args, pairs, names, folders, document)
    print(document["verdict"])
    return args.output_dir / PAGE


def measure_all(
    args: argparse.Namespace, pairs: Sequence[PromptPair], names: Sequence[str], models: Sequence[LoraSource],
    folders: Sequence[Path], judges: Judges, probe: PortraitJudge | None,
) -> dict[str, Any]:  # fmt: skip
    """Measure what was drawn, and keep tables of all that is measured so far: an end before the last LoRA loses that
    one alone.

    Args:
        args: the flags.
        pairs: the prompts.
        names: of all portraits.
        models: the original model and the LoRAs.
        folders: theirs.
        judges, probe: what measures.

    Returns:
        The document of all.
    """
    if args.region != "masks":
        save_regions(folders, names, args, probe)
    judged, lines = [], []
    for model, folder in zip(models, folders, strict=True):
        print(f"measuring {len(judged) + 1} of {len(models)}: {model.name}", flush=True)
        with phase_bar("measuring", len(names), "portrait") as bar:
            parts = counted(open_compared(folders[0], folder, names, pairs, args), bar)
            found, whole = measure(parts, judges, args.neutral_prompt, probe, args.toy)
        values = {name: numbers.reshape(len(pairs), args.num_seeds) for name, numbers in found.items()}
        judged.append(Judged(model.name, "" if model is ORIGINAL else str(model.path), model.role, values, whole))
        lines += [{"lora": model.name, "portrait": n, **{m: found[m][i] for m in found}} for i, n in enumerate(names)]
        document = summarise(judged, judges.missing, args.num_resamples, args.seed)
        write_csv(args.output_dir / TABLES[0], document)
        write_lines(args.output_dir / TABLES[1], lines)
    return document


def counted(parts: Iterable[Compared], bar: tqdm) -> Iterator[Compared]:
    """The parts, each counted when the next one is asked for."""
    for part in parts:
        yield part
        bar.update(len(part.pairs))


def write_report(
    args: argparse.Namespace, pairs: Sequence[PromptPair], names: Sequence[str], folders: Sequence[Path],
    document: dict[str, Any],
) -> None:  # fmt: skip
    """The page, its plot and metrics.json, of a document that has all LoRAs."""
    document["region"] = REGIONS[args.region]
    document["prompts"] = [
        {"prompt": f"p{i:03d}", "base": pair.base_prompt, "target": pair.target_text, "full": pair.full_prompt}
        for i, pair in enumerate(pairs)
    ]
    document["seeds"] = list(range(args.seed, args.seed + args.num_seeds))
    settings = {name: value for name, value in vars(args).items() if name != "toy_prompts"}
    document["settings"] = {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()}
    for entry, folder in zip(document["loras"], folders, strict=True):
        entry["pictures"] = folder.relative_to(args.output_dir).as_posix()
    plot = response_plot(document)
    if plot is not None:
        plot.save(args.output_dir / "response.png")
    write_json(args.output_dir / NUMBERS, document)
    rows = (
        (entry["name"], picture_rows(args, pairs, names, folders[0], folder))
        for entry, folder in zip(document["loras"][1:], folders[1:], strict=True)
    )
    write_html(args.output_dir / PAGE, document, rows, plot)


# -------------------------------------------------------------------------------------------------------- command line


def toy_prompts(args: argparse.Namespace) -> list[PromptPair]:
    """Fresh prompts of the toy world, which no training set has."""
    drawn = base_prompts(TARGETS[args.toy], args.max_prompts or 12, args.seed)
    targets = [(p.replaced_phrase, p.target_prompt) if p.replaced_phrase else p.target_prompt for p in drawn]
    return list(dict.fromkeys(make_prompt_pair(p.base_prompt, [target]) for p, target in zip(drawn, targets)))


def evaluate(args: argparse.Namespace) -> None:
    """Run the program; a mistake in what it is given ends it with one line."""
    diffusers.utils.logging.disable_progress_bar()
    try:
        print(run(args))
    except (InputError, ValueError, OSError) as error:
        raise SystemExit(f"evaluate_spf_portrait.py: error: {' '.join(str(error).split())}") from error


def main(input_args: list[str] | None = None) -> None:
    evaluate(parse_args(input_args))


if __name__ == "__main__":
    evaluate(ARGS)
