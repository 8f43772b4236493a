"""The pictures that a run draws of itself. Source: [ours]."""

from pathlib import Path

import numpy as np
import torch

from pictures import overlay_heat_map, picture_grid
from programs.console import phase_bar
from training.arguments import Flags
from training.engine import Engine
from training.inputs import Inputs
from training.models import Models


def draw_validation(flags: Flags, inputs: Inputs, models: Models, engine: Engine) -> None:
    """Write one picture on the main process, if any is asked for: rows are seeds; columns are the original model and
    the adapted one with the base prompt, the adapted one with the full prompt, and the SFCM over it.
    """
    output, accelerator, global_step = flags.output, engine.accelerator, engine.global_step
    if output.num_validation_images == 0 or not accelerator.is_main_process:
        return
    pair, (height, width) = inputs.validation_pair, inputs.sizes[inputs.buckets[0]]
    shared = {
        "prompt": pair.base_prompt, "num_inference_steps": output.validation_inference_steps,
        "guidance_scale": output.validation_guidance_scale, "height": height, "width": width,
    }  # fmt: skip
    rows = []
    # accelerate's denoiser answers in float32; autocast brings that to the dtype of the other models.
    with (
        phase_bar("validation pictures", output.num_validation_images, "row") as bar, models.drawing(),
        models.adapters.only("default"), accelerator.autocast(),
    ):  # fmt: skip
        for seed in range(flags.loop.seed, flags.loop.seed + output.num_validation_images):
            base = models.pipeline(**shared, compare=True, generator=torch.Generator().manual_seed(seed))
            full = models.pipeline(
                **shared, target_prompt=list(pair.target_argument), base_phrases=list(pair.base_phrases),
                free_phrases=list(pair.free_phrases) or None, return_sfcm=True,
                generator=torch.Generator().manual_seed(seed),
            )  # fmt: skip
            overlay = overlay_heat_map(full.images[0], full.sfcm[0, 0])
            rows.append([base.reference_images[0], base.images[0], full.images[0], overlay])
            bar.update()
    headers = ("original, base prompt", "adapted, base prompt", f"adapted, {pair.target_text}", "SFCM")
    picture, path = picture_grid(rows, headers), Path(output.output_dir) / validation_path(global_step)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({"validation": np.asarray(picture)[None]}, step=global_step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({"validation": [picture]}, step=global_step)


def validation_path(global_step: int) -> str:
    """Where the picture of a step is, in --output_dir."""
    return f"validation/step_{global_step:06d}.png"
