"""Take a LoRA elsewhere: into kohya's format and back, or fused into a checkpoint that needs no LoRA.

Source: [ours].
"""

import argparse
import sys
from pathlib import Path

from programs.console import BASE_CONFIG, DTYPES, FlagFormatter, import_libraries, in_home, path_in_home


PICKLES = (".ckpt", ".pt", ".pth", ".bin")


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=FlagFormatter)
    add = parser.add_argument
    about = "A .safetensors file in diffusers' or kohya's format, a folder with one, or user/name or an address of "
    add("--lora", action="append", required=True, help=about + "the Hub; several are given by repeating the flag.")
    about = "Strength of each --lora, in their order; 1 for all if not given."
    add("--scale", type=float, action="append", help=about)
    about = (
        "Stable Diffusion 1.x, 2.x, XL or 3 to fuse with: a folder, a Hub id, or one .safetensors file, which of 3 is "
        "the transformer."
    )
    add("--base_model", type=in_home, help=about)
    add("--base_config", type=in_home, help=BASE_CONFIG)
    about = "Base model with the LoRAs fused into it: a folder, or one .safetensors file (ComfyUI, A1111)."
    add("--output_merged", type=path_in_home, help=about)
    add("--output_kohya", type=path_in_home, help="File for the LoRA in kohya's format (ComfyUI, A1111).")
    add("--output_diffusers", type=path_in_home, help="Folder for the LoRA in diffusers' format.")
    add("--dtype", choices=DTYPES, default="float32", help="Of the checkpoint's weights.")
    add("--overwrite", action="store_true", help="Replace what is there.")
    args = parser.parse_args(input_args)
    merged, kohya, diffusers = outputs = args.output_merged, args.output_kohya, args.output_diffusers
    scales, loras = len(args.scale or ()), len(args.lora)
    for wrong, message in (
        (not any(outputs), "nothing to write: give --output_merged, --output_kohya or --output_diffusers"),
        (merged and args.base_model is None, "--output_merged needs the --base_model to fuse with"),
        (not merged and (args.base_model or scales), "--base_model and --scale are for --output_merged"),
        ((kohya or diffusers) and loras > 1, "--output_kohya and --output_diffusers take one --lora"),
        (kohya and diffusers, "a LoRA has one of the two formats already: give --output_kohya or --output_diffusers"),
        (scales not in (0, loras), f"{scales} --scale for {loras} --lora"),
        (args.base_config and not args.base_model, "--base_config is for a --base_model in one file"),
        (merged and merged.suffix in PICKLES, f"--output_merged {merged}: the name has to end in .safetensors"),
        (kohya and kohya.suffix != ".safetensors", f"--output_kohya {kohya}: the name has to end in .safetensors"),
    ):
        if wrong:
            parser.error(message)
    return args


if __name__ == "__main__":
    # Flags are read before the libraries are imported, which takes seconds: --help and a wrong flag answer at once.
    ARGS = parse_args()
    import_libraries()

import torch
from safetensors.torch import save_file

from families.find import find_base
from lora_layers import TEXT_ENCODERS
from loras import LORA_WEIGHTS
from loras.finding import find_lora
from loras.loading import merge_loras
from loras.reading import read_lora
from loras.writing import check_kohya, save_diffusers_lora, save_kohya_lora
from programs.loading import InputError, cast_models, load_pipeline, naming
from programs.original_layout import file_metadata, one_file
from programs.writing import sort_header, whole


def check_outputs(args: argparse.Namespace) -> None:
    """End here if an output is there already."""
    kohya, merged = args.output_kohya, args.output_merged
    is_file = merged is not None and merged.suffix == ".safetensors"
    for flag, file in (("output_kohya", kohya), ("output_merged", merged if is_file else None)):
        if file and file.is_dir():
            raise InputError(f"--{flag} {file}: is a folder")
    places = {"output_kohya": kohya}
    if args.output_diffusers:
        places["output_diffusers"] = args.output_diffusers / LORA_WEIGHTS
    if merged:
        is_checkpoint = (merged / "model_index.json").is_file()
        # --overwrite removes what is there, so that has to be a checkpoint.
        if not is_file and (merged.is_file() or (merged.is_dir() and any(merged.iterdir()) and not is_checkpoint)):
            raise InputError(f"--output_merged {merged}: is there already, and is no checkpoint to replace")
        places["output_merged"] = merged if is_file or is_checkpoint else None
    for flag, path in places.items():
        if path and path.exists() and not args.overwrite:
            raise InputError(f"--{flag}: {path} is there already; --overwrite replaces it")
    if merged:
        # A folder that cannot be made is known now, before the models are loaded.
        with naming(f"--output_merged {merged}"):
            merged.parent.mkdir(parents=True, exist_ok=True)


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
    with naming(f"--output_kohya: {path}"):
        check_kohya(lora)
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
    base, dtype = find_base(args.base_model, "base_model", base_config=args.base_config), getattr(torch, args.dtype)
    if base.family.denoiser != "unet" and args.output_merged.suffix == ".safetensors":
        raise InputError(f"--output_merged {args.output_merged}: a model with a transformer is written into a folder")
    # T5, the largest of all, is as it is to be written: no LoRA is on it.
    others = {name: dtype for name in base.family.text_encoders if name not in TEXT_ENCODERS}
    loaded = {"default": torch.float32, **others} if others else torch.float32
    pipeline = load_pipeline(base.family.stock_class, args.base_model, loaded, file=base.file)
    merge_loras(pipeline, args.lora, args.scale or [1.0] * len(args.lora))
    cast_models(pipeline, dtype)
    with whole(args.output_merged) as place:
        if args.output_merged.suffix == ".safetensors":
            save_file(one_file(pipeline), place, file_metadata(pipeline))
            sort_header(place)
        else:
            pipeline.save_pretrained(place)
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
