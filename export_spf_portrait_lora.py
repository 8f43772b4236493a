"""Take a LoRA elsewhere: into kohya's format and back, or fused into a checkpoint that needs no LoRA.

Source: [ours].
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE

from checked_loading import InputError, load_pipeline, naming
from lora_files import find_lora, is_dora, is_kohya, merge_loras, read_lora, save_diffusers_lora, save_kohya_lora


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--lora",
        action="append",
        required=True,
        help="A .safetensors file in diffusers' or kohya's format, a folder with one, or user/name of the Hub; "
        "several are given by repeating the flag.",
    )
    parser.add_argument(
        "--scale", type=float, action="append", help="Strength of each --lora, in their order; 1 for all if not given."
    )
    parser.add_argument("--base_model", help="Stable Diffusion 1.x or 2.x to fuse with: a folder or a Hub id.")
    parser.add_argument("--output_merged", type=Path, help="Folder for the base model with the LoRAs fused into it.")
    parser.add_argument("--output_kohya", type=Path, help="File for the LoRA in kohya's format (ComfyUI, A1111).")
    parser.add_argument("--output_diffusers", type=Path, help="Folder for the LoRA in diffusers' format.")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="Of the checkpoint's weights.")
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


def check_outputs(args: argparse.Namespace) -> None:
    """End here if an output is there already."""
    if args.output_kohya:
        if args.output_kohya.is_dir():
            raise InputError(f"--output_kohya {args.output_kohya}: is a folder")
        _check_free("output_kohya", args.output_kohya, args.overwrite)
    if args.output_diffusers:
        _check_free("output_diffusers", args.output_diffusers / LORA_WEIGHT_NAME_SAFE, args.overwrite)
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
        layers = read_lora(path)
    wanted, flag = ("diffusers'", "output_diffusers") if args.output_diffusers else ("kohya's", "output_kohya")
    if is_kohya(path) == (flag == "output_kohya"):
        raise InputError(f"--{flag}: {path} is in {wanted} format already")
    if args.output_diffusers:
        return save_diffusers_lora(path, args.output_diffusers)
    if is_dora(layers):
        print(
            f"export_spf_portrait_lora.py: warning: {path} is a DoRA; what reads kohya's format applies its magnitude "
            "in another way than it was trained, or ignores it; --output_merged is exact",
            file=sys.stderr,
        )
    args.output_kohya.parent.mkdir(parents=True, exist_ok=True)
    save_kohya_lora(path, args.output_kohya)
    return args.output_kohya


def merge(
    base_model: str, loras: Sequence[str], scales: Sequence[float], dtype: torch.dtype
) -> StableDiffusionPipeline:
    """Fuse LoRAs into the weights of a base model.

    Args:
        base_model: a folder or an id of the Hub.
        loras: as of `find_lora`.
        scales: their strengths, any real number.
        dtype: of the weights that come out; they are summed in float32.

    Returns:
        The stock pipeline without any adapter, on the CPU.

    Raises:
        ValueError: something cannot be loaded or does not fit.

    Source: [ours].
    """
    pipeline = load_pipeline(StableDiffusionPipeline, base_model, torch.float32)
    merge_loras(pipeline, loras, scales)
    for model in pipeline.components.values():
        if isinstance(model, torch.nn.Module):
            model.to(dtype)
    return pipeline


def save_merged(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Write a checkpoint whole or not at all, in the place of one that is there."""
    # In a folder beside it, so that the last step is a rename on one file system.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".saving-") as temporary:
        whole, former = Path(temporary) / "whole", Path(temporary) / "former"
        pipeline.save_pretrained(whole)
        if folder.exists():
            folder.rename(former)
        whole.rename(folder)


def main(input_args: list[str] | None = None) -> None:
    args = parse_args(input_args)
    try:
        check_outputs(args)
        if args.output_merged:
            scales = args.scale or [1.0] * len(args.lora)
            save_merged(merge(args.base_model, args.lora, scales, DTYPES[args.dtype]), args.output_merged)
            print(args.output_merged)
        if args.output_kohya or args.output_diffusers:
            print(convert(args))
    except (OSError, ValueError) as error:
        raise SystemExit(f"export_spf_portrait_lora.py: error: {' '.join(str(error).split())}") from error


if __name__ == "__main__":
    main()
