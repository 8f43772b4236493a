"""Is my LoRA clean? What a LoRA moves besides its target, measured against the original model's own portraits.

Draws the same prompts from the same seeds with the original model and with each LoRA, alone and with the target, and
writes a report: preservation, response, pollution, and which checkpoint of a run to keep. `--toy` shows it on the toy
world, where the truth is known.

Source: [ours].
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from checked_loading import InputError, choose_device, load_pipeline, naming
from evaluation_inputs import LoraSource, find_loras, picture_name, read_masks, read_prompts
from evaluation_models import Judges, frechet_distance, inception_distance, load_judges
from evaluation_summary import Judged, summarise
from lora_files import load_lora
from metrics import cosine, direction_similarity, label_agreement, nearer_to, only_inside, pixel_change
from pictures import overlay_heat_map
from pipeline_spf_portrait import SPFPortraitPipeline
from prompts import PromptPair, make_prompt_pair
from report import PictureRow, response_plot, write_csv, write_html, write_json, write_lines
from toy_portraits.judge import PortraitJudge, base_prompts, target_region
from toy_portraits.recipe import BASE_MODEL
from toy_portraits.world import TARGETS


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ORIGINAL = LoraSource("original model", Path(), "original")
REGIONS = {
    "sfcm": "The target's region is the mean SFCM of all LoRAs, so that none is judged by a map of its own making.",
    "masks": "The target's region is that of --region_masks.",
    "probe": "The target's region is where the probe reads its labels in the original or any LoRA's portrait.",
}


@dataclass(frozen=True)
class Portraits:
    """What a model drew, B = prompts times seeds: `base` and `full` (B, H, W, 3) uint8."""

    base: np.ndarray
    full: np.ndarray


# ------------------------------------------------------------------------------------------------------------- drawing


def draw(
    pipeline: SPFPortraitPipeline, pairs: Sequence[PromptPair], args: argparse.Namespace, with_map: bool
) -> tuple[Portraits, np.ndarray | None]:
    """Draw every prompt with every seed, with the base prompt alone and with the target.

    Args:
        pipeline: with a LoRA on it, or none.
        pairs: P prompts.
        args: seeds and sampler; the noise of a seed is the same for every model and prompt.
        with_map: whether to return the SFCMs.

    Returns:
        The portraits, all seeds of a prompt together, and (B, h, w) maps in [0, 1].
    """
    base, full, maps = [], [], []
    seeds = range(args.seed, args.seed + args.num_seeds)
    size = {} if args.resolution is None else {"height": args.resolution, "width": args.resolution}
    for pair in pairs:
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
            full.append(output.images)
            maps += [output.sfcm[:, 0].numpy()] if with_map else []
            base.append(call(prompt=pair.base_prompt).images)
    pictures = (np.rint(np.concatenate(parts) * 255).astype(np.uint8) for parts in (base, full))
    return Portraits(*pictures), np.concatenate(maps) if with_map else None


def file_names(args: argparse.Namespace, count: int) -> list[str]:
    """The names of all portraits' files, in the order in which they are drawn."""
    seeds = range(args.seed, args.seed + args.num_seeds)
    return [picture_name(prompt, seed) for prompt in range(count) for seed in seeds]


def picture_folder(args: argparse.Namespace, lora: LoraSource) -> Path:
    return args.output_dir / "pictures" / "".join(c if c.isalnum() or c in "-_." else "_" for c in lora.name)


def save_portraits(folder: Path, names: Sequence[str], portraits: Portraits) -> None:
    """As PNG, so that what is measured later is what was drawn; one LoRA's portraits at a time are in memory."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, pictures in (("base", portraits.base), ("full", portraits.full)):
        for name, picture in zip(names, pictures, strict=True):
            Image.fromarray(picture).save(folder / f"{name}-{kind}.png")


def open_portraits(folder: Path, names: Sequence[str]) -> Portraits:
    def read(kind: str) -> np.ndarray:
        return np.stack([np.asarray(Image.open(folder / f"{name}-{kind}.png")) for name in names])

    return Portraits(read("base"), read("full"))


def draw_all(
    pipeline: SPFPortraitPipeline, pairs: Sequence[PromptPair], loras: Sequence[LoraSource], args: argparse.Namespace
) -> list[np.ndarray]:
    """Draw with the original model and each LoRA, into the folder of pictures; the LoRAs' maps, (B, h, w) each."""
    names, maps = file_names(args, len(pairs)), []
    for lora in (ORIGINAL, *loras):
        print(f"drawing: {lora.name}", flush=True)
        if lora is ORIGINAL:
            portraits, _ = draw(pipeline, pairs, args, with_map=False)
        else:
            use_lora(pipeline, lora, args.lora_scale)
            portraits, own_maps = draw(pipeline, pairs, args, with_map=True)
            pipeline.unload_lora_weights()
            maps.append(own_maps)
        save_portraits(picture_folder(args, lora), names, portraits)
    return maps


def use_lora(pipeline: SPFPortraitPipeline, lora: LoraSource, scale: float) -> None:
    """Have this LoRA on the pipeline, which has none."""
    load_lora(pipeline, str(lora.path), "evaluated")
    pipeline.set_adapters("evaluated", scale)


# ----------------------------------------------------------------------------------------------------------- measuring


def find_region(
    original: Portraits, adapted: Iterable[Portraits], maps: Sequence[np.ndarray], args: argparse.Namespace,
    names: Sequence[str], probe: PortraitJudge | None,
) -> np.ndarray:  # fmt: skip
    """Where the target may change each portrait, the same for all LoRAs: (B, H, W) in [0, 1]."""
    size = original.base.shape[1:3]
    if args.region == "masks":
        return read_masks(args.region_masks, names, size)
    if args.region == "probe":
        before = probe.read(original.base).labels
        regions = [target_region(before, probe.read(own.full).labels, TARGETS[args.toy]) for own in adapted]
        return np.any(regions, axis=0).astype(np.float64)
    mean = torch.from_numpy(np.mean(maps, axis=0))[:, None].double()
    return F.interpolate(mean, size, mode="bilinear", align_corners=False)[:, 0].numpy()


def measure(
    original: Portraits, adapted: Portraits, region: np.ndarray, pairs: Sequence[PromptPair], judges: Judges,
    args: argparse.Namespace, probe: PortraitJudge | None,
) -> tuple[dict[str, np.ndarray], dict[str, float]]:  # fmt: skip
    """All measures of one model.

    Returns:
        Measures of each portrait, (B,), and those of the whole set.
    """
    before, after = original.base, adapted.full
    found = {
        "change": pixel_change(before, after),
        "change_outside": pixel_change(before, after, 1 - region),
        "base_change": pixel_change(before, adapted.base),
    }
    found |= {name: compare(before, after) for name, compare in judges.pairwise.items()}
    whole = {}
    if judges.clip is not None:
        found |= measure_with_clip(original, adapted, region, pairs, judges, args)
    if judges.dino is not None:
        embeds = judges.dino.images(before), judges.dino.images(after)
        found["dino"] = cosine(*embeds)
        if judges.torchmetrics:
            whole["fd_dino"] = frechet_distance(*embeds) if len(before) > 1 else float("nan")
    if judges.inception is not None:
        whole["fid"] = inception_distance(judges.inception, before, after) if len(before) > 1 else float("nan")
    if judges.segmenter is not None:
        found["seg_cons"] = label_agreement(judges.segmenter.labels(before), judges.segmenter.labels(after))
    if judges.face is not None:
        found["identity"] = cosine(judges.face.images(before), judges.face.images(after))
    if probe is not None:
        truth = probe.compare(before, after, TARGETS[args.toy])
        found |= {f"truth_{name}": truth[name] for name in ("kept", "change_outside", "response")}
        found["truth_leak"] = probe.response(adapted.base, TARGETS[args.toy])["response"]
    return found, whole


def measure_with_clip(
    original: Portraits, adapted: Portraits, region: np.ndarray, pairs: Sequence[PromptPair], judges: Judges,
    args: argparse.Namespace,
) -> dict[str, np.ndarray]:  # fmt: skip
    """CLIP's measures, (B,) each."""
    clip, before = judges.clip, judges.clip.images(original.base)
    after, inside = clip.images(adapted.full), clip.images(only_inside(original.base, adapted.full, region))
    targets, base, full = (
        np.repeat(clip.texts([getattr(pair, name) for pair in pairs]), args.num_seeds, axis=0)
        for name in ("target_text", "base_prompt", "full_prompt")
    )
    # A neutral text says nothing of the portrait, so neither does what is held against it.
    if args.neutral_prompt is None:
        asked, neutral = full, base
    else:
        asked, neutral = targets, np.repeat(clip.texts([args.neutral_prompt]), len(targets), axis=0)
    return {
        "clip_i": cosine(before, after),
        "clip_t": cosine(after, targets),
        "clip_t_inside": cosine(inside, targets),
        "direction": direction_similarity(before, inside, base, full),
        "leak": nearer_to(clip.images(adapted.base), asked, neutral),
    }


# ----------------------------------------------------------------------------------------------------------- writing


def picture_rows(
    args: argparse.Namespace, pairs: Sequence[PromptPair], original: Portraits, adapted: Portraits, maps: np.ndarray
) -> list[PictureRow]:
    """The first seeds of as many prompts as possible, --num_pictures rows."""
    order = sorted(range(len(maps)), key=lambda i: (i % args.num_seeds, i))[: args.num_pictures]
    rows = []
    for i in sorted(order):
        pair, seed = pairs[i // args.num_seeds], args.seed + i % args.num_seeds
        shown = [Image.fromarray(pictures[i]) for pictures in (original.base, adapted.base, adapted.full)]
        shown.append(overlay_heat_map(shown[-1], maps[i]))
        rows.append(PictureRow(f"{picture_name(i // args.num_seeds, seed)}: {pair.full_prompt}", shown))
    return rows


def run(args: argparse.Namespace) -> Path:
    """Draw, measure and write; everything that may be wrong with the input is found before the first portrait."""
    pairs, loras = toy_prompts(args) if args.toy_prompts else read_prompts(args), find_loras(args)
    device, names = choose_device(args.device), file_names(args, len(pairs))
    if args.region == "masks":
        read_masks(args.region_masks, names, (64, 64))
    with naming(f"--output_dir {args.output_dir}"):
        args.output_dir.mkdir(parents=True, exist_ok=True)
    flag = "pretrained_model_name_or_path"
    pipeline = load_pipeline(SPFPortraitPipeline, getattr(args, flag), DTYPES[args.dtype], flag)
    pipeline.to(device).set_progress_bar_config(disable=True)
    pipeline.safety_checker = None
    for lora in loras:
        use_lora(pipeline, lora, args.lora_scale)
        pipeline.unload_lora_weights()
    judges, probe = load_judges(args, device), PortraitJudge.from_pretrained() if args.toy else None

    maps = draw_all(pipeline, pairs, loras, args)
    original = open_portraits(picture_folder(args, ORIGINAL), names)
    adapted = (open_portraits(picture_folder(args, lora), names) for lora in loras)
    region = find_region(original, adapted, maps, args, names, probe)
    judged, lines, rows = [], [], {}
    for lora in (ORIGINAL, *loras):
        print(f"measuring: {lora.name}", flush=True)
        own = open_portraits(picture_folder(args, lora), names)
        found, found_whole = measure(original, own, region, pairs, judges, args, probe)
        values = {name: numbers.reshape(len(pairs), args.num_seeds) for name, numbers in found.items()}
        judged.append(Judged(lora.name, "" if lora is ORIGINAL else str(lora.path), lora.role, values, found_whole))
        lines += [{"lora": lora.name, "portrait": n, **{m: found[m][i] for m in found}} for i, n in enumerate(names)]
        if lora is not ORIGINAL:
            rows[lora.name] = picture_rows(args, pairs, original, own, maps[len(rows)])
    document = summarise(judged, judges.missing, args.num_resamples, args.seed)
    document["region"] = REGIONS[args.region]
    document["prompts"] = [
        {"prompt": f"p{i:03d}", "base": pair.base_prompt, "target": pair.target_text, "full": pair.full_prompt}
        for i, pair in enumerate(pairs)
    ]
    document["seeds"] = list(range(args.seed, args.seed + args.num_seeds))
    settings = {name: value for name, value in vars(args).items() if name != "toy_prompts"}
    document["settings"] = {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()}
    plot = response_plot(document)
    if plot is not None:
        plot.save(args.output_dir / "response.png")
    write_json(args.output_dir / "metrics.json", document)
    write_csv(args.output_dir / "metrics.csv", document)
    write_lines(args.output_dir / "portraits.csv", lines)
    write_html(args.output_dir / "report.html", document, rows, plot)
    print(document["verdict"])
    return args.output_dir / "report.html"


# -------------------------------------------------------------------------------------------------------- command line


def toy_prompts(args: argparse.Namespace) -> list[PromptPair]:
    """Fresh prompts of the toy world, which no training set has."""
    drawn = base_prompts(TARGETS[args.toy], args.max_prompts or 12, args.seed)
    targets = [(p.replaced_phrase, p.target_prompt) if p.replaced_phrase else p.target_prompt for p in drawn]
    return list(dict.fromkeys(make_prompt_pair(p.base_prompt, [target]) for p, target in zip(drawn, targets)))


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--pretrained_model_name_or_path", help="Stable Diffusion 1.x or 2.x: a folder or a Hub id.")
    add("--lora", action="append", help="A file, a folder, or a Hub id, diffusers' or kohya's; may be repeated.")
    add("--lora_scale", type=float, default=1.0, help="Strength of every LoRA.")
    add("--checkpoints", type=Path, help="Output folder of a training: its checkpoints and its final LoRA.")
    add("--reference_lora", help="The LoRA whose pollution counts as 1: a plain one of the same data and steps.")
    add("--base_prompts", action="extend", nargs="+", help="Prompts without the target; may be repeated.")
    add("--prompts_file", type=Path, help="JSON lines with base_prompt and target_prompt, as the training data has.")
    add("--target_prompt", nargs="+", help="The target, or several at once, of prompts that name none.")
    add("--max_prompts", type=int, help="Use the first so many prompts; all if not set.")
    add("--num_seeds", type=int, default=4, help="Portraits of each prompt.")
    add("--seed", type=int, default=0, help="The first seed of the noise, and the seed of the resampling.")
    add("--num_inference_steps", type=int, default=25, help="Denoising steps.")
    add("--guidance_scale", type=float, default=5.0, help="Guidance scale.")
    add("--resolution", type=int, help="Side of the portraits in pixels; the model's own if not set.")
    add("--batch_size", type=int, default=4, help="Portraits drawn at a time.")
    add("--region", choices=list(REGIONS), help="Where the target may change a portrait.")
    add("--region_masks", type=Path, help="Folder with a mask for each portrait, p000-s0.png and so on.")
    add("--neutral_prompt", help="Text that the leak is measured against; the base prompt if not set.")
    add("--clip_model_name_or_path", help="CLIP model that judges.")
    add("--dino_model_name_or_path", help="DINOv2 model that judges.")
    add("--segmenter_model_name_or_path", help="SegFormer for face parsing.")
    add("--face_model_name", help="insightface's model for faces, such as buffalo_l; non-commercial weights.")
    add("--num_resamples", type=int, default=1000, help="Resamples of the prompts for the intervals.")
    add("--num_pictures", type=int, default=6, help="Rows of pictures of each LoRA in the report.")
    add("--device", help="Such as cuda:1 or cpu; the best there is if not set.")
    add("--dtype", choices=list(DTYPES), default="float32", help="Of the weights that draw.")
    add("--toy", choices=list(TARGETS), help="Evaluate LoRAs of the toy world, with the truth beside the measures.")
    add("--output_dir", type=Path, required=True, help="Where report.html, the tables and the pictures go.")
    args = parser.parse_args(input_args)
    args.toy_prompts = args.toy is not None and not (args.base_prompts or args.prompts_file)
    if args.toy is not None:
        args.pretrained_model_name_or_path = args.pretrained_model_name_or_path or str(BASE_MODEL)
        args.clip_model_name_or_path = args.clip_model_name_or_path or str(BASE_MODEL / "clip")
        args.target_prompt = args.target_prompt or [TARGETS[args.toy].prompt]
    check_args(parser, args)
    if args.region is None:
        args.region = "masks" if args.region_masks else "probe" if args.toy else "sfcm"
    return args


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Flags that do not go together, or have no sense."""
    if args.pretrained_model_name_or_path is None:
        parser.error("--pretrained_model_name_or_path is missing; --toy has its own")
    if not (args.lora or args.checkpoints or args.reference_lora):
        parser.error("nothing to evaluate: give --lora, --checkpoints or --reference_lora")
    if args.base_prompts and args.prompts_file:
        parser.error("give --base_prompts or --prompts_file, not both")
    if not (args.base_prompts or args.prompts_file or args.toy):
        parser.error("no prompts: give --base_prompts or --prompts_file")
    if args.base_prompts and not args.target_prompt:
        parser.error("--base_prompts needs --target_prompt")
    if (args.region == "masks") != (args.region_masks is not None) and args.region is not None:
        parser.error("--region masks and --region_masks belong together")
    if args.region == "probe" and args.toy is None:
        parser.error("--region probe needs --toy")
    if args.toy is not None and args.resolution is not None:
        parser.error("--toy has portraits of 64 pixels: leave --resolution out")
    for name in ("num_seeds", "num_inference_steps", "batch_size", "num_resamples", "num_pictures", "max_prompts"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, not {value}")


def main(input_args: list[str] | None = None) -> None:
    args = parse_args(input_args)
    diffusers.utils.logging.disable_progress_bar()
    try:
        print(run(args))
    except (InputError, ValueError, OSError) as error:
        raise SystemExit(f"evaluate_spf_portrait.py: error: {' '.join(str(error).split())}") from error


if __name__ == "__main__":
    main()
