"""The embedded base models as pipelines that draw.

Source: [ours].
"""

from __future__ import annotations

import torch

from families.find import find_base
from families.pipelines import DrawingPipeline, load_drawing_pipeline
from families.stable_diffusion import StableDiffusion
from toy_portraits.recipe import BASES


def family_of(base: str) -> type[StableDiffusion]:
    """The family of one of `recipe.BASES`, as its own files tell."""
    return find_base(str(BASES[base].folder), "base_model").family


def load_base(base: str, dtype: torch.dtype = torch.float32) -> DrawingPipeline:
    """One of `recipe.BASES`, with the sampler beside it, silent; without a target it draws as diffusers' own does.

    SDXL's pictures are decoded one after another.

    Raises InputError: it is not there.
    """
    pipeline = load_drawing_pipeline(str(BASES[base].folder), dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
