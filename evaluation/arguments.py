"""The evaluation's flags, read before any library that takes seconds to import. Source: [ours]."""

import argparse
import math
from collections.abc import Sequence

from evaluation.measures import DEFAULT_MODELS
from programs.console import BASE_CONFIG, DTYPES, FlagFormatter, in_home, path_in_home
from toy_portraits.recipe import BASE_MODEL
from toy_portraits.world import TARGETS


REGIONS = {
    "sfcm": "The target's region is the mean SFCM of all LoRAs, so that none is judged by a map of its own making.",
    "masks": "The target's region is that of --region_masks.",
    "probe": "The target's region is where the probe reads its labels in the original or any LoRA's portrait.",
}


def parse_args(input_args: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the flags, those of the command line if None.

    With `--toy` they are the toy world's own where they are left out, and `toy_prompts` says whether the prompts are.
    """
    about = "Is my LoRA clean? What it moves besides its target, against the original model's own portraits."
    parser = argparse.ArgumentParser("evaluate_spf_portrait.py", description=about, formatter_class=FlagFormatter)
    add = parser.add_argument
    about = "Stable Diffusion 1.x, 2.x, XL, 3 or 3.5: a folder, a Hub id, or a .safetensors file."
    add("--pretrained_model_name_or_path", type=in_home, help=about)
    add("--base_config", type=in_home, help=BASE_CONFIG)
    about = "A file, a folder, or a Hub id, diffusers' or kohya's; may be repeated."
    add("--lora", type=in_home, action="append", help=about)
    add("--lora_scale", type=float, default=1.0, help="Strength of every LoRA.")
    add("--checkpoints", type=path_in_home, help="Output folder of a training: its checkpoints and its final LoRA.")
    about = "The LoRA whose pollution counts as 1: a plain one of the same data and steps."
    add("--reference_lora", type=in_home, help=about)
    add("--base_prompts", action="extend", nargs="+", help="Prompts without the target; may be repeated.")
    about = "JSON lines with base_prompt and target_prompt, as the training data has."
    add("--prompts_file", type=path_in_home, help=about)
    add("--target_prompt", nargs="+", help="The target, or several at once, of prompts that name none.")
    add("--max_prompts", type=int, help="Use the first so many prompts; all, or 12 of the toy world's, if not set.")
    add("--num_seeds", type=int, default=4, help="Portraits of each prompt.")
    add("--seed", type=int, default=0, help="The first seed of the noise, and the seed of the resampling.")
    add("--num_inference_steps", type=int, default=25, help="Denoising steps.")
    add("--guidance_scale", type=float, default=5.0, help="Guidance scale.")
    add("--resolution", type=int, help="Side of the portraits in pixels; the model's own if not set.")
    add("--batch_size", type=int, default=4, help="Portraits drawn at a time.")
    about = "Where the target may change a portrait; masks that are given, the probe with --toy, else the SFCM."
    add("--region", choices=list(REGIONS), help=about)
    add("--region_masks", type=path_in_home, help="Folder with a mask for each portrait, p000-s0.png and so on.")
    add("--neutral_prompt", help="Text that the leak is measured against; the base prompt if not set.")
    for kind, about in (("clip", "CLIP"), ("dino", "DINOv2"), ("segmenter", "SegFormer for face parsing")):
        default = DEFAULT_MODELS[kind] + (", or the toy world's," if kind == "clip" else "")
        add(f"--{kind}_model_name_or_path", type=in_home, help=f"{about}; {default} if not set.")
    add("--face_model_name", help="insightface's model for faces, such as buffalo_l; non-commercial weights.")
    add("--num_resamples", type=int, default=1000, help="Resamples of the prompts for the intervals.")
    add("--num_pictures", type=int, default=6, help="Rows of pictures of each LoRA in the report.")
    add("--device", help="Such as cuda:1 or cpu; the best there is if not set.")
    add("--dtype", choices=DTYPES, default="float32", help="Of the weights that draw.")
    add("--toy", choices=list(TARGETS), help="Evaluate LoRAs of the toy world, with the truth beside the measures.")
    add("--output_dir", type=path_in_home, required=True, help="Where report.html, the tables and the pictures go.")
    args = parser.parse_args(input_args)
    args.toy_prompts = args.toy is not None and not (args.base_prompts or args.prompts_file)
    if args.toy is not None:
        args.pretrained_model_name_or_path = args.pretrained_model_name_or_path or str(BASE_MODEL)
        args.clip_model_name_or_path = args.clip_model_name_or_path or str(BASE_MODEL / "clip")
        args.target_prompt = args.target_prompt or [TARGETS[args.toy].prompt]
    _check(parser, args)
    if args.region is None:
        args.region = "masks" if args.region_masks else "probe" if args.toy else "sfcm"
    return args


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Flags that do not go together, or have no sense."""
    loras = args.lora or args.checkpoints or args.reference_lora
    prompts, masks = args.base_prompts or args.prompts_file, args.region_masks is not None
    for wrong, message in (
        (args.pretrained_model_name_or_path is None, "--pretrained_model_name_or_path is missing; --toy has its own"),
        (not loras, "nothing to evaluate: give --lora, --checkpoints or --reference_lora"),
        (args.base_prompts and args.prompts_file, "give --base_prompts or --prompts_file, not both"),
        (not (prompts or args.toy), "no prompts: give --base_prompts or --prompts_file"),
        (args.base_prompts and not args.target_prompt, "--base_prompts needs --target_prompt"),
        (args.region and (args.region == "masks") != masks, "--region masks and --region_masks belong together"),
        (args.region == "probe" and args.toy is None, "--region probe needs --toy"),
        (args.toy and args.resolution is not None, "--toy has portraits of 64 pixels: leave --resolution out"),
        (args.seed < 0, f"--seed must be at least 0, not {args.seed}"),
    ):
        if wrong:
            parser.error(message)
    counts = ("num_seeds", "num_inference_steps", "batch_size", "num_resamples", "num_pictures", "max_prompts")
    for name in (*counts, "resolution"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, not {value}")
    if args.resolution is not None and args.resolution % 8:  # as every stock pipeline asks for
        parser.error(f"--resolution must be a multiple of 8, not {args.resolution}")
    for name in ("lora_scale", "guidance_scale"):
        if not math.isfinite(getattr(args, name)):
            parser.error(f"--{name} must be a finite number, not {getattr(args, name)}")
