"""A tiny SDXL of random components of the real classes, in the published blocks, and LoRAs on all kinds of layers."""

import copy

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig, get_peft_model_state_dict
from test_prompts import BASE
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from loras import LORA_WEIGHTS


MODELS = ("unet", "text_encoder", "text_encoder_2")
EVERYTHING = (
    "to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2",
    "time_emb_proj", "conv_shortcut", "conv", "conv_in", "conv_out", "linear_1", "linear_2",
)  # fmt: skip
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "text_projection")  # the last of the second alone


def make_sdxl(tokenizer, **unet_arguments) -> StableDiffusionXLPipeline:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        **{
            "sample_size": 8,
            "block_out_channels": (8, 16, 24),
            "layers_per_block": 2,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 1, 2),
            "cross_attention_dim": 28,
            "attention_head_dim": (2, 4, 4),
            "norm_num_groups": 4,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 10 + 6 * 4,
            **unet_arguments,
        }
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        force_upcast=False,
    )
    first, second = (
        CLIPTextConfig(
            hidden_size=size,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            projection_dim=10,
            initializer_factor=8.0,
        )
        for size in (16, 12)
    )
    pipeline = StableDiffusionXLPipeline(
        unet=unet.eval(),
        vae=vae.eval(),
        text_encoder=CLIPTextModel(first).eval(),
        text_encoder_2=CLIPTextModelWithProjection(second).eval(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", steps_offset=1),
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def with_copies(pipeline) -> StableDiffusionXLPipeline:
    """Another pipeline whose models can be changed."""
    copies = {name: copy.deepcopy(pipeline.components[name]) for name in MODELS}
    other = StableDiffusionXLPipeline(**{**pipeline.components, **copies}, add_watermarker=False)
    other.set_progress_bar_config(disable=True)
    return other


def save_sdxl_lora(
    pipeline, folder, changes=None, models=MODELS, rename=lambda state: state, change=lambda name, model: None
):
    """A random LoRA on layers of all kinds, of diffusers' format, whose alpha is not its rank; `changes` by model, and
    `change` of a model that has it.
    """
    options = {}
    for number, name in enumerate(models):
        torch.manual_seed(1 + number)
        model = copy.deepcopy(pipeline.components[name])
        modules = list(EVERYTHING if name == "unet" else TEXT)
        config = {"r": 2, "lora_alpha": 1, "target_modules": modules, "init_lora_weights": False}
        model.add_adapter(LoraConfig(**{**config, **(changes or {}).get(name, {})}), "default")
        change(name, model)
        options[f"{name}_lora_layers"] = rename(get_peft_model_state_dict(model, adapter_name="default"))
        options[f"{name}_lora_adapter_metadata"] = model.peft_config["default"].to_dict()
    StableDiffusionXLPipeline.save_lora_weights(folder, **options)
    return folder / LORA_WEIGHTS


def draw_sdxl(pipeline, load=lambda pipeline: None):
    """Latents after two steps by copies of the models, with what `load` puts on them."""
    own = with_copies(pipeline)
    load(own)
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 2, "output_type": "latent", "height": 16, "width": 16}
    return own(f"{BASE}, red hair", generator=generator, **options).images
