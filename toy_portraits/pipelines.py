"""The embedded base models as pipelines that draw.

Source: [ours].
"""

from __future__ import annotations

import torch

from families import hub_names
from pipeline_spf_portrait import SPFPortraitPipeline
from pipeline_spf_portrait_xl import SPFPortraitXLPipeline
from programs.loading import load_pipeline
from toy_portraits.recipe import BASES


PIPELINES = {"sd": SPFPortraitPipeline, "sdxl": SPFPortraitXLPipeline}
HUB_NAMES = {"sd": hub_names.STABLE_DIFFUSION, "sdxl": hub_names.STABLE_DIFFUSION_XL}


def load_base(base: str, dtype: torch.dtype = torch.float32) -> SPFPortraitPipeline | SPFPortraitXLPipeline:
    """One of `recipe.BASES`, with the sampler beside it, silent; without a target it draws as diffusers' own does.

    Raises InputError: it is not there, or of another family.
    """
    pipeline = load_pipeline(PIPELINES[base], str(BASES[base].folder), dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
