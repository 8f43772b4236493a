"""Tiny pipelines of random components of the real classes: ours, the stock one, and the original model's."""

import copy
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from test_prompts import BASE
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from pipeline_spf_portrait import SPFPortraitPipeline


ROOT = Path(__file__).resolve().parents[1]
TARGET = "red hair"
FULL = f"{BASE}, {TARGET}"
OTHER = "a man, a purple hat"
PHRASES = ("a woman", "a green jacket", "a purple background")
ATTENTION = r".*\.attn2\.to_(q|k|v|out\.0)"


def make_components(tokenizer, **unet_arguments):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
        **unet_arguments,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    text_config = CLIPTextConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        # The default spread of .02 makes all prompts look the same to the UNet.
        initializer_factor=8.0,
    )
    return {
        "unet": unet.eval(),
        "vae": vae.eval(),
        "text_encoder": CLIPTextModel(text_config).eval(),
        "tokenizer": tokenizer,
        "scheduler": DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        "safety_checker": None,
        "feature_extractor": None,
        "image_encoder": None,
        "requires_safety_checker": False,
    }


def lora_config(modules=ATTENTION, **kwargs):
    return LoraConfig(r=2, lora_alpha=8, target_modules=modules, init_lora_weights=False, **kwargs)


class World:
    """Ours and the stock pipeline on the same weights, with the LoRA in the UNet, and the stock one without it."""

    def __init__(self, tokenizer, lora=True, **unet_arguments):
        components = make_components(tokenizer, **unet_arguments)
        adapted = {**components, "unet": copy.deepcopy(components["unet"])}
        if lora:
            torch.manual_seed(1)
            adapted["unet"].add_adapter(lora_config(), "style")
        self.ours, self.stock = SPFPortraitPipeline(**adapted), StableDiffusionPipeline(**adapted)
        self.original = StableDiffusionPipeline(**components)
        for pipeline in (self.ours, self.stock, self.original):
            pipeline.set_progress_bar_config(disable=True)

    def use_scheduler(self, scheduler):
        for pipeline in (self.ours, self.stock, self.original):
            pipeline.scheduler = copy.deepcopy(scheduler)


def add_text_encoder_lora(world):
    text_encoder = copy.deepcopy(world.ours.text_encoder)
    text_encoder.add_adapter(lora_config(["q_proj", "v_proj"]), "text")
    world.ours.register_modules(text_encoder=text_encoder)
    world.stock.register_modules(text_encoder=text_encoder)


def add_ip_adapter(world):
    """A tiny IP-Adapter with random weights in both pipelines' UNet, and in the original's."""
    torch.manual_seed(2)
    config = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4,
        projection_dim=6,
    )  # fmt: skip
    parts = {
        "image_encoder": CLIPVisionModelWithProjection(config).eval(),
        "feature_extractor": CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size=8),
    }
    image_proj = {"proj.weight": torch.randn(4 * 16, 6), "proj.bias": torch.zeros(4 * 16)}
    image_proj |= {"norm.weight": torch.ones(16), "norm.bias": torch.zeros(16)}
    ip_adapter, key = {}, 1
    for name in world.original.unet.attn_processors:
        if name.endswith("attn2.processor"):
            size = world.original.unet.get_submodule(name.removesuffix(".processor")).inner_dim
            ip_adapter |= {f"{key}.to_{part}_ip.weight": torch.randn(size, 16) for part in "kv"}
            key += 2
    for pipeline in (world.ours, world.stock, world.original):
        pipeline.register_modules(**parts)
    for unet in {id(p.unet): p.unet for p in (world.ours, world.original)}.values():
        unet._load_ip_adapter_weights([{"image_proj": image_proj, "ip_adapter": ip_adapter}])


def draw(pipeline, *args, seed=0, **kwargs):
    """One call of one step with a generator of its own."""
    if isinstance(seed, list):
        kwargs["generator"] = [torch.Generator().manual_seed(number) for number in seed]
    else:
        kwargs["generator"] = torch.Generator().manual_seed(seed)
    return pipeline(*args, **{"num_inference_steps": 1, "output_type": "np", "guidance_scale": 5.0, **kwargs})


def assert_equal(first, second):
    if isinstance(first, list):
        first, second = [np.stack([np.asarray(image) for image in images]) for images in (first, second)]
    assert type(first) is type(second)
    assert np.array_equal(np.asarray(first), np.asarray(second))


def assert_close(first, second, tolerance=1e-4):
    assert first.shape == second.shape
    assert np.abs(np.asarray(first) - np.asarray(second)).max() < tolerance


def state(pipeline):
    """All that a call may not leave behind: processors, hooks, the adapters' state and what is trainable."""
    models = [pipeline.unet, pipeline.text_encoder]
    modules = [module for model in models for module in model.modules()]
    return (
        {name: id(processor) for name, processor in pipeline.unet.attn_processors.items()},
        [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in modules],
        [(m.active_adapters, m.disable_adapters, dict(m.scaling)) for m in modules if isinstance(m, BaseTunerLayer)],
        [parameter.requires_grad for model in models for parameter in model.parameters()],
    )


def lora_file(world, folder, change=None, **kwargs):
    """The world's LoRA as a file, its layers changed."""
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(world.ours.unet, adapter_name="style"))
    layers = change(layers) if change else layers
    config = {"r": 2, "lora_alpha": 8, "target_modules": ATTENTION}
    StableDiffusionPipeline.save_lora_weights(folder, layers, unet_lora_adapter_metadata=config, **kwargs)
    return folder
