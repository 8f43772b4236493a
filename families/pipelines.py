"""The pipeline that draws with a base model, for programs that train nothing. [ours]"""

import torch
from diffusers import DiffusionPipeline, ModelMixin

from families.find import find_base
from pipeline_spf_portrait import SPFPortraitPipeline
from pipeline_spf_portrait_3 import SPFPortrait3Pipeline
from pipeline_spf_portrait_xl import SPFPortraitXLPipeline
from programs.loading import load_pipeline


DrawingPipeline = SPFPortraitPipeline | SPFPortraitXLPipeline | SPFPortrait3Pipeline


def denoiser_of(pipeline: DiffusionPipeline) -> ModelMixin:
    """The UNet or the transformer of a pipeline of any known family, diffusers' own or one of this project."""
    return getattr(pipeline, "transformer", None) or pipeline.unet


def load_drawing_pipeline(
    name: str, dtype: torch.dtype, flag: str = "base_model", base_config: str | None = None
) -> DrawingPipeline:
    """The pipeline of the family that a model's own files tell, on the CPU; `flag` named the model.

    Raises InputError: as of `find_base` and `load_pipeline`.
    """
    base = find_base(name, flag, base_config=base_config)
    family = base.family
    pipeline = load_pipeline(family.pipeline_class, name, dtype, flag, file=base.file, **family.drawing_options)
    if family.sliced_vae:
        pipeline.vae.enable_slicing()
    return pipeline
