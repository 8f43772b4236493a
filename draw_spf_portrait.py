"""Draw a portrait with a LoRA: the original model's, with the LoRA, where it may act, and kept to there.

All of one seed, with the settings in each picture's metadata. Source: [ours].
"""

import argparse
from pathlib import Path

from programs.console import BASE_CONFIG, DTYPES, FlagFormatter, import_libraries, in_home, path_in_home


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=FlagFormatter)
    add = parser.add_argument
    about = "Stable Diffusion 1.x, 2.x, XL, 3 or 3.5: a folder, a Hub id, or a .safetensors file."
    add("--base", type=in_home, required=True, help=about)
    add("--base_config", type=in_home, help=BASE_CONFIG)
    about = "A .safetensors file in diffusers' or kohya's format, a folder with one, or user/name or an address of "
    add("--lora", required=True, help=about + "the Hub.")
    add("--lora_scale", type=float, default=1.0, help="Strength of the LoRA.")
    add("--prompt", required=True, help="The base prompt, without the target.")
    add("--target", required=True, help="What the LoRA is for; it is added to the prompt.")
    add("--replaces", help="A phrase of the prompt in whose place the target stands, instead of being added.")
    add("--negative_prompt", help="The negative prompt.")
    add("--guidance", type=float, default=1.0, help="How far the LoRA is kept to its region, from 0 to 1.")
    add("--guidance_exponent", type=float, default=2.0, help="Larger draws the region tighter.")
    about = "Leave the LoRA out of the negative branch; best for LoRAs of other trainers, with a --lora_scale of 0.75."
    add("--no_lora_in_negative", action="store_true", help=about)
    add("--guidance_scale", type=float, default=7.5, help="Scale of classifier-free guidance.")
    add("--num_inference_steps", type=int, default=30, help="Steps of drawing.")
    add("--height", type=int, help="Of the pictures; the model's own if not set.")
    add("--width", type=int, help="Of the pictures; the model's own if not set.")
    add("--seed", type=int, default=0, help="Of the first picture's noise; each next picture has the next seed.")
    add("--num_images", type=int, default=1, help="How many seeds to draw.")
    add("--output_dir", type=path_in_home, default=Path("runs/drawn"), help="Folder for the pictures.")
    add("--overwrite", action="store_true", help="Replace pictures of the same names.")
    add("--device", help="Such as cuda:1 or cpu; the best there is if not set.")
    add("--dtype", choices=DTYPES, help="float16 on CUDA and float32 elsewhere if not set.")
    args = parser.parse_args(input_args)
    for wrong, message in (
        (not 0 <= args.guidance <= 1, f"--guidance {args.guidance:g}: must be from 0 to 1"),
        (not args.guidance_exponent > 0, f"--guidance_exponent {args.guidance_exponent:g}: must be positive"),
        (args.num_inference_steps < 1, f"--num_inference_steps {args.num_inference_steps}: must be at least 1"),
        (args.num_images < 1, f"--num_images {args.num_images}: must be at least 1"),
        (not args.prompt.strip(), "--prompt is empty"),
        (not args.target.strip(), "--target is empty"),
    ):
        if wrong:
            parser.error(message)
    return args


if __name__ == "__main__":
    # Flags are read before the libraries are imported, which takes seconds: --help and a wrong flag answer at once.
    ARGS = parse_args()
    import_libraries()

import json
from collections.abc import Iterator, Mapping

import diffusers
import torch
from diffusers.utils import BaseOutput
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from families.pipelines import DrawingPipeline, load_drawing_pipeline
from loras.finding import find_lora
from loras.loading import load_lora
from programs.loading import InputError, choose_device, naming, without_false_alarms
from programs.writing import whole
from prompts import make_prompt_pair


KINDS = ("original", "adapted", "map", "guided")  # the last only with guidance


def picture_paths(args: argparse.Namespace, seed: int) -> dict[str, Path]:
    """The files of a seed, by kind. Raises InputError: one is there already."""
    kinds = KINDS if args.guidance > 0 else KINDS[:-1]
    paths = {kind: args.output_dir / f"{seed:05d}-{kind}.png" for kind in kinds}
    for path in paths.values():
        if path.exists() and not args.overwrite:
            raise InputError(f"--output_dir: {path} is there already; --overwrite replaces it")
    return paths


def target_of(args: argparse.Namespace) -> str | list[tuple[str, str]]:
    """The target as the pipelines take it."""
    return [(args.replaces, args.target)] if args.replaces else args.target


def draw(pipeline: DrawingPipeline, args: argparse.Namespace, seed: int) -> dict[str, Image.Image]:
    """The pictures of a seed, by kind: all from the same noise, which is drawn on the CPU."""

    def call(guidance: float, compare: bool) -> BaseOutput:
        return pipeline(
            args.prompt, target_prompt=target_of(args), negative_prompt=args.negative_prompt,
            guidance_scale=args.guidance_scale, height=args.height, width=args.width,
            num_inference_steps=args.num_inference_steps, compare=compare, return_sfcm=compare, sfcm_guidance=guidance,
            sfcm_guidance_exponent=args.guidance_exponent, adapter_in_unconditional=not args.no_lora_in_negative,
            generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip

    found = call(0.0, compare=True)
    size = found.images[0].size
    region = Image.fromarray((found.sfcm[0, 0] * 255).round().byte().numpy()).resize(size, Image.Resampling.BILINEAR)
    pictures = dict(zip(KINDS, (found.reference_images[0], found.images[0], region)))
    return pictures if args.guidance == 0 else pictures | {"guided": call(args.guidance, compare=False).images[0]}


def settings_of(args: argparse.Namespace, kind: str, seed: int) -> dict[str, object]:
    """What a picture was drawn with, without the folders of this machine, for pictures are shared."""
    of_others = ("output_dir", "overwrite", "num_images", "device")
    flags = {name: value for name, value in vars(args).items() if name not in of_others}
    places = {name: flags[name] for name in ("base", "base_config", "lora") if flags[name]}
    names = {name: Path(place).name for name, place in places.items() if Path(place).exists()}
    return {"picture": kind, **flags, **names, "seed": seed}


def save(pictures: Mapping[str, Image.Image], paths: Mapping[str, Path], args: argparse.Namespace, seed: int) -> None:
    for kind, picture in pictures.items():
        info = PngInfo()
        info.add_itxt("parameters", json.dumps(settings_of(args, kind, seed), ensure_ascii=False))
        with whole(paths[kind]) as path:
            picture.save(path, format="PNG", pnginfo=info)


def run(args: argparse.Namespace) -> Iterator[Path]:
    """Gives each file when it is written."""
    # What may be wrong with prompts and files is found before the model is loaded.
    make_prompt_pair(args.prompt, target_of(args))
    with naming(args.lora):
        lora = find_lora(args.lora)
    seeds = range(args.seed, args.seed + args.num_images)
    paths = {seed: picture_paths(args, seed) for seed in seeds}
    device = choose_device(args.device)
    args.dtype = args.dtype or ("float16" if device.startswith("cuda") else "float32")
    pipeline = load_drawing_pipeline(args.base, getattr(torch, args.dtype), "base", args.base_config)
    load_lora(pipeline, args.lora, "lora", lora)
    pipeline.set_adapters("lora", args.lora_scale)
    pipeline.to(device)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        save(draw(pipeline, args, seed), paths[seed], args, seed)
        yield from paths[seed].values()


def main(args: argparse.Namespace) -> None:
    diffusers.utils.logging.disable_progress_bar()
    try:
        with without_false_alarms():
            for path in run(args):
                print(path, flush=True)
    except (ValueError, OSError) as error:
        raise SystemExit(f"draw_spf_portrait.py: error: {' '.join(str(error).split())}") from error


if __name__ == "__main__":
    main(ARGS)
