"""The pictures that a run draws of itself.

Source: [ours].
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from pictures import overlay_heat_map, picture_grid
from programs.console import phase_bar
from training.flags import OutputFlags
from training.inputs import Inputs
from training.models import Models


def draw_validation(
    models: Models, inputs: Inputs, flags: OutputFlags, seed: int, global_step: int, accelerator: Accelerator
) -> None:
    """Write one picture: rows are seeds; columns are the original model and the adapted one with the base prompt, the
    adapted one with the full prompt, and the SFCM over it.

    Args:
        models: what draws.
        inputs: hold the prompts and the size.
        flags: how many seeds, and how they are drawn; 0 draws nothing.
        seed: of the first row.
        global_step: whose picture it is.
        accelerator: the main process draws, in its precision.
    """
    if flags.num_validation_images == 0 or not accelerator.is_main_process:
        return
    pair, (height, width) = inputs.validation_pair, inputs.sizes[inputs.buckets[0]]
    shared = {
        "prompt": pair.base_prompt,
        "num_inference_steps": flags.validation_inference_steps,
        "guidance_scale": flags.validation_guidance_scale,
        "height": height,
        "width": width,
    }
    rows = []
    # accelerate's UNet answers in float32; autocast brings that to the dtype of the other models.
    with (
        phase_bar("validation pictures", flags.num_validation_images, "row") as bar,
        models.resident(),
        models.adapters.only("default"),
        accelerator.autocast(),
    ):
        for own in range(seed, seed + flags.num_validation_images):
            base = models.pipeline(**shared, compare=True, generator=torch.Generator().manual_seed(own))
            full = models.pipeline(
                **shared,
                target_prompt=list(pair.target_argument),
                base_phrases=list(pair.base_phrases),
                free_phrases=list(pair.free_phrases) or None,
                return_sfcm=True,
                generator=torch.Generator().manual_seed(own),
            )
            overlay = overlay_heat_map(full.images[0], full.sfcm[0, 0])
            rows.append([base.reference_images[0], base.images[0], full.images[0], overlay])
            bar.update()
    headers = ("original, base prompt", "adapted, base prompt", f"adapted, {pair.target_text}", "SFCM")
    _show(picture_grid(rows, headers), global_step, Path(flags.output_dir), accelerator)


def validation_path(global_step: int) -> str:
    """Where the picture of a step is, in --output_dir."""
    return f"validation/step_{global_step:06d}.png"


def _show(picture: Image.Image, global_step: int, output_dir: Path, accelerator: Accelerator) -> None:
    """Write the picture of a step, and give it to the trackers that show pictures."""
    path = output_dir / validation_path(global_step)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({"validation": np.asarray(picture)[None]}, step=global_step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({"validation": [picture]}, step=global_step)
