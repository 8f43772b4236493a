"""The main job on the embedded default: `python -m toy_portraits.demo`.

Trains a plain LoRA and an SPF LoRA on the same polluted portraits with the same number of steps, then draws the same
seeds with the original model and with both, and the SFCM of the second; a second picture shows what the first seed's
map is made of. The maps that guided the training are in `spf_lora/validation/alignment.png`.
Source: [ours].
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

from programs.console import import_libraries


if __name__ == "__main__":
    import_libraries()

import torch
from PIL import Image

from loras import LORA_WEIGHTS
from pictures import overlay_heat_map, picture_grid
from toy_portraits.pipelines import load_base
from toy_portraits.recipe import BASES, HERE, training_flags
from toy_portraits.world import TARGETS


BASE_PROMPTS = {
    "blonde_hair": "a woman, a green jacket, a purple background",
    "red_hat": "a man, black hair, a white jacket, an orange background",
    "striped_shirt": "a woman, ginger hair, a green jacket, a gray background",
}


def train(target: str, base: str, output_dir: Path, steps: tuple[int, int], seed: int) -> None:
    """Launch the training script as a user does, so many steps a stage; its own errors end this program too."""
    # Run again the demo starts anew, over what it left itself; the training script writes over no LoRA.
    (output_dir / LORA_WEIGHTS).unlink(missing_ok=True)
    shutil.rmtree(output_dir / "logs", ignore_errors=True)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", str(HERE.parent / "train_spf_portrait_lora.py")]
    command += training_flags(target, base) + ["--output_dir", str(output_dir), "--seed", str(seed)]
    # Nothing is left to go on from, for the same reason.
    command += ["--stage1_steps", str(steps[0]), "--stage2_steps", str(steps[1]), "--checkpointing_steps", "0"]
    subprocess.run(command, check=True)


def draw_rows(
    plain: Path, spf: Path, target: str, base: str, seeds: range
) -> tuple[list[list[Image.Image]], Image.Image]:
    """Per seed the original model's portrait, the same with each LoRA asked for the target, and the SFCM.

    The second result shows the first seed's map and all phrases.
    """
    pipeline = load_base(base)
    pipeline.load_lora_weights(plain, adapter_name="plain")
    pipeline.load_lora_weights(spf, adapter_name="spf")
    toy, prompt = TARGETS[target], BASE_PROMPTS[target]
    jacket = next(phrase for phrase in prompt.split(", ") if phrase.endswith("jacket"))
    goal = [(jacket, toy.prompt)] if toy.replaces else toy.prompt
    rows, maps = [], None
    for seed in seeds:
        options = {"target_prompt": goal, "num_inference_steps": 25, "guidance_scale": 5.0}
        pipeline.set_adapters("plain")
        polluted = pipeline(prompt, **options, generator=torch.Generator().manual_seed(seed)).images[0]
        pipeline.set_adapters("spf")
        clean = pipeline(
            prompt, **options, compare=True, return_sfcm=True, generator=torch.Generator().manual_seed(seed)
        )
        overlay = overlay_heat_map(clean.images[0], clean.sfcm[0, 0])
        rows.append([clean.reference_images[0], polluted, clean.images[0], overlay])
        maps = maps or pipeline.visualize(clean)
    return rows, maps


def main(input_args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=list(TARGETS), default="blonde_hair", help="Which attribute to teach.")
    about = "Which base model: " + ", ".join(f"{name}, a {base.title}" for name, base in BASES.items()) + "."
    parser.add_argument("--base", choices=list(BASES), default="sd", help=about)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"), help="Where LoRAs and picture go.")
    parser.add_argument("--stage1_steps", type=int, default=120)
    parser.add_argument("--stage2_steps", type=int, default=120)
    parser.add_argument("--num_images", type=int, default=5, help="Seeds, one a row of the picture.")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(input_args)

    start, plain, spf = time.time(), args.output_dir / "plain_lora", args.output_dir / "spf_lora"
    print(f"1/3 plain LoRA, {args.stage1_steps + args.stage2_steps} steps", flush=True)
    train(args.target, args.base, plain, (args.stage1_steps + args.stage2_steps, 0), args.seed)
    print(f"2/3 SPF, {args.stage1_steps} + {args.stage2_steps} steps", flush=True)
    train(args.target, args.base, spf, (args.stage1_steps, args.stage2_steps), args.seed)
    print("3/3 the pictures", flush=True)
    rows, maps = draw_rows(plain, spf, args.target, args.base, range(args.seed, args.seed + args.num_images))
    headers = ("original model", f"plain LoRA, {TARGETS[args.target].prompt}", "SPF, same steps", "SFCM")
    path = args.output_dir / f"{args.target}.png"
    picture_grid(rows, headers).save(path)
    maps.save(path.with_name(f"{args.target}_maps.png"))
    print(f"{path} ({time.time() - start:.0f} s; prompt {BASE_PROMPTS[args.target]!r})")


if __name__ == "__main__":
    main()
