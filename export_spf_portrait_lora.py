"""Take a LoRA elsewhere: into kohya's format and back, or fused into a checkpoint that needs no LoRA.

Source: [ours].
"""

import argparse
import sys
from pathlib import Path

from programs.console import DTYPES, FlagFormatter, import_libraries, in_home, path_in_home


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=FlagFormatter)
    parser.add_argument(
        "--lora",
        action="append",
        required=True,
        help="A .safetensors file in diffusers' or kohya's format, a folder with one, or user/name or an address of "
        "the Hub; several are given by repeating the flag.",
    )
    parser.add_argument(
        "--scale", type=float, action="append", help="Strength of each --lora, in their order; 1 for all if not given."
    )
    parser.add_argument(
        "--base_model", type=in_home, help="Stable Diffusion 1.x or 2.x to fuse with: a folder or a Hub id.",
    )  # fmt: skip
    parser.add_argument(
        "--output_merged", type=path_in_home, help="Folder for the base model with the LoRAs fused into it."
    )
    parser.add_argument(
        "--output_kohya", type=path_in_home, help="File for the LoRA in kohya's format (ComfyUI, A1111)."
    )
    parser.add_argument("--output_diffusers", type=path_in_home, help="Folder for the LoRA in diffusers' format.")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="Of the checkpoint's weights.")
    parser.add_argument("--overwrite", action="store_true", help="Replace what is there.")
    args = parser.parse_args(input_args)
    if not (args.output_merged or args.output_kohya or args.output_diffusers):
        parser.error("nothing to write: give --output_merged, --output_kohya or --output_diffusers")
    if args.output_merged and args.base_model is None:
        parser.error("--output_merged needs the --base_model to fuse with")
    if not args.output_merged and (args.base_model or args.scale):
        parser.error("--base_model and --scale are for --output_merged")
    if (args.output_kohya or args.output_diffusers) and len(args.lora) > 1:
        parser.error("--output_kohya and --output_diffusers take one --lora")
    if args.output_kohya and args.output_diffusers:
        parser.error("a LoRA has one of the two formats already: give --output_kohya or --output_diffusers")
    if args.scale and len(args.scale) != len(args.lora):
        parser.error(f"{len(args.scale)} --scale for {len(args.lora)} --lora")
    if args.output_kohya and args.output_kohya.suffix != ".safetensors":
        parser.error(f"--output_kohya {args.output_kohya}: the name has to end in .safetensors")
    return args


if __name__ == "__main__":
    # Flags are read before the libraries are imported, which takes seconds: --help and a wrong flag answer at once.
    ARGS = parse_args()
    import_libraries()

import torch
from diffusers import StableDiffusionPipeline

from loras import LORA_WEIGHTS
from loras.finding import find_lora
from loras.loading import merge_loras
from loras.reading import read_lora
from loras.writing import save_diffusers_lora, save_kohya_lora
from programs.loading import InputError, cast_models, load_pipeline, naming
from programs.writing import whole


def check_outputs(args: argparse.Namespace) -> None:
    """End here if an output is there already."""
    if args.output_kohya:
        if args.output_kohya.is_dir():
            raise InputError(f"--output_kohya {args.output_kohya}: is a folder")
        _check_free("output_kohya", args.output_kohya, args.overwrite)
    if args.output_diffusers:
        _check_free("output_diffusers", args.output_diffusers / LORA_WEIGHTS, args.overwrite)
    if args.output_merged:
        path = args.output_merged
        # A folder that cannot be made is known now, before the models are loaded.
        with naming(f"--output_merged {path}"):
            path.parent.mkdir(parents=True, exist_ok=True)
        is_checkpoint = (path / "model_index.json").is_file()
        # --overwrite removes what is there, so that has to be a checkpoint.
        if path.is_file() or (path.is_dir() and any(path.iterdir()) and not is_checkpoint):
            raise InputError(f"--output_merged {path}: is there already, and is no checkpoint to replace")
        if is_checkpoint:
            _check_free("output_merged", path, args.overwrite)


def _check_free(flag: str, path: Path, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise InputError(f"--{flag}: {path} is there already; --overwrite replaces it")


def convert(args: argparse.Namespace) -> Path:
    """Write the one LoRA in the format that it does not have, and return where."""
    with naming(args.lora[0]):
        path = find_lora(args.lora[0])
        lora = read_lora(path)
    if lora.note:
        _warn(f"{path} {lora.note}")
    wanted, flag = ("diffusers'", "output_diffusers") if args.output_diffusers else ("kohya's", "output_kohya")
    if lora.is_kohya == (flag == "output_kohya"):
        raise InputError(f"--{flag}: {path} is in {wanted} format already")
    if args.output_diffusers:
        return save_diffusers_lora(path, args.output_diffusers)
    if lora.is_dora:
        _warn(
            f"{path} is a DoRA; what reads kohya's format applies its magnitude in another way than it was trained, "
            "or ignores it; --output_merged is exact"
        )
    args.output_kohya.parent.mkdir(parents=True, exist_ok=True)
    save_kohya_lora(path, args.output_kohya)
    return args.output_kohya


def _warn(message: str) -> None:
    print(f"export_spf_portrait_lora.py: warning: {message}", file=sys.stderr)


def merge(args: argparse.Namespace) -> Path:
    """Write the base model with the LoRAs fused into its weights, which are summed in float32, and return where."""
    pipeline = load_pipeline(StableDiffusionPipeline, args.base_model, torch.float32)
    merge_loras(pipeline, args.lora, args.scale or [1.0] * len(args.lora))
    cast_models(pipeline, getattr(torch, args.dtype))
    with whole(args.output_merged) as folder:
        pipeline.save_pretrained(folder)
    return args.output_merged


def run_program(args: argparse.Namespace) -> None:
    try:
        check_outputs(args)
        if args.output_merged:
            print(merge(args))
        if args.output_kohya or args.output_diffusers:
            print(convert(args))
    except (OSError, ValueError) as error:
        raise SystemExit(f"export_spf_portrait_lora.py: error: {' '.join(str(error).split())}") from error


def main(input_args: list[str] | None = None) -> None:
    run_program(parse_args(input_args))


if __name__ == "__main__":
    run_program(ARGS)
