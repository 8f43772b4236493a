"""A toy SDXL whose UNet and second text encoder are random, of the embedded one's classes, and random LoRAs."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from toy_portraits.pipelines import family_of
from toy_portraits.recipe import BASE_MODEL, BASES


def write_toy_xl(folder: Path) -> Path:
    """Write the folder; what is not random is the other base's."""
    torch.manual_seed(0)
    tokenizer_2 = CLIPTokenizer.from_pretrained(BASE_MODEL / "tokenizer", pad_token="!")
    config = CLIPTextConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, projection_dim=64,
        vocab_size=len(tokenizer_2), max_position_embeddings=tokenizer_2.model_max_length, initializer_factor=3.0,
        bos_token_id=tokenizer_2.bos_token_id, eos_token_id=tokenizer_2.eos_token_id,
        pad_token_id=tokenizer_2.pad_token_id,
    )  # fmt: skip
    text_encoder = CLIPTextModel.from_pretrained(BASE_MODEL / "text_encoder")
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(16, 16), layers_per_block=1, attention_head_dim=(2, 2), norm_num_groups=4,
        cross_attention_dim=text_encoder.config.hidden_size + 64, transformer_layers_per_block=(1, 2),
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=64 + 6 * 4,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
    )  # fmt: skip
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )
    StableDiffusionXLPipeline(
        unet=unet, vae=AutoencoderKL.from_pretrained(BASE_MODEL / "vae"), text_encoder=text_encoder,
        text_encoder_2=CLIPTextModelWithProjection(config), scheduler=scheduler, add_watermarker=False,
        tokenizer=CLIPTokenizer.from_pretrained(BASE_MODEL / "tokenizer"), tokenizer_2=tokenizer_2,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def write_random_lora(folder: Path, seed: int = 0, base: str = "sd") -> Path:
    """Write a random LoRA on a base's UNet, strong enough to be seen."""
    unet = UNet2DConditionModel.from_pretrained(BASES[base].folder / "unet")
    torch.manual_seed(seed)
    modules = ["attn2.to_v", "attn2.to_out.0"]
    unet.add_adapter(LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=modules))
    family_of(base).pipeline_class.save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(unet),
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
    )
    return folder
