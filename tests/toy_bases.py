"""Toy bases that are random but for what they share with the first, of the real classes, and random LoRAs."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

from loras.writing import write_diffusers_lora
from toy_portraits.build_3 import build_t5_tokenizer
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


def write_toy_3(folder: Path) -> Path:
    """Write the folder of a toy Stable Diffusion 3 likewise."""
    torch.manual_seed(0)
    tokenizers = [CLIPTokenizer.from_pretrained(BASE_MODEL / "tokenizer") for _ in range(2)]
    tokenizers.append(build_t5_tokenizer())
    clips = []
    for tokenizer, width in zip(tokenizers[:2], (32, 16)):
        config = CLIPTextConfig(
            hidden_size=width, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, projection_dim=width,
            vocab_size=len(tokenizer), max_position_embeddings=tokenizer.model_max_length, initializer_factor=3.0,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        clips.append(CLIPTextModelWithProjection(config))
    config = T5Config(
        vocab_size=len(tokenizers[2]), d_model=48, d_kv=8, num_heads=2, d_ff=32, num_layers=1, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    vae = AutoencoderKL.from_pretrained(BASE_MODEL / "vae")
    vae.register_to_config(shift_factor=0.1)
    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=3, num_attention_heads=2,
        attention_head_dim=8, caption_projection_dim=16, joint_attention_dim=48, pooled_projection_dim=32 + 16,
        pos_embed_max_size=12, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    StableDiffusion3Pipeline(
        transformer=transformer, vae=vae, text_encoder=clips[0], text_encoder_2=clips[1],
        text_encoder_3=T5EncoderModel(config), tokenizer=tokenizers[0], tokenizer_2=tokenizers[1],
        tokenizer_3=tokenizers[2], scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def write_random_lora(folder: Path, seed: int = 0, base: str = "sd") -> Path:
    """Write a random LoRA on a base's denoiser, strong enough to be seen."""
    family = family_of(base)
    denoiser = family.denoiser_class.from_pretrained(BASES[base].folder / family.denoiser)
    torch.manual_seed(seed)
    modules = [name for name in family.lora_targets(denoiser, "cross") if name.endswith(("to_v", "to_out.0"))]
    denoiser.add_adapter(LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=modules))
    state, config = get_peft_model_state_dict(denoiser), denoiser.peft_config["default"]
    write_diffusers_lora(folder, {family.denoiser: (state, config)})
    return folder
