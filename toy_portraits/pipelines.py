"""The embedded base models as pipelines that draw.

Source: [ours].
"""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline

from families.stable_diffusion import StableDiffusion
from families.stable_diffusion_xl import StableDiffusionXL
from programs.loading import load_pipeline
from toy_portraits.recipe import BASES


FAMILIES: dict[str, type[StableDiffusion]] = {"sd": StableDiffusion, "sdxl": StableDiffusionXL}


def load_base(base: str, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """One of `recipe.BASES`, with the sampler beside it, silent; without a target it draws as diffusers' own does.

    Raises InputError: it is not there, or of another family.
    """
    family = FAMILIES[base]
    pipeline = load_pipeline(family.pipeline_class, str(BASES[base].folder), dtype, **family.pipeline_options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
