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
STABLE_DIFFUSION_3 = HubNames(
    pipeline="StableDiffusion3Pipeline",
    pipeline_file="pipeline_spf_portrait_3.py",
    tags=("text-to-image", "sd3", "sd3-diffusers", *_TAGS),
    dtype="bfloat16",  # what its publisher draws 3.5 in
    licence="stabilityai-ai-community",
    licence_link="https://huggingface.co/stabilityai/stable-diffusion-3.5-medium/blob/main/LICENSE.md",
    transformer="SD3Transformer2DModel",
)
