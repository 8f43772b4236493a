"""Write a published model with random weights: `python benchmarks/random_stable_diffusion.py --output_dir FOLDER`.

Stable Diffusion 1.5, or SDXL with `--family sdxl`. Every module has the configuration of the published model, so that
time and memory of the training script are those of the real thing and nothing in it can be particular to the toy
world. A CLIP ViT-L/14 with random weights lies in the folder's `clip`. The tokenizers are the toy world's, with 77
tokens. Nothing it draws means anything.

Source: [ours].
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    ModelMixin,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from toy_portraits.recipe import BASE_MODEL


TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768}
TEXT["eos_token_id"] = 2  # as published: the end is then found as the highest id
# OpenCLIP's ViT-bigG/14, SDXL's second text encoder.
TEXT_2 = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32}
TEXT_2 |= {"projection_dim": 1280, "hidden_act": "gelu", "eos_token_id": 2}
VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
VISION |= {"patch_size": 14, "projection_dim": 768}
UNET_XL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),  # the number of heads
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,  # 1280 of the pooled prompt, and six numbers
}
# SD3.5-medium's.
TRANSFORMER_3 = {"sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24}
TRANSFORMER_3 |= {"num_attention_heads": 24, "attention_head_dim": 64, "caption_projection_dim": 1536}
TRANSFORMER_3 |= {"joint_attention_dim": 4096, "pooled_projection_dim": 2048, "pos_embed_max_size": 384}
TRANSFORMER_3 |= {"dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm"}
# The encoder of T5-XXL 1.1.
T5_XXL = {"d_model": 4096, "d_kv": 64, "num_heads": 64, "d_ff": 10240, "num_layers": 24, "vocab_size": 32128}
T5_XXL |= {"feed_forward_proj": "gated-gelu", "is_encoder_decoder": False, "use_cache": False}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def make_unet() -> UNet2DConditionModel:
    """860M parameters; the defaults of the class are those of Stable Diffusion 1 but for two."""
    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)


def make_vae(**others: int | float | bool) -> AutoencoderKL:
    """84M parameters, and 8 pixels a latent."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, **others,
    )  # fmt: skip


def make_pipeline(unet: UNet2DConditionModel, tokenizer: CLIPTokenizer | None = None) -> StableDiffusionPipeline:
    """The UNet with its VAE, and a text encoder of 123M parameters."""
    return StableDiffusionPipeline(
        vae=make_vae(sample_size=512), text_encoder=CLIPTextModel(CLIPTextConfig(**TEXT)), tokenizer=tokenizer,
        unet=unet, scheduler=PNDMScheduler(skip_prk_steps=True, **BETAS), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def make_xl_unet() -> UNet2DConditionModel:
    """2567M parameters."""
    return UNet2DConditionModel(**UNET_XL)


def make_xl_pipeline(
    unet: UNet2DConditionModel, tokenizer: CLIPTokenizer | None = None, tokenizer_2: CLIPTokenizer | None = None
) -> StableDiffusionXLPipeline:
    """The UNet with its VAE, and text encoders of 123M and 695M parameters."""
    with torch.device("cpu"):  # it moves its sigmas there, which has no meaning on the meta device
        scheduler = EulerDiscreteScheduler(timestep_spacing="leading", **BETAS)
    return StableDiffusionXLPipeline(
        vae=make_vae(sample_size=1024, scaling_factor=0.13025), text_encoder=CLIPTextModel(CLIPTextConfig(**TEXT)),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**TEXT_2)), tokenizer=tokenizer,
        tokenizer_2=tokenizer_2, unet=unet, scheduler=scheduler, force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )  # fmt: skip


def make_3_transformer() -> SD3Transformer2DModel:
    """2244M parameters."""
    return SD3Transformer2DModel(**TRANSFORMER_3)


def make_3_pipeline(transformer: SD3Transformer2DModel) -> StableDiffusion3Pipeline:
    """The transformer with its VAE of 16 channels, and text encoders of 124M, 695M and 4762M parameters."""
    with torch.device("cpu"):  # as of SDXL's
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    vae = make_vae(sample_size=1024, latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609,
                   use_quant_conv=False, use_post_quant_conv=False)  # fmt: skip
    return StableDiffusion3Pipeline(
        vae=vae, text_encoder=CLIPTextModelWithProjection(CLIPTextConfig(**TEXT)),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**TEXT_2)),
        text_encoder_3=T5EncoderModel(T5Config(**T5_XXL)), tokenizer=None, tokenizer_2=None, tokenizer_3=None,
        transformer=transformer, scheduler=scheduler,
    )  # fmt: skip


def make_clip() -> CLIPModel:
    return CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=768))


def load_tokenizer(**others: str) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(BASE_MODEL / "tokenizer", model_max_length=77, **others)


@contextmanager
def in_half() -> Iterator[None]:
    """Inside, modules are made in float16, so that none is ever there in float32."""
    torch.set_default_dtype(torch.float16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def write_clip(folder: Path, clip: CLIPModel) -> None:
    for part in (clip, load_tokenizer(), CLIPImageProcessorPil()):
        part.save_pretrained(folder / "clip")


def write_model(folder: Path) -> None:
    """Write the folder of a Stable Diffusion 1.5 in half precision, and CLIP beside it."""
    torch.manual_seed(0)
    make_pipeline(make_unet(), load_tokenizer()).to(dtype=torch.float16).save_pretrained(folder)
    write_clip(folder, make_clip().half())


def write_xl_model(folder: Path) -> None:
    """Write the folder of an SDXL likewise, made module by module: the largest is all that has to fit into memory."""
    torch.manual_seed(0)
    with torch.device("meta"):
        pipeline = make_xl_pipeline(make_xl_unet(), load_tokenizer(), load_tokenizer(pad_token="!"))
    pipeline.save_config(folder)
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            kind, config = type(part), part.config
            with in_half():
                part = kind.from_config(config) if isinstance(part, ModelMixin) else kind(config)
        if part is not None:
            part.save_pretrained(folder / name)
    with in_half():
        write_clip(folder, make_clip())


WRITERS = {"sd": write_model, "sdxl": write_xl_model}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=WRITERS, default="sd", help="Stable Diffusion 1.5, or SDXL.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder to write; about 3 GB, of SDXL 8 GB.")
    options = parser.parse_args()
    WRITERS[options.family](options.output_dir)
