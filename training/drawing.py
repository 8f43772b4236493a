"""Portraits that a model draws for the training, as latents.

Legend: C channels, H/W size of latents.
Source: [ours].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch


if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


def draw_latents(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    num_inference_steps: int,
    guidance_scale: float,
    height: int,
    width: int,
    batch_size: int,
    advance: Callable[[int], object] = lambda count: None,
) -> torch.Tensor:
    """Draw one portrait per prompt and keep its latents; whether an adapter is active is the caller's choice.

    Args:
        pipeline: a Stable Diffusion pipeline.
        prompts: at least one.
        seeds: of each portrait's noise, drawn on the CPU, so that neither the batch size nor the device changes it.
        num_inference_steps: steps of the pipeline's scheduler.
        guidance_scale: scale of classifier-free guidance.
        height: in pixels.
        width: in pixels.
        batch_size: portraits drawn at once.
        advance: told how many were drawn, each time some are.

    Returns:
        (len(prompts), C, H, W) float32 on the CPU, scaled as the UNet takes them, without gradient.

    Source: [ours] the alignment source `generated`.
    """
    scale, latents = pipeline.vae_scale_factor, []
    shape = (pipeline.unet.config.in_channels, height // scale, width // scale)
    for start in range(0, len(prompts), batch_size):
        chunk = list(prompts[start : start + batch_size])
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[start : start + batch_size]]
        # In half precision some versions of torch draw other and much coarser noise.
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        output = pipeline(
            chunk,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            latents=noise.to(pipeline.unet.device, pipeline.unet.dtype),
            generator=generators,
            output_type="latent",
        )
        latents.append(output.images.float().cpu())
        advance(len(chunk))
    return torch.cat(latents)
