"""A tiny Stable Diffusion 3 of random components of the real classes, and LoRAs on all kinds of its layers."""

import copy

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from peft import LoraConfig, get_peft_model_state_dict
from test_prompts import BASE
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5Tokenizer

from loras import LORA_WEIGHTS


MODELS = ("transformer", "text_encoder", "text_encoder_2")
EVERYTHING = (
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "net.0.proj", "net.2",
    "norm1.linear", "norm1_context.linear", "context_embedder", "pos_embed.proj", "linear_1", "linear_2",
    "norm_out.linear", "proj_out",
)  # fmt: skip
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "text_projection")


def make_sd3(tokenizer, with_t5=True, **transformer_arguments) -> StableDiffusion3Pipeline:
    """Two blocks, the first with attention of the picture to itself as in 3.5-medium; T5 may be left out."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        **{
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 22,
            "pos_embed_max_size": 8,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
            **transformer_arguments,
        }
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
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
            projection_dim=projection,
            initializer_factor=8.0,
        )
        for size, projection in ((16, 12), (12, 10))
    )
    t5 = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    pieces = ["<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz,"]
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        vae=vae.eval(),
        text_encoder=CLIPTextModelWithProjection(first).eval(),
        text_encoder_2=CLIPTextModelWithProjection(second).eval(),
        text_encoder_3=T5EncoderModel(t5).eval() if with_t5 else None,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=T5Tokenizer(vocab=[(piece, -1.0) for piece in pieces], extra_ids=0) if with_t5 else None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def with_copies(pipeline) -> StableDiffusion3Pipeline:
    """Another pipeline whose models can be changed."""
    copies = {name: copy.deepcopy(pipeline.components[name]) for name in MODELS}
    other = StableDiffusion3Pipeline(**{**pipeline.components, **copies})
    other.set_progress_bar_config(disable=True)
    return other


def save_sd3_lora(
    pipeline, folder, changes=None, models=MODELS, rename=lambda state: state, change=lambda name, model: None
):
    """A random LoRA on layers of all kinds, as diffusers saves it, whose alpha is not its rank; `changes` of its
    configuration by model, and `change` of a model that has it.
    """
    options = {}
    for number, name in enumerate(models):
        torch.manual_seed(1 + number)
        model = copy.deepcopy(pipeline.components[name])
        modules = list(EVERYTHING if name == "transformer" else TEXT)
        config = {"r": 2, "lora_alpha": 1, "target_modules": modules, "init_lora_weights": False}
        model.add_adapter(LoraConfig(**{**config, **(changes or {}).get(name, {})}), "default")
        change(name, model)
        options[f"{name}_lora_layers"] = rename(get_peft_model_state_dict(model, adapter_name="default"))
        options[f"{name}_lora_adapter_metadata"] = model.peft_config["default"].to_dict()
    StableDiffusion3Pipeline.save_lora_weights(folder, **options)
    return folder / LORA_WEIGHTS


def draw_sd3(pipeline, load=lambda pipeline: None):
    """Latents after two steps by copies of the models, with what `load` puts on them."""
    own = with_copies(pipeline)
    load(own)
    options = {"num_inference_steps": 2, "output_type": "latent", "height": 16, "width": 16, "max_sequence_length": 16}
    return own(f"{BASE}, red hair", generator=torch.Generator().manual_seed(0), **options).images
