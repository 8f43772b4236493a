"""The main job on the embedded default: `python -m toy_portraits.demo`.

Trains a plain LoRA and an SPF LoRA on the same polluted portraits with the same number of steps, then draws the same
seeds with the original model and with both, and the SFCM that guided the training's composition.
Source: [ours].
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch
from PIL import Image

from pipeline_spf_portrait import SPFPortraitPipeline, overlay_heat_map
from toy_portraits.recipe import BASE_MODEL, HERE, training_flags
from toy_portraits.world import TARGETS
from train_spf_portrait_lora import picture_grid


BASE_PROMPTS = {
    "blonde_hair": "a woman, a green jacket, a purple background",
    "red_hat": "a man, black hair, a white jacket, an orange background",
    "striped_shirt": "a woman, ginger hair, a green jacket, a gray background",
}


def train(target: str, output_dir: Path, stage1_steps: int, stage2_steps: int, seed: int) -> None:
    """Launch the training script as a user does; its own errors end this program too."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", str(HERE.parent / "train_spf_portrait_lora.py")]
    command += training_flags(target) + ["--output_dir", str(output_dir), "--seed", str(seed)]
    command += ["--stage1_steps", str(stage1_steps), "--stage2_steps", str(stage2_steps)]
    subprocess.run(command, check=True)


def draw(lora: Path | None, target: str, seed: int) -> tuple[Image.Image, Image.Image]:
    """One portrait with the target (the base prompt alone without a LoRA), and the SFCM over it."""
    pipeline = SPFPortraitPipeline.from_pretrained(BASE_MODEL, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    toy, prompt = TARGETS[target], BASE_PROMPTS[target]
    options = {"num_inference_steps": 25, "guidance_scale": 5.0, "generator": torch.Generator().manual_seed(seed)}
    if lora is None:
        image = pipeline(prompt, **options).images[0]
        return image, image
    pipeline.load_lora_weights(lora)
    replaced = next((phrase for phrase in prompt.split(", ") if phrase.endswith("jacket")), None)
    goal = [(replaced, toy.prompt)] if toy.replaces else toy.prompt
    result = pipeline(prompt, target_prompt=goal, return_sfcm=True, **options)
    return result.images[0], overlay_heat_map(result.images[0], result.sfcm[0, 0])


def main(input_args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=list(TARGETS), default="blonde_hair", help="Which attribute to teach.")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"), help="Where LoRAs and picture go.")
    parser.add_argument("--stage1_steps", type=int, default=120)
    parser.add_argument("--stage2_steps", type=int, default=120)
    parser.add_argument("--num_images", type=int, default=5, help="Seeds, one a row of the picture.")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(input_args)

    start, plain, spf = time.time(), args.output_dir / "plain_lora", args.output_dir / "spf_lora"
    print(f"1/3 plain LoRA, {args.stage1_steps + args.stage2_steps} steps", flush=True)
    train(args.target, plain, args.stage1_steps + args.stage2_steps, 0, args.seed)
    print(f"2/3 SPF, {args.stage1_steps} + {args.stage2_steps} steps", flush=True)
    train(args.target, spf, args.stage1_steps, args.stage2_steps, args.seed)
    print("3/3 the picture", flush=True)
    rows = []
    for seed in range(args.seed, args.seed + args.num_images):
        original, _ = draw(None, args.target, seed)
        polluted, _ = draw(plain, args.target, seed)
        clean, overlay = draw(spf, args.target, seed)
        rows.append([original, polluted, clean, overlay])
    headers = ("original model", f"plain LoRA, {TARGETS[args.target].prompt}", "SPF, same steps", "SFCM")
    path = args.output_dir / f"{args.target}.png"
    picture_grid(rows, headers).save(path)
    print(f"{path} ({time.time() - start:.0f} s; prompt {BASE_PROMPTS[args.target]!r})")


if __name__ == "__main__":
    main()
