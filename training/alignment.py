"""The portraits that both paths are aligned on, with their maps, and what is written of them. [ours]

Legend: C channels, H/W latent size.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image

from pictures import overlay_heat_map, picture_grid
from training.arguments import Flags
from training.inputs import Inputs
from training.models import Models
from training.objectives.objective import Parts
from training.portraits import Portraits, draw_portraits


def prepare_alignment(flags: Flags, inputs: Inputs, parts: Parts, accelerator: Accelerator) -> Portraits:
    """The portraits both paths are aligned on, with their SFCMs where the mode averages over noise samples."""
    models, sources = parts.models, []
    if flags.alignment.alignment_source != "data":
        sources.append(draw_portraits(flags, inputs, models, parts.table, accelerator))
    if flags.alignment.alignment_source != "generated":
        sources.append(parts.training.as_alignment())
    portraits = Portraits(
        [latents for source in sources for latents in source.latents],
        torch.cat([source.pair_index for source in sources]),
        torch.cat([source.time_ids for source in sources]),
        tuple(bucket for source in sources for bucket in source.buckets),
    )
    if inputs.sfcm is not None:
        portraits.sfcm = [
            F.interpolate(sfcm[None].to(latents.device), latents.shape[-2:], mode="area")[0]
            for sfcm, latents in zip(inputs.sfcm, portraits.latents, strict=True)
        ]
    elif parts.maps.has_bank:
        together, shown = 2 * flags.loop.train_batch_size, accelerator.is_local_main_process
        portraits.sfcm = parts.maps.fill_bank(portraits, together, shown)
    if accelerator.is_main_process:
        output_dir, count = Path(flags.output.output_dir), flags.output.num_validation_images
        if count and portraits.sfcm is not None:
            draw_overview(models, portraits, count, output_dir / "validation" / "alignment.png")
        if flags.alignment.save_alignment:
            save_portraits(models, portraits, output_dir / "alignment")
    return portraits


@torch.no_grad()
def decode_portrait(models: Models, latents: torch.Tensor) -> Image.Image:
    """The portrait of latents (C, H, W)."""
    pixels = models.family.to_pixels(models.pipeline.vae, latents[None])
    return models.pipeline.image_processor.postprocess(pixels.float(), output_type="pil")[0]


def draw_overview(models: Models, portraits: Portraits, count: int, path: Path) -> None:
    """Write the first portraits and the SFCM over each, so that one sees what stage 2 will protect."""
    # A grid has pictures of one size: those of the first portrait's.
    chosen, rows = [i for i, bucket in enumerate(portraits.buckets) if bucket == portraits.buckets[0]], []
    with models.at_work("vae"):
        for i in chosen[:count]:
            portrait = decode_portrait(models, portraits.latents[i])
            rows.append([portrait, overlay_heat_map(portrait, portraits.sfcm[i][0].cpu())])
    path.parent.mkdir(parents=True, exist_ok=True)
    picture_grid(rows, ("alignment portrait", "SFCM")).save(path)


def save_portraits(models: Models, portraits: Portraits, folder: Path) -> None:
    """Write each portrait, and its map as --sfcm_dir reads it, if it has one."""
    (folder / "sfcm" if portraits.sfcm else folder).mkdir(parents=True, exist_ok=True)
    with models.at_work("vae"):
        for i, latents in enumerate(portraits.latents):
            portrait = decode_portrait(models, latents)
            portrait.save(folder / f"{i:05d}.png")
            if portraits.sfcm:
                grey = (portraits.sfcm[i][0].cpu() * 255).round().byte().numpy()
                sfcm = Image.fromarray(grey).resize(portrait.size, Image.Resampling.BILINEAR)
                sfcm.save(folder / "sfcm" / f"{i:05d}.png")
