"""Tiny pipelines of random components of the real classes: ours, the stock one, and the original model's."""

import copy
import math
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
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
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from pipeline_spf_portrait import SPFPortraitPipeline
from pipeline_spf_portrait_xl import SPFPortraitXLPipeline
from prompts import tokenize_prompt_pair


ROOT = Path(__file__).resolve().parents[1]
TARGET = "red hair"
FULL = f"{BASE}, {TARGET}"
OTHER = "a man, a purple hat"
PHRASES = ("a woman", "a green jacket", "a purple background")
ATTENTION = r".*\.attn2\.to_(q|k|v|out\.0)"


def make_components(tokenizer, spread=8.0, **unet_arguments):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=4,
        **{"cross_attention_dim": 16} | unet_arguments,
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
        initializer_factor=spread,
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


SPREAD = 3.0  # the states that this family takes are not normed


def make_xl_components(tokenizer, **unet_arguments):
    """The same of Stable Diffusion XL, whose second tokenizer pads with "!"."""
    torch.manual_seed(4)
    config = CLIPTextConfig(
        hidden_size=12, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, projection_dim=10,
        pad_token_id=tokenizer.convert_tokens_to_ids("!"), initializer_factor=SPREAD,
    )  # fmt: skip
    config_2 = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    config_2 |= {"projection_class_embeddings_input_dim": 6 * 8 + 10, "cross_attention_dim": 16 + 12}
    components = make_components(tokenizer, SPREAD, **config_2 | unet_arguments)
    for name in ("safety_checker", "requires_safety_checker"):
        del components[name]
    return components | {
        "text_encoder_2": CLIPTextModelWithProjection(config).eval(),
        "tokenizer_2": CLIPTokenizer.from_pretrained(tokenizer.name_or_path, model_max_length=77, pad_token="!"),
        "add_watermarker": False,
    }


def lora_config(modules=ATTENTION, **kwargs):
    return LoraConfig(r=2, lora_alpha=8, target_modules=modules, init_lora_weights=False, **kwargs)


class World:
    """Ours and the stock pipeline on the same weights, with the LoRA in the denoiser, and the stock one without it."""

    classes = SPFPortraitPipeline, StableDiffusionPipeline
    make_components = staticmethod(make_components)
    denoiser, attention = "unet", ATTENTION  # a component's name, and which of its layers the LoRA is in
    steps = 2  # of a run that is looked at step by step

    def __init__(self, tokenizer, lora=True, **arguments):
        components = self.make_components(tokenizer, **arguments)
        adapted = {**components, self.denoiser: copy.deepcopy(components[self.denoiser])}
        if lora:
            torch.manual_seed(1)
            adapted[self.denoiser].add_adapter(lora_config(self.attention), "style")
        self.ours, self.stock = (kind(**adapted) for kind in self.classes)
        self.original = self.classes[1](**components)
        for pipeline in (self.ours, self.stock, self.original):
            pipeline.set_progress_bar_config(disable=True)

    def use_scheduler(self, scheduler):
        for pipeline in (self.ours, self.stock, self.original):
            pipeline.scheduler = copy.deepcopy(scheduler)

    def predict(self, pipeline, text, latents, timestep, size=None):
        """What a pipeline's denoiser predicts for a prompt, alone."""
        return pipeline.unet(latents, timestep, **self.conditions(pipeline, text, size)).sample

    def locate(self, pair):
        """Where a pair's phrases stand in the text that the denoiser is told, and the length of that."""
        return tokenize_prompt_pair(pair, self.ours.tokenizer), 77

    def noise_ratio(self, timestep):
        """Deviations of noise over signal."""
        signal = float(self.ours.scheduler.alphas_cumprod[round(float(timestep))])
        return math.sqrt((1 - signal) / signal)

    def scale(self, timestep):
        """What makes a difference of predictions one of predicted noise."""
        return 1.0

    @staticmethod
    def conditions(pipeline, text, size=None):
        """What a UNet is told of a prompt, and of a picture's size in pixels, 16 x 16 if not given."""
        return {"encoder_hidden_states": pipeline.encode_prompt(text, "cpu", 1, False)[0]}

    @staticmethod
    def clip_embeds(pipeline, texts):
        ids = pipeline.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
        return pipeline.text_encoder(ids).pooler_output


class XLWorld(World):
    """The same of Stable Diffusion XL."""

    classes = SPFPortraitXLPipeline, StableDiffusionXLPipeline
    make_components = staticmethod(make_xl_components)

    @staticmethod
    def conditions(pipeline, text, size=None):
        size = size or (16, 16)
        states, _, pooled, _ = pipeline.encode_prompt(text, None, "cpu", 1, False)
        added = {"text_embeds": pooled, "time_ids": torch.tensor([[*size, 0.0, 0.0, *size]])}
        return {"encoder_hidden_states": states, "added_cond_kwargs": added}

    @staticmethod
    def clip_embeds(pipeline, texts):
        ids = pipeline.tokenizer_2(texts, padding="max_length", return_tensors="pt").input_ids
        return pipeline.text_encoder_2(ids).text_embeds


def denoiser_of(pipeline):
    return pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer


def text_encoder_names(pipeline):
    """Those that a LoRA can be in."""
    return [name for name in ("text_encoder", "text_encoder_2") if hasattr(pipeline, name)]


def add_text_encoder_lora(world):
    for name in text_encoder_names(world.ours):
        text_encoder = copy.deepcopy(getattr(world.ours, name))
        text_encoder.add_adapter(lora_config(["q_proj", "v_proj"]), "text")
        world.ours.register_modules(**{name: text_encoder})
        world.stock.register_modules(**{name: text_encoder})


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
    width = world.original.unet.config.cross_attention_dim
    image_proj = {"proj.weight": torch.randn(4 * width, 6), "proj.bias": torch.zeros(4 * width)}
    image_proj |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    ip_adapter, key = {}, 1
    for name in world.original.unet.attn_processors:
        if name.endswith("attn2.processor"):
            size = world.original.unet.get_submodule(name.removesuffix(".processor")).inner_dim
            ip_adapter |= {f"{key}.to_{part}_ip.weight": torch.randn(size, width) for part in "kv"}
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
    names = text_encoder_names(pipeline)
    if len(names) > 1:
        texts = [""] * (3 if hasattr(pipeline, "text_encoder_3") else 1)
        # From the first time on transformers keeps hooks of its own there.
        pipeline.encode_prompt(*texts, device="cpu")
    models = [denoiser_of(pipeline), *(getattr(pipeline, name) for name in names)]
    modules = [module for model in models for module in model.modules()]
    return (
        {name: id(processor) for name, processor in models[0].attn_processors.items()},
        [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in modules],
        [(m.active_adapters, m.disable_adapters, dict(m.scaling)) for m in modules if isinstance(m, BaseTunerLayer)],
        [parameter.requires_grad for model in models for parameter in model.parameters()],
    )


def lora_file(world, folder, change=None, **kwargs):
    """The world's LoRA as a file, its layers changed."""
    layers = get_peft_model_state_dict(denoiser_of(world.ours), adapter_name="style")
    if world.denoiser == "unet":  # a transformer's layers keep PEFT's names
        layers = convert_state_dict_to_diffusers(layers)
    layers = change(layers) if change else layers
    config = {"r": 2, "lora_alpha": 8, "target_modules": world.attention}
    metadata = {f"{world.denoiser}_lora_adapter_metadata": config}
    world.stock.save_lora_weights(folder, layers, **metadata, **kwargs)
    return folder
