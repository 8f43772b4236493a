"""The pipeline that draws with a base model, for programs that train nothing. [ours]"""

import torch
from diffusers import StableDiffusionPipeline

from pipeline_spf_portrait import SPFPortraitPipeline
from pipeline_spf_portrait_xl import SPFPortraitXLPipeline
from programs.loading import find_stock_pipeline, load_pipeline


DrawingPipeline = SPFPortraitPipeline | SPFPortraitXLPipeline


def load_drawing_pipeline(
    name: str, dtype: torch.dtype, flag: str = "base_model", base_config: str | None = None
) -> DrawingPipeline:
    """The pipeline of the family that a model's own files tell, on the CPU; `flag` named the model.

    Raises InputError: as of `load_pipeline`.
    """
    if issubclass(find_stock_pipeline(name, flag, base_config=base_config), StableDiffusionPipeline):
        return load_pipeline(SPFPortraitPipeline, name, dtype, flag, base_config=base_config)
    # A watermark would change pixels that are compared and measured.
    pipeline = load_pipeline(
        SPFPortraitXLPipeline, name, dtype, flag, base_config=base_config, add_watermarker=False
    )
    # Decoding pictures of this size together would take more memory than the steps before it.
    pipeline.vae.enable_slicing()
    return pipeline
