"""What a LoRA's page on the Hub says of the family of its base model. [ours]"""

from loras.card import HubNames


_TAGS = ("lora", "diffusers", "diffusers-training", "spf-portrait", "template:sd-lora")
STABLE_DIFFUSION = HubNames(
    pipeline="StableDiffusionPipeline",
    pipeline_file="pipeline_spf_portrait.py",
    tags=("text-to-image", "stable-diffusion", *_TAGS),
    licence="creativeml-openrail-m",
)
STABLE_DIFFUSION_XL = HubNames(
    pipeline="StableDiffusionXLPipeline",
    pipeline_file="pipeline_spf_portrait_xl.py",
    tags=("text-to-image", "stable-diffusion-xl", "stable-diffusion-xl-diffusers", *_TAGS),
    licence="openrail++",
)
