"""Tests of `pipeline_spf_portrait.py`, on tiny random components of the real classes."""

import copy
import inspect
import json
import logging
import os
import shutil
import subprocess
import sys
import warnings
from operator import attrgetter
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import cpu_offload_with_hook
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.callbacks import SDCFGCutoffCallback
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from diffusers.utils import convert_state_dict_to_diffusers
from peft import IA3Config, LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from test_prompts import BASE, write_vocabulary
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from attention_processors import capture_cross_attention, phrase_map_resolution
from pictures import captioned_pictures, overlay_heat_map
from pipeline_spf_portrait import SPFPortraitPipeline, SPFPortraitPipelineOutput
from prompts import make_prompt_pair, phrase_mask, tokenize_prompt_pair
from sfcm import SFCM_MODES, free_regions, guidance_map, noise_difference, phrase_attention_maps
from training.sharing import PIPELINE_CODE


ROOT = Path(__file__).resolve().parents[1]
TARGET = "red hair"
FULL = f"{BASE}, {TARGET}"
OTHER = "a man, a purple hat"
PHRASES = ("a woman", "a green jacket", "a purple background")
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = write_vocabulary(tmp_path_factory.mktemp("tokenizer"))
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


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


def lora_config(modules=tuple(ATTENTION), **kwargs):
    return LoraConfig(r=2, lora_alpha=8, target_modules=list(modules), init_lora_weights=False, **kwargs)


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


@pytest.fixture(scope="module")
def world(tokenizer):
    """Shared: no test may change it."""
    return World(tokenizer)


@pytest.fixture
def own_world(tokenizer):
    return World(tokenizer)


def draw(pipeline, *args, seed=0, **kwargs):
    """One call of two steps with a generator of its own."""
    if isinstance(seed, list):
        kwargs["generator"] = [torch.Generator().manual_seed(number) for number in seed]
    else:
        kwargs["generator"] = torch.Generator().manual_seed(seed)
    return pipeline(*args, **{"num_inference_steps": 2, "output_type": "np", "guidance_scale": 5.0, **kwargs})


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


# --------------------------------------------------------------------------------------------------- the stock call


def test_the_signature_is_the_stock_one_and_then_ours():
    stock = list(inspect.signature(StableDiffusionPipeline.__call__).parameters.values())
    ours = list(inspect.signature(SPFPortraitPipeline.__call__).parameters.values())
    assert [(p.name, p.default, p.kind) for p in ours[: len(stock) - 1]] == [
        (p.name, p.default, p.kind) for p in stock[:-1]
    ]
    assert ours[-1].kind is inspect.Parameter.VAR_KEYWORD
    assert [(p.name, p.default) for p in ours[len(stock) - 1 : -1]] == [
        ("target_prompt", None),
        ("base_phrases", None),
        ("free_phrases", None),
        ("target_scale", None),
        ("compare", False),
        ("return_sfcm", False),
        ("sfcm_mode", "averaged_target"),
        ("sfcm_guidance", 0.0),
        ("sfcm_guidance_exponent", 2.0),
        ("adapter_in_unconditional", True),
    ]


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_without_our_arguments_the_images_are_the_stock_ones_to_the_bit(tokenizer, lora, output_type):
    world = World(tokenizer, lora=lora)
    ours = draw(world.ours, BASE, output_type=output_type)
    assert type(ours).__name__ == "StableDiffusionPipelineOutput"
    assert_equal(ours.images, draw(world.stock, BASE, output_type=output_type).images)


def rescale_latents(pipeline, step, timestep, tensors):
    return {"latents": tensors["latents"] * 0.9}


# A call for each argument of the stock pipeline, which means something there and differs from its default.
STOCK_ARGUMENTS = {
    "prompt": {"prompt": [BASE, OTHER]},
    "height": {"height": 24, "width": 16},
    "width": {"height": 16, "width": 24},
    "num_inference_steps": {"num_inference_steps": 3},
    "timesteps": {"timesteps": [900, 300]},
    "sigmas": {"sigmas": [10.0, 1.0]},
    "guidance_scale": {"guidance_scale": 1.0},
    "negative_prompt": {"negative_prompt": "bad"},
    "num_images_per_prompt": {"num_images_per_prompt": 2},
    "eta": {"eta": 1.0, "seed": [5]},
    "generator": {"num_images_per_prompt": 2, "seed": [3, 4]},
    "latents": {"latents": torch.linspace(-1, 1, 256).reshape(1, 4, 8, 8)},
    "prompt_embeds": {"prompt": None, "prompt_embeds": torch.ones(1, 77, 16)},
    "negative_prompt_embeds": {"negative_prompt_embeds": torch.ones(1, 77, 16)},
    "ip_adapter_image": {"ip_adapter_image": PIL.Image.new("RGB", (8, 8), (255, 0, 0))},
    "ip_adapter_image_embeds": {"ip_adapter_image_embeds": [torch.ones(2, 1, 6)]},
    "output_type": {"output_type": "pt"},
    "return_dict": {"return_dict": False},
    "cross_attention_kwargs": {"cross_attention_kwargs": {"scale": 0.5}},
    "guidance_rescale": {"guidance_rescale": 0.5},
    "clip_skip": {"clip_skip": 1},
    "callback_on_step_end": {"callback_on_step_end": rescale_latents},
    "callback_on_step_end_tensor_inputs": {
        "callback_on_step_end": rescale_latents,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
    },
    "kwargs": {"callback": print, "callback_steps": 1},
}
# Those that change the numbers of the image and not its shape.
EFFECTS = """
    num_inference_steps timesteps sigmas guidance_scale negative_prompt eta latents prompt_embeds
    negative_prompt_embeds
    cross_attention_kwargs guidance_rescale clip_skip callback_on_step_end
""".split()
# Only some schedulers take them.
TIMESTEPS = {"timesteps": DDPMScheduler(beta_schedule="scaled_linear", clip_sample=False, variance_type="fixed_small")}
SIGMAS = {"sigmas": EulerDiscreteScheduler(steps_offset=1)}


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


@pytest.fixture
def world_for(own_world):
    """The world that a call of one stock argument needs."""

    def prepare(name):
        if name.startswith("ip_adapter"):
            add_ip_adapter(own_world)
        for arguments in (TIMESTEPS, SIGMAS):
            if name in arguments:
                own_world.use_scheduler(arguments[name])
        return own_world

    return prepare


def stock_arguments(pipeline, arguments):
    """The same for the stock pipeline, whose `clip_skip` looks for a part that transformers 5 does not have."""
    if "clip_skip" not in arguments:
        return arguments
    encoder, skipped = pipeline.text_encoder, arguments["clip_skip"]

    def encode(text):
        ids = pipeline.tokenizer(text, padding="max_length", truncation=True, return_tensors="pt").input_ids
        with torch.no_grad():
            return encoder.final_layer_norm(encoder(ids, output_hidden_states=True).hidden_states[-(skipped + 1)])

    others = {key: value for key, value in arguments.items() if key not in ("clip_skip", "prompt")}
    # The negative prompt is not skipped.
    return {"prompt_embeds": encode(arguments["prompt"]), "negative_prompt": "", **others}


def test_no_stock_argument_is_forgotten():
    assert set(STOCK_ARGUMENTS) == set(inspect.signature(StableDiffusionPipeline.__call__).parameters) - {"self"}


@pytest.mark.parametrize("name", list(STOCK_ARGUMENTS))
def test_every_stock_argument_is_passed_on_to_the_bit(world_for, name):
    world, arguments = world_for(name), {"prompt": BASE, **STOCK_ARGUMENTS[name]}
    ours = draw(world.ours, **arguments)
    assert_equal(ours[0], draw(world.stock, **stock_arguments(world.stock, arguments))[0])
    if name in EFFECTS:
        assert np.abs(ours[0] - draw(world.stock, BASE)[0]).max() > 1e-4


@pytest.mark.parametrize("name", [name for name in STOCK_ARGUMENTS if name not in ("return_dict", "kwargs")])
def test_every_stock_argument_goes_with_compare(world_for, name):
    world, arguments = world_for(name), {"prompt": BASE, **STOCK_ARGUMENTS[name]}
    target = {} if name == "prompt_embeds" else {"target_prompt": TARGET}
    full = {}
    if target:
        texts = [arguments["prompt"]] if isinstance(arguments["prompt"], str) else arguments["prompt"]
        full["prompt"] = [f"{text}, {TARGET}" for text in texts]
        full["prompt"] = full["prompt"][0] if isinstance(arguments["prompt"], str) else full["prompt"]
    output = draw(world.ours, compare=True, **arguments, **target)
    assert_close(output.images, draw(world.stock, **stock_arguments(world.stock, arguments | full))[0])
    arguments.pop("cross_attention_kwargs", None)  # the original pipeline has no LoRA to scale
    assert_close(output.reference_images, draw(world.original, **stock_arguments(world.original, arguments))[0])
    assert np.abs(np.asarray(output.images) - np.asarray(output.reference_images)).max() > 1e-4


def test_target_alone_is_the_stock_call_with_the_full_prompt(world):
    assert_equal(draw(world.ours, BASE, target_prompt=TARGET).images, draw(world.stock, FULL).images)
    replaced = draw(world.ours, BASE, target_prompt=[("a green jacket", "a red hat"), TARGET], negative_prompt="bad")
    full = f"a woman, a red hat, a purple background, {TARGET}"
    assert_equal(replaced.images, draw(world.stock, full, negative_prompt="bad").images)
    pair = draw(world.ours, BASE, target_prompt=("a green jacket", "a red hat"))
    assert_equal(pair.images, draw(world.stock, "a woman, a red hat, a purple background").images)
    several = draw(world.ours, [BASE, OTHER], target_prompt=TARGET, return_dict=False)
    assert_equal(several[0], draw(world.stock, [FULL, f"{OTHER}, {TARGET}"]).images)
    assert np.abs(replaced.images - draw(world.stock, BASE, negative_prompt="bad").images).max() > 1e-3


# ---------------------------------------------------------------------------------------------------------- compare


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_images_per_prompt": 2, "eta": 1.0},
        {"num_images_per_prompt": 2, "eta": 1.0, "seed": [3, 4]},
        {"eta": 1.0, "guidance_scale": 1.0, "height": 24, "width": 16, "negative_prompt": "bad"},
    ],
)
def test_compare_equals_two_runs_and_leaves_nothing_behind(world, arguments):
    before = state(world.ours)
    output = draw(world.ours, BASE, target_prompt=TARGET, compare=True, **arguments)
    assert isinstance(output, SPFPortraitPipelineOutput)
    assert output.sfcm is None and output.phrases is None
    assert_close(output.images, draw(world.ours, BASE, target_prompt=TARGET, **arguments).images)
    assert_close(output.reference_images, draw(world.original, BASE, **arguments).images)
    assert np.abs(output.images - output.reference_images).max() > 1e-3
    assert state(world.ours) == before


def test_compare_with_several_prompts_keeps_their_order(world):
    arguments = {"num_images_per_prompt": 2, "negative_prompt": ["bad", "ugly"]}
    output = draw(world.ours, [BASE, OTHER], target_prompt=TARGET, compare=True, **arguments)
    assert_close(output.images, draw(world.stock, [FULL, f"{OTHER}, {TARGET}"], **arguments).images)
    assert_close(output.reference_images, draw(world.original, [BASE, OTHER], **arguments).images)


def test_compare_without_target_shows_what_the_lora_does_to_the_base_prompt(world):
    output = draw(world.ours, BASE, compare=True)
    assert_close(output.images, draw(world.stock, BASE).images)
    assert_close(output.reference_images, draw(world.original, BASE).images)
    assert np.abs(output.images - output.reference_images).max() > 1e-3


def test_compare_works_without_any_lora(tokenizer):
    world = World(tokenizer, lora=False)
    output = draw(world.ours, BASE, compare=True, output_type="pil")
    assert len(output.images) == len(output.reference_images) == 1
    assert_equal(output.images, output.reference_images)
    output = draw(world.ours, BASE, target_prompt=TARGET, compare=True)
    assert_close(output.images, draw(world.original, FULL).images)
    assert_close(output.reference_images, draw(world.original, BASE).images)


@pytest.mark.parametrize(
    "scheduler",
    [
        EulerAncestralDiscreteScheduler(steps_offset=1),  # draws noise at each step
        PNDMScheduler(steps_offset=1, skip_prk_steps=True),  # one more call of the UNet than steps
        HeunDiscreteScheduler(steps_offset=1),  # two calls of the UNet per step
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_compare_with_other_schedulers(own_world, scheduler):
    own_world.use_scheduler(scheduler)
    output = draw(own_world.ours, BASE, target_prompt=TARGET, compare=True, num_inference_steps=3)
    assert_close(output.images, draw(own_world.stock, FULL, num_inference_steps=3).images)
    assert_close(output.reference_images, draw(own_world.original, BASE, num_inference_steps=3).images)


def test_compare_without_generator_gives_both_halves_the_same_noise(tokenizer):
    world = World(tokenizer, lora=False)
    arguments = {"num_inference_steps": 2, "output_type": "np", "eta": 1.0, "compare": True}
    arguments["latents"] = torch.ones(1, 4, 8, 8)  # so that only the steps' own noise can differ
    torch.manual_seed(0)
    first, second = world.ours(BASE, **arguments), world.ours(BASE, **arguments)
    assert_close(first.images, first.reference_images)
    assert np.abs(first.images - second.images).max() > 1e-3


def test_compare_switches_off_every_adapter_and_that_of_the_text_encoder(own_world):
    unet = own_world.ours.unet
    unet.add_adapter(lora_config(["conv1", "time_emb_proj", "to_k"]), "second")
    unet.set_adapter(["style", "second"])
    add_text_encoder_lora(own_world)
    before = state(own_world.ours)
    output = draw(own_world.ours, BASE, target_prompt=TARGET, compare=True, return_sfcm=True, negative_prompt="bad")
    assert_close(output.images, draw(own_world.stock, FULL, negative_prompt="bad").images)
    assert_close(output.reference_images, draw(own_world.original, BASE, negative_prompt="bad").images)
    assert state(own_world.ours) == before


def test_compare_splits_the_safety_checkers_flags(own_world):
    own_world.ours.run_safety_checker = lambda image, device, dtype: (image, [True, False, False, True])
    output = draw(own_world.ours, BASE, target_prompt=TARGET, compare=True, num_images_per_prompt=2)
    assert output.nsfw_content_detected == [True, False]
    assert len(output.images) == len(output.reference_images) == 2


def test_half_precision_with_dora(own_world):
    own_world.ours.unet.delete_adapters("style")
    own_world.ours.unet.add_adapter(lora_config(use_dora=True), "style")
    own_world.ours.to(torch.bfloat16)
    own_world.original.to(torch.bfloat16)
    output = draw(own_world.ours, BASE, target_prompt=TARGET, compare=True, return_sfcm=True)
    assert_close(output.images, draw(own_world.stock, FULL).images, 0.05)
    assert_close(output.reference_images, draw(own_world.original, BASE).images, 0.05)
    assert output.sfcm.dtype == output.phrase_maps.dtype == output.phrase_distances.dtype == torch.float32
    assert output.sfcm.max() == 1


# ------------------------------------------------------------------------------------------------------------- sfcm


def expected_maps(world, prompt, latents_of_steps, mode):
    """The maps of one prompt and image, computed step by step with separate UNet calls."""
    pair = make_prompt_pair(prompt, TARGET)
    tokens = tokenize_prompt_pair(pair, world.ours.tokenizer)
    weights = torch.tensor([phrase_mask(tokens.phrase_positions, 77)])

    def encode(pipeline, text):
        return pipeline.encode_prompt(text, "cpu", 1, False)[0]

    differences, probs = [], []
    with torch.no_grad(), capture_cross_attention(world.original.unet) as store, store.record():
        for latents, timestep in zip(latents_of_steps, world.ours.scheduler.timesteps, strict=True):
            response = world.ours.unet(latents, timestep, encode(world.ours, pair.full_prompt)).sample
            reference = world.original.unet(latents, timestep, encode(world.original, prompt)).sample
            if SFCM_MODES[mode].target_only:
                start = world.ours.unet(latents, timestep, encode(world.ours, prompt)).sample
            else:
                start = reference
            differences.append(noise_difference(response, start))
            features = store.pop()
            resolution = phrase_map_resolution(features.resolutions)
            layers = features.at_resolution(resolution).attention_probs.values()
            probs.append(torch.stack(list(layers)).mean(0))
        texts = world.ours.tokenizer([*pair.base_phrases, TARGET], padding="max_length", return_tensors="pt")
        embeds = world.original.text_encoder(texts.input_ids).pooler_output
    difference = torch.stack(differences).mean(0)
    maps = phrase_attention_maps([torch.stack(probs).mean(0)], [resolution], weights, difference.shape[-2:])
    distances = 1 - torch.nn.functional.cosine_similarity(embeds[:-1], embeds[-1:])[None]
    present = torch.ones(1, len(pair.base_phrases), dtype=torch.bool)
    return SFCM_MODES[mode].compute(difference, maps, distances, present), maps, distances


def check_sfcm(world, sfcm_mode, compare, guidance_scale):
    steps = [torch.randn(1, 4, 12, 8, generator=torch.Generator().manual_seed(0))]

    def remember(pipeline, step, timestep, tensors):
        steps.append(tensors["latents"])
        return {}

    arguments = {"height": 24, "width": 16, "guidance_scale": guidance_scale, "negative_prompt": "bad"}
    plain = draw(world.ours, BASE, target_prompt=TARGET, callback_on_step_end=remember, **arguments)
    before = state(world.ours)
    arguments.update(target_prompt=TARGET, return_sfcm=True, compare=compare, sfcm_mode=sfcm_mode)
    output = draw(world.ours, BASE, **arguments)
    assert state(world.ours) == before
    assert_close(output.images, plain.images)
    assert (output.reference_images is not None) == compare
    sfcm, maps, distances = expected_maps(world, BASE, steps[:-1], sfcm_mode)
    assert output.sfcm.shape == (1, 1, 12, 8)
    assert output.phrases == [PHRASES]
    assert sfcm.max() > 0.5
    assert_close(output.sfcm, sfcm, 1e-3)
    assert_close(output.phrase_maps, maps, 1e-3)
    assert_close(output.phrase_distances, distances)


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("compare", [True, False])
@pytest.mark.parametrize("sfcm_mode", ["averaged_target", "averaged", "paper"])
def test_sfcm_is_that_of_separate_calls_on_the_responses_own_latents(world, sfcm_mode, compare, guidance_scale):
    check_sfcm(world, sfcm_mode, compare, guidance_scale)


def test_sfcm_is_against_the_original_text_encoder(own_world):
    add_text_encoder_lora(own_world)
    check_sfcm(own_world, "averaged", compare=False, guidance_scale=5.0)
    check_sfcm(own_world, "averaged_target", compare=False, guidance_scale=5.0)


def test_sfcm_of_several_prompts_and_images(world):
    arguments = {"target_prompt": TARGET, "seed": [1, 2, 3, 4], "num_images_per_prompt": 2}
    output = draw(world.ours, [BASE, OTHER], return_sfcm=True, compare=True, **arguments)
    assert output.sfcm.shape == (4, 1, 8, 8) and output.sfcm.dtype == torch.float32
    assert output.sfcm.min() == 0 and output.sfcm.max() == 1
    assert output.phrases == [PHRASES, PHRASES, ("a man", "a purple hat"), ("a man", "a purple hat")]
    assert output.phrase_maps.shape == (4, 3, 8, 8)
    assert output.phrase_distances.shape == (4, 3)
    assert (output.phrase_maps[2:, 2] == 0).all() and (output.phrase_distances[2:, 2] == 0).all()
    # Each image's maps are those of a run of its own.
    for image, prompt in enumerate([BASE, BASE, OTHER, OTHER]):
        alone = draw(world.ours, prompt, target_prompt=TARGET, return_sfcm=True, seed=image + 1)
        phrases = len(alone.phrases[0])
        assert_close(output.images[image : image + 1], alone.images)
        assert_close(output.sfcm[image : image + 1], alone.sfcm, 1e-3)
        assert_close(output.phrase_maps[image : image + 1, :phrases], alone.phrase_maps, 1e-3)
        assert_close(output.phrase_distances[image : image + 1, :phrases], alone.phrase_distances)


def test_sfcm_without_a_lora_is_the_difference_of_the_prompts(tokenizer):
    world = World(tokenizer, lora=False)
    output = draw(world.ours, BASE, target_prompt=TARGET, return_sfcm=True, output_type="pil")
    assert isinstance(output.images[0], PIL.Image.Image)
    assert output.sfcm.max() == 1


def test_phrases_can_be_given_and_replaced_ones_are_left_out(world):
    arguments = {"return_sfcm": True, "target_prompt": [("a green jacket", "a red hat")]}
    assert draw(world.ours, BASE, **arguments).phrases == [("a woman", "a purple background")]
    output = draw(world.ours, BASE, base_phrases=["woman", "green jacket"], **arguments)
    assert output.phrases == [("woman",)]
    output = draw(
        world.ours, [BASE, OTHER], target_prompt=TARGET, base_phrases=[["woman"], ["a man"]], return_sfcm=True
    )
    assert output.phrases == [("woman",), ("a man",)]


def test_the_maps_of_each_step(world):
    arguments = {"target_prompt": TARGET, "num_images_per_prompt": 2, "num_inference_steps": 3, "seed": [1, 2]}
    output = draw(world.ours, BASE, return_sfcm="per_step", **arguments)
    assert output.sfcm_per_step.shape == (2, 3, 8, 8) and output.sfcm.shape == (2, 1, 8, 8)
    assert len({tuple(step.flatten().tolist()) for step in output.sfcm_per_step[0]}) == 3
    plain = draw(world.ours, BASE, return_sfcm=True, **arguments)
    assert plain.sfcm_per_step is None
    assert_close(output.sfcm, plain.sfcm)
    one = draw(world.ours, BASE, return_sfcm="per_step", target_prompt=TARGET, num_inference_steps=1)
    assert_equal(one.sfcm.numpy(), one.sfcm_per_step.numpy())


def test_targets_have_maps_of_the_portraits_own_attention(world):
    targets = ["red hair", "a hat"]
    output = draw(world.ours, BASE, target_prompt=targets, return_sfcm=True, num_inference_steps=1)
    assert output.targets == [("red hair", "a hat")] and output.target_maps.shape == (1, 2, 8, 8)
    pair = make_prompt_pair(BASE, targets)
    tokens = tokenize_prompt_pair(pair, world.ours.tokenizer)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    world.ours.scheduler.set_timesteps(1)
    with torch.no_grad(), capture_cross_attention(world.ours.unet) as store, store.record():
        embeds = world.ours.encode_prompt(pair.full_prompt, "cpu", 1, False)[0]
        world.ours.unet(latents, world.ours.scheduler.timesteps[0], embeds)
    features = store.pop()
    resolution = phrase_map_resolution(features.resolutions)
    probs = list(features.at_resolution(resolution).attention_probs.values())
    weights = torch.tensor([phrase_mask(tokens.each_target_positions, 77)])
    expected = phrase_attention_maps(probs, [resolution] * len(probs), weights, (8, 8))
    assert_close(output.target_maps, expected, 1e-3)


def test_without_a_target_the_map_is_what_the_lora_changes(world, tokenizer):
    output = draw(world.ours, [BASE, OTHER], return_sfcm=True, seed=[1, 2])
    assert output.phrases == [PHRASES, ("a man", "a purple hat")]
    assert output.phrase_maps.shape == (2, 3, 8, 8) and output.phrase_maps[0].amax((-2, -1)).tolist() == [1, 1, 1]
    assert output.targets is output.target_maps is output.phrase_distances is None
    assert output.sfcm.max() == 1 and (output.sfcm == 0).any()
    given = draw(world.ours, BASE, return_sfcm=True, base_phrases=["woman"], seed=1)
    assert given.phrases == [("woman",)]
    unchanged = World(tokenizer, lora=False)
    output = draw(unchanged.ours, BASE, return_sfcm=True)
    assert output.sfcm is None and output.phrase_maps.shape == (1, 3, 8, 8)


def test_free_phrases_open_the_map(world):
    arguments = {"target_prompt": TARGET, "return_sfcm": True}
    closed, opened = (
        draw(world.ours, BASE, free_phrases=free, **arguments) for free in (None, ["a purple background"])
    )
    assert closed.phrases == opened.phrases
    assert (opened.sfcm >= opened.phrase_maps[:, 2:]).all() and not (closed.sfcm >= closed.phrase_maps[:, 2:]).all()
    two = draw(world.ours, [BASE, OTHER], free_phrases=[["a purple background"], None], seed=[0, 1], **arguments)
    assert_close(two.sfcm[:1], opened.sfcm, 1e-3)
    assert_close(two.sfcm[1:], draw(world.ours, OTHER, seed=1, **arguments).sfcm, 1e-3)


def test_a_guidance_embedding_is_extended_too(tokenizer):
    world = World(tokenizer, time_cond_proj_dim=8)
    output = draw(world.ours, BASE, target_prompt=TARGET, return_sfcm=True, compare=True)
    assert_close(output.images, draw(world.stock, FULL).images)
    assert_close(output.reference_images, draw(world.original, BASE).images)


def test_guidance_may_end_during_the_run(world):
    def end_guidance(pipeline, step, timestep, tensors):
        pipeline._guidance_scale = 0.0
        return {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[1]} if step == 0 else {}

    for compare in (False, True):
        arguments = {
            "callback_on_step_end": end_guidance,
            "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
        }
        output = draw(world.ours, BASE, target_prompt=TARGET, return_sfcm=True, compare=compare, **arguments)
        assert_close(output.images, draw(world.stock, FULL, **arguments).images)
        if compare:
            assert_close(output.reference_images, draw(world.original, BASE, **arguments).images)


def test_diffusers_own_callback_may_end_guidance_beside_the_references(world):
    # It keeps the last row of the prompts, which is enough for one image.
    arguments = {"callback_on_step_end": SDCFGCutoffCallback(cutoff_step_ratio=0.0)}
    for return_sfcm in (False, True):
        output = draw(world.ours, BASE, target_prompt=TARGET, compare=True, return_sfcm=return_sfcm, **arguments)
        assert_close(output.images, draw(world.stock, FULL, **arguments).images)
        assert_close(output.reference_images, draw(world.original, BASE, **arguments).images)


# --------------------------------------------------------------------------------------------------------- guidance


def denoise(world, prompt, *, guide=0.0, exponent=2.0, target_only=True, negative_lora=True, free=(), scale=5.0):
    """What a call computes, step by step with separate calls of the UNets: latents after three steps."""
    ours, original = world.ours, world.original
    pair = make_prompt_pair(prompt, TARGET, free_phrases=free)
    tokens = tokenize_prompt_pair(pair, ours.tokenizer)
    weights = torch.tensor([phrase_mask(tokens.phrase_positions, 77)])
    is_free = torch.tensor([[phrase in free for phrase in pair.base_phrases]])

    def predict(pipeline, text, latents, timestep):
        embeds = pipeline.encode_prompt(text, "cpu", 1, False)[0]
        return pipeline.unet(latents, timestep, embeds).sample

    latents, total = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), 0
    ours.scheduler.set_timesteps(3)
    for i, timestep in enumerate(ours.scheduler.timesteps):
        response = predict(ours, pair.full_prompt, latents, timestep)
        with capture_cross_attention(original.unet) as store, store.record():
            reference = predict(original, prompt, latents, timestep)
        features = store.pop()
        start = predict(ours, prompt, latents, timestep) if target_only else reference
        total = total + guidance_map(noise_difference(response, start))
        sfcm = guidance_map(total / (i + 1)) ** exponent
        resolution = phrase_map_resolution(features.resolutions)
        probs = list(features.at_resolution(resolution).attention_probs.values())
        maps = phrase_attention_maps(probs, [resolution] * len(probs), weights, (8, 8))
        mask = 1 - guide * (1 - free_regions(sfcm, maps, is_free))
        guided = reference + mask * (response - reference)
        if scale > 1:
            negative = predict(ours if negative_lora else original, "bad", latents, timestep)
            guided = negative + scale * (guided - negative)
        latents = ours.scheduler.step(guided, timestep, latents).prev_sample
    return latents


@pytest.mark.parametrize(
    ("expected", "arguments"),
    [
        ({"negative_lora": False}, {"adapter_in_unconditional": False}),
        ({"guide": 1.0}, {"sfcm_guidance": 1.0}),
        ({"guide": 0.5, "exponent": 1.0}, {"sfcm_guidance": 0.5, "sfcm_guidance_exponent": 1.0}),
        ({"guide": 0.75, "target_only": False}, {"sfcm_guidance": 0.75, "sfcm_mode": "averaged"}),
        ({"guide": 1.0, "scale": 1.0}, {"sfcm_guidance": 1, "guidance_scale": 1.0}),
        (
            {"guide": 1.0, "negative_lora": False, "free": ["a green jacket"]},
            {"sfcm_guidance": 1.0, "adapter_in_unconditional": False, "free_phrases": ["a green jacket"]},
        ),
    ],
)
def test_guidance_is_what_separate_calls_compute(own_world, expected, arguments):
    add_text_encoder_lora(own_world)
    before = state(own_world.ours)
    arguments = {"target_prompt": TARGET, "num_inference_steps": 3, "output_type": "latent", **arguments}
    output = draw(own_world.ours, BASE, negative_prompt="bad", **arguments)
    with torch.no_grad():
        latents = denoise(own_world, BASE, **expected)
        plain = denoise(own_world, BASE, scale=expected.get("scale", 5.0))
    assert_close(output.images, latents, 1e-3)
    assert (latents - plain).abs().max() > 1e-2
    # Beside the references, and while the maps are looked at, the images are the same.
    more = draw(own_world.ours, BASE, negative_prompt="bad", compare=True, return_sfcm=True, **arguments)
    assert_close(more.images, latents, 1e-3)
    reference = draw(
        own_world.original,
        BASE,
        negative_prompt="bad",
        **{
            name: value
            for name, value in arguments.items()
            if name in ("num_inference_steps", "output_type", "guidance_scale")
        },
    )
    assert_close(more.reference_images, reference.images, 1e-3)
    assert state(own_world.ours) == before


def test_no_guidance_changes_nothing_to_the_bit(world):
    stock = draw(world.stock, FULL)
    assert_equal(draw(world.ours, BASE, target_prompt=TARGET, sfcm_guidance=0.0).images, stock.images)
    assert_equal(
        draw(world.ours, BASE, sfcm_guidance=0, adapter_in_unconditional=True).images, draw(world.stock, BASE)[0]
    )
    assert np.abs(draw(world.ours, BASE, target_prompt=TARGET, sfcm_guidance=1.0).images - stock.images).max() > 1e-3


def test_full_guidance_with_a_flat_map_is_the_original_model(own_world):
    # Without a LoRA and with the target's words alone in a free phrase's place nothing can respond elsewhere.
    own_world.ours.unet.disable_adapters()
    output = draw(own_world.ours, BASE, target_prompt=TARGET, sfcm_guidance=1.0, sfcm_guidance_exponent=1e6)
    reference = draw(own_world.original, BASE)
    plain = draw(own_world.original, FULL)
    assert np.abs(output.images - reference.images).mean() < 0.5 * np.abs(plain.images - reference.images).mean()


def test_guidance_goes_with_half_precision_and_images_of_an_ip_adapter(own_world):
    add_ip_adapter(own_world)
    image = {"ip_adapter_image": PIL.Image.new("RGB", (8, 8), (255, 0, 0))}
    guided = {"target_prompt": TARGET, "sfcm_guidance": 1.0, "adapter_in_unconditional": False, **image}
    exact = draw(own_world.ours, BASE, compare=True, num_inference_steps=1, **guided)
    assert_close(exact.reference_images, draw(own_world.original, BASE, num_inference_steps=1, **image).images)
    own_world.ours.to(torch.bfloat16)
    assert_close(draw(own_world.ours, BASE, num_inference_steps=1, **guided).images, exact.images, 0.02)


# ----------------------------------------------------------------------------------------- several targets, strength


def two_adapters(world):
    """A second LoRA, in other layers; only the first is active."""
    torch.manual_seed(3)
    world.ours.unet.add_adapter(lora_config(["conv1", "to_k"]), "hat")
    world.ours.unet.set_adapter("style")
    return world


def expect(world, names, weights, prompt):
    """The stock pipeline's images with these adapters at these weights."""
    world.stock.set_adapters(names, weights)
    images = draw(world.stock, prompt).images
    world.stock.set_adapters(["style"], [1.0])
    world.ours.unet.set_adapters(["hat"], [1.0])
    world.ours.unet.set_adapters(["style"], [1.0])
    return images


def test_target_scale_is_a_factor_on_the_loras_strength(own_world):
    world = two_adapters(own_world)
    before = state(world.ours)
    half = draw(world.ours, BASE, target_prompt=TARGET, target_scale=0.5)
    assert state(world.ours) == before
    assert_close(half.images, expect(world, ["style"], [0.5], FULL))
    world.ours.set_adapters(["style"], [0.5])
    assert_close(draw(world.ours, BASE, target_scale=np.float32(0.5)).images, expect(world, ["style"], [0.25], BASE))
    world.ours.set_adapters(["style"], [1.0])
    assert_close(draw(world.ours, BASE, target_scale=0).images, draw(world.original, BASE).images)


def test_several_adapters_each_with_its_target_and_strength(own_world):
    world = two_adapters(own_world)
    before, full = state(world.ours), f"{BASE}, red hair, a hat"
    targets = {"style": "red hair", "hat": "a hat"}
    for scale, weights in (({"hat": 0.5}, [1.0, 0.5]), ([0.25, 0.5], [0.25, 0.5]), (2.0, [2.0, 2.0])):
        output = draw(world.ours, BASE, target_prompt=targets, target_scale=scale)
        assert state(world.ours) == before
        assert_close(output.images, expect(world, ["style", "hat"], weights, full))
    alone = draw(world.ours, BASE, target_prompt={"hat": ("a green jacket", "a hat")}, compare=True)
    replaced = "a woman, a hat, a purple background"
    assert_close(alone.images, expect(world, ["hat"], [1.0], replaced))
    assert_close(alone.reference_images, draw(world.original, BASE).images)
    world.ours.set_adapters(["style", "hat"])
    listed = draw(world.ours, BASE, target_prompt=["red hair", "a hat"], target_scale=[0.25, 0.5])
    assert_close(listed.images, expect(world, ["style", "hat"], [0.25, 0.5], full))


def test_the_text_encoders_adapter_is_scaled_and_switched_with_it(own_world):
    add_text_encoder_lora(own_world)
    before = state(own_world.ours)
    output = draw(own_world.ours, BASE, target_prompt=TARGET, target_scale={"text": 0.0, "style": 0.0})
    assert_close(output.images, draw(own_world.original, FULL).images)
    output = draw(own_world.ours, BASE, target_prompt={"text": TARGET})
    own_world.ours.unet.disable_adapters()
    expected = draw(own_world.stock, FULL)
    own_world.ours.unet.enable_adapters()
    assert_close(output.images, expected.images)
    assert state(own_world.ours) == before


# --------------------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_visualize_shows_everything_with_its_words(world, output_type, monkeypatch):
    shown = {}

    def remember(pictures, captions, columns):
        shown.update(captions=list(captions), pictures=list(pictures))
        return captioned_pictures(pictures, captions, columns)

    monkeypatch.setattr("pipeline_spf_portrait.captioned_pictures", remember)
    output = draw(
        world.ours, [BASE, OTHER], target_prompt=TARGET, compare=True, return_sfcm=True, output_type=output_type
    )
    picture = world.ours.visualize(output, 1)
    assert picture.mode == "RGB" and picture.width == 4 * 198 + 6
    distances = output.phrase_distances[1]
    captions = [f"a man ({distances[0]:.2f})", f"a purple hat ({distances[1]:.2f})"]
    assert shown["captions"] == ["original model", TARGET, "SFCM", f"{TARGET} (target)", *captions]
    images = draw(world.ours, [BASE, OTHER], target_prompt=TARGET, output_type="pil").images
    assert np.abs(np.asarray(shown["pictures"][1], int) - np.asarray(images[1], int)).max() <= 1
    assert shown["pictures"][4] == overlay_heat_map(shown["pictures"][0], output.phrase_maps[1, 0])


def test_visualize_of_less(world):
    assert world.ours.visualize(draw(world.ours, BASE, compare=True)).width == 2 * 198 + 6
    maps = draw(world.ours, BASE, return_sfcm=True)
    assert world.ours.visualize(maps, columns=9).width == 5 * 198 + 6
    with pytest.raises(ValueError, match="return_sfcm"):
        world.ours.visualize(draw(world.ours, BASE))
    with pytest.raises(ValueError, match="latent"):
        world.ours.visualize(draw(world.ours, BASE, compare=True, output_type="latent"))
    for index in (1, -1):
        with pytest.raises(IndexError, match=f"no image {index}: the output has 1"):
            world.ours.visualize(maps, index)


# ----------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base_phrases": ["a woman"]}, "target_prompt"),
        ({"free_phrases": ["a woman"]}, "target_prompt"),
        ({"sfcm_guidance": 0.5}, "target_prompt"),
        ({"target_prompt": TARGET, "free_phrases": ["a woman"]}, "return_sfcm"),
        ({"target_prompt": TARGET, "free_phrases": ["a dog"], "return_sfcm": True}, "'a dog' is not in the base"),
        ({"target_prompt": TARGET, "free_phrases": "a woman", "return_sfcm": True}, "free_phrases"),
        ({"target_prompt": TARGET, "sfcm_guidance": 1.5}, r"sfcm_guidance.*\[0, 1\].*1.5"),
        ({"target_prompt": TARGET, "sfcm_guidance": float("nan")}, "sfcm_guidance"),
        ({"target_prompt": TARGET, "sfcm_guidance": 1.0, "sfcm_guidance_exponent": 0.0}, "exponent.*positive"),
        ({"target_prompt": TARGET, "return_sfcm": "all"}, "return_sfcm.*per_step"),
        ({"target_prompt": {"hair": TARGET}}, r"\['hair'\].*loaded are \['style'\]"),
        ({"target_prompt": {"style": 3}}, "a dict by adapter"),
        ({"target_prompt": TARGET, "target_scale": {"hair": 1.0}}, r"\['hair'\].*active.*\['style'\]"),
        ({"target_prompt": TARGET, "target_scale": [1.0, 0.5]}, "2 strengths for 1 targets"),
        ({"target_prompt": TARGET, "target_scale": "strong"}, "target_scale.*numbers.*'strong'"),
        ({"target_prompt": TARGET, "target_scale": float("nan")}, "target_scale.*numbers.*nan"),
        ({"target_prompt": TARGET, "sfcm_guidance": "strong"}, r"sfcm_guidance.*\[0, 1\].*'strong'"),
        ({"target_prompt": TARGET, "sfcm_guidance": 1.0, "sfcm_guidance_exponent": None}, "exponent.*positive.*None"),
        ({"target_prompt": TARGET, "sfcm_mode": ["paper"]}, "sfcm_mode.*averaged.*'paper'"),
        ({"return_sfcm": True, "prompt": "a"}, "no phrase"),
        ({"target_prompt": TARGET, "sfcm_mode": "best"}, "sfcm_mode.*averaged.*'best'"),
        ({"target_prompt": TARGET, "prompt": None, "prompt_embeds": torch.zeros(1, 77, 16)}, "prompt_embeds"),
        ({"return_sfcm": True, "prompt": None, "prompt_embeds": torch.zeros(1, 77, 16)}, "prompt_embeds"),
        ({"target_prompt": TARGET, "prompt": None}, "prompt"),
        (
            {"target_prompt": TARGET, "negative_prompt": "bad", "negative_prompt_embeds": torch.zeros(1, 77, 16)},
            "both",
        ),
        ({"compare": True, "prompt": None}, "prompt"),
        ({"target_prompt": TARGET, "prompt": []}, "`prompt` has to be"),
        ({"target_prompt": ""}, "empty"),
        ({"target_prompt": ("a hat", "a scarf")}, "'a hat' is not in the base prompt"),
        ({"target_prompt": ("a woman", "a man", "a boy")}, "a pair"),
        ({"target_prompt": [["a hat", "a scarf"]]}, "a pair"),
        ({"target_prompt": [("a hat", "a scarf", "a tie")]}, "a pair"),
        ({"target_prompt": [("a hat", "a scarf")]}, "'a hat' is not in the base prompt"),
        ({"target_prompt": "a woman"}, "already a phrase"),
        ({"target_prompt": "with very red hair " * 20}, "does not fit"),
        ({"target_prompt": TARGET, "prompt": "a hat, " * 3000}, "base prompt has 21000 characters, more than"),
        ({"return_sfcm": True, "prompt": "a hat, " * 3000}, "prompt has 21000 characters, more than"),
        ({"target_prompt": TARGET, "base_phrases": "a woman"}, "base_phrases"),
        ({"target_prompt": TARGET, "base_phrases": ["a dog"]}, "'a dog' is not in the base prompt"),
        ({"target_prompt": TARGET, "prompt": [BASE, OTHER], "base_phrases": ["a woman", "a man"]}, "2 prompts"),
        ({"target_prompt": TARGET, "prompt": [BASE, OTHER], "base_phrases": [["a woman"]]}, "2 prompts"),
        ({"target_prompt": TARGET, "compare": True, "return_dict": False}, "return_dict"),
        ({"target_prompt": TARGET, "return_sfcm": True, "return_dict": False}, "return_dict"),
        ({"target_prompt": TARGET, "compare": True, "latents": torch.zeros(2, 4, 8, 8)}, "latents.*2 rows but 1"),
        ({"target_prompt": TARGET, "compare": True, "seed": [1, 2]}, "generator.*2 rows but 1"),
        ({"target_prompt": TARGET, "compare": True, "return_sfcm": True, "height": 20, "width": 20}, "divisible by 8"),
    ],
)
def test_wrong_arguments_are_told_before_the_first_step(world, arguments, message):
    before = state(world.ours)
    alarm = world.ours.unet.register_forward_pre_hook(lambda *_: pytest.fail("a step was taken"))
    try:
        with pytest.raises(ValueError, match=message):
            draw(world.ours, **{"prompt": BASE, **arguments})
    finally:
        alarm.remove()
    assert state(world.ours) == before


@pytest.mark.parametrize("generator", [0, [torch.Generator(), 1]])
@pytest.mark.parametrize("arguments", [{}, {"target_prompt": TARGET, "compare": True}])
def test_a_seed_is_no_generator(world, generator, arguments):
    with pytest.raises(ValueError, match=r"^`generator` has to be a torch.Generator.*manual_seed\(seed\)"):
        world.ours(BASE, generator=generator, num_inference_steps=1, **arguments)


@pytest.mark.parametrize(
    ("prompt", "arguments", "words"),
    [
        ("a man, (a coat:1.2)", {}, ["'(a coat:1.2)' in a prompt is read as words"]),
        ("a man, <lora:a:1>", {"target_prompt": TARGET}, ["'<lora:a:1>' in a prompt is read as words"]),
        ("a man", {"target_prompt": "((a tie))"}, ["'((a tie))' in a prompt is read as words"]),
        ("a man, black hair", {"target_prompt": TARGET}, ["'black hair' in the prompt may contradict", repr(TARGET)]),
        ("a man, green hair", {"target_prompt": ("green hair", TARGET)}, None),
        ("a man, a hat", {"target_prompt": TARGET}, None),
    ],
)
def test_what_a_prompt_cannot_mean_is_said_once(world, caplog, prompt, arguments, words):
    for _ in range(2):
        draw(world.ours, prompt, num_inference_steps=1, **arguments)
    messages = [record.getMessage() for record in caplog.records if record.name == "pipeline_spf_portrait"]
    assert len(messages) == (0 if words is None else 1)
    assert all(word in message for message in messages for word in words)


def test_phrases_that_were_cut_off_are_not_encoded(world):
    prompt = ", ".join(f"{i} hats" for i in range(300))
    encoded = []
    hook = world.ours.text_encoder.register_forward_pre_hook(
        lambda _, args, kwargs: encoded.append(len(args[0] if args else kwargs["input_ids"])), with_kwargs=True
    )
    output = draw(world.ours, prompt, target_prompt=[("0 hats", TARGET)], return_sfcm=True, num_inference_steps=1)
    hook.remove()
    assert output.phrase_distances.shape == (1, 299) and max(encoded) < 40
    assert (output.phrase_distances[0, 40:].abs() < 1e-6).all() and (output.phrase_distances[0, :5] > 1e-6).all()


@pytest.mark.parametrize(
    "arguments", [{"compare": True}, {"return_sfcm": True}, {"compare": True, "return_sfcm": True}]
)
def test_an_error_during_the_run_leaves_nothing_behind(own_world, arguments):
    def fail(pipeline, step, timestep, tensors):
        raise RuntimeError("stop")

    own_world.ours.unet.disable_adapters()
    before = state(own_world.ours)
    with pytest.raises(RuntimeError, match="stop"):
        draw(own_world.ours, BASE, target_prompt=TARGET, callback_on_step_end=fail, **arguments)
    assert state(own_world.ours) == before


@pytest.mark.parametrize("argument", ["compare", "return_sfcm"])
def test_a_fused_lora_is_refused(own_world, argument):
    own_world.ours.fuse_lora()
    before = state(own_world.ours)
    with pytest.raises(ValueError, match="unfuse_lora"):
        draw(own_world.ours, BASE, target_prompt=TARGET, **{argument: True})
    assert state(own_world.ours) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_prompt": TARGET, "target_scale": 0.5}, "unfuse_lora"),
        ({"target_prompt": {"style": TARGET}}, "unfuse"),
    ],
)
def test_a_fused_lora_is_neither_scaled_nor_switched(own_world, arguments, message):
    own_world.ours.fuse_lora()
    before = state(own_world.ours)
    with pytest.raises(ValueError, match=message):
        draw(own_world.ours, BASE, **arguments)
    assert state(own_world.ours) == before


def test_a_strength_without_a_lora_is_refused(tokenizer):
    with pytest.raises(ValueError, match="none is loaded"):
        draw(World(tokenizer, lora=False).ours, BASE, target_scale=0.5)


def test_an_adapter_without_a_strength_is_not_scaled(tokenizer):
    world = World(tokenizer, lora=False)
    world.ours.unet.add_adapter(IA3Config(target_modules=["to_k", "to_v"], feedforward_modules=[]), "style")
    with pytest.raises(ValueError, match="no strength"):
        draw(world.ours, BASE, target_scale=0.5)


@pytest.mark.parametrize("arguments", [{"compare": True}, {"target_prompt": {"whole": TARGET}}])
def test_modules_that_were_trained_whole_are_refused(tokenizer, arguments):
    world = World(tokenizer, lora=False)
    world.ours.unet.add_adapter(lora_config(modules_to_save=["conv_out"]), "whole")
    before = state(world.ours)
    with pytest.raises(ValueError, match="modules_to_save"):
        draw(world.ours, BASE, **arguments)
    assert state(world.ours) == before


def test_maps_do_not_go_with_fused_projections_or_an_ip_adapter(own_world):
    own_world.ours.fuse_qkv_projections(vae=False)
    before = state(own_world.ours)
    with pytest.raises(ValueError, match="unfuse_qkv_projections"):
        draw(own_world.ours, BASE, target_prompt=TARGET, return_sfcm=True)
    assert state(own_world.ours) == before
    own_world.ours.unfuse_qkv_projections(vae=False)
    draw(own_world.ours, BASE, target_prompt=TARGET, return_sfcm=True)
    add_ip_adapter(own_world)
    with pytest.raises(ValueError, match="unload_ip_adapter"):
        draw(own_world.ours, BASE, return_sfcm=True, ip_adapter_image=PIL.Image.new("RGB", (8, 8)))


def test_sliced_attention_is_refused_for_the_map_alone(own_world):
    own_world.ours.enable_attention_slicing(1)
    before = state(own_world.ours)
    draw(own_world.ours, BASE, target_prompt=TARGET, compare=True)
    with pytest.raises(ValueError, match="disable_attention_slicing"):
        draw(own_world.ours, BASE, target_prompt=TARGET, return_sfcm=True)
    assert state(own_world.ours) == before


def test_textual_inversions_of_several_vectors_are_refused_for_the_map(own_world):
    own_world.ours.tokenizer = copy.deepcopy(own_world.ours.tokenizer)
    own_world.ours.text_encoder = copy.deepcopy(own_world.ours.text_encoder)
    own_world.ours.load_textual_inversion({"<dots>": torch.ones(2, 16)}, token="<dots>")
    prompt = "a woman, a <dots> jacket"
    draw(own_world.ours, prompt, target_prompt=TARGET, compare=True)
    with pytest.raises(ValueError, match="several vectors"):
        draw(own_world.ours, prompt, target_prompt=TARGET, return_sfcm=True)


# ---------------------------------------------------------------------------------------- the stock pipeline's ways


@pytest.mark.parametrize(
    "way", ["vae.enable_slicing", "vae.enable_tiling", "enable_attention_slicing", "enable_freeu"]
)
def test_the_stock_switches_keep_working(own_world, way):
    options = {"s1": 0.9, "s2": 0.2, "b1": 1.2, "b2": 1.4} if way == "enable_freeu" else {}
    if way == "enable_freeu":
        expected = World(own_world.ours.tokenizer)
        expected.stock.enable_freeu(**options)
        expected = draw(expected.stock, [FULL] * 2, seed=[0, 1])
    else:
        expected = draw(own_world.stock, [FULL] * 2, seed=[0, 1])
    attrgetter(way)(own_world.ours)(**options)
    output = draw(own_world.ours, [BASE] * 2, target_prompt=TARGET, compare=True, seed=[0, 1])
    assert_close(output.images, expected.images)


@pytest.mark.slow
@pytest.mark.parametrize("in_place", [True, False])
def test_a_compiled_unet(own_world, tmp_path, in_place):
    pipeline, lora = own_world.ours, lora_file(own_world, tmp_path)
    if in_place:
        pipeline.unet.compile(backend="eager")
    else:
        pipeline.unet = torch.compile(pipeline.unet, backend="eager")
    # As many rows as `compare` has of one image: the graph is the one that another call left.
    expected = draw(own_world.stock, [FULL, BASE], num_inference_steps=1).images
    assert_close(draw(pipeline, [FULL, BASE], num_inference_steps=1).images, expected)
    output = draw(pipeline, BASE, target_prompt=TARGET, compare=True, return_sfcm=True, num_inference_steps=1)
    assert_close(output.reference_images, draw(own_world.original, BASE, num_inference_steps=1).images)
    assert output.sfcm.max() == 1
    output = draw(pipeline, BASE, target_prompt=TARGET, compare=True, num_inference_steps=1)
    assert_close(output.reference_images, draw(own_world.original, BASE, num_inference_steps=1).images)
    assert_close(draw(pipeline, [FULL, BASE], num_inference_steps=1).images, expected)
    pipeline.load_lora_weights(lora, adapter_name="other")
    assert "other" in pipeline.unet.peft_config


def test_models_may_be_taken_off_the_device_after_use(own_world):
    expected = draw(own_world.ours, BASE, target_prompt=TARGET, compare=True, return_sfcm=True, sfcm_guidance=0.5)
    visits, hook = [], None
    # What `enable_model_cpu_offload` installs, whose own check asks for a GPU.
    for name in ("text_encoder", "unet", "vae"):
        model = getattr(own_world.ours, name)
        _, hook = cpu_offload_with_hook(model, torch.device("cpu"), prev_module_hook=hook)
        model.register_forward_pre_hook(lambda *_, name=name: visits.append(name))
    output = draw(own_world.ours, BASE, target_prompt=TARGET, compare=True, return_sfcm=True, sfcm_guidance=0.5)
    assert_close(output.images, expected.images)
    assert_close(output.reference_images, expected.reference_images)
    assert visits == sorted(visits, key=["text_encoder", "unet", "vae"].index), "a model was called back"


def test_a_real_safety_checker_blackens_both_halves(own_world):
    config = CLIPConfig(
        vision_config={
            "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 8, "patch_size": 4,
        },
        projection_dim=6,
    )  # fmt: skip
    torch.manual_seed(0)
    checker = StableDiffusionSafetyChecker(config).eval()
    with torch.no_grad():
        checker.concept_embeds_weights.fill_(-2.0)  # every picture is near enough
    parts = {"safety_checker": checker, "feature_extractor": CLIPImageProcessorPil(size=8, crop_size=8)}
    own_world.ours.register_modules(**parts)
    own_world.stock.register_modules(**parts)
    output = draw(own_world.ours, BASE, target_prompt=TARGET, compare=True)
    assert output.nsfw_content_detected == draw(own_world.stock, FULL).nsfw_content_detected == [True]
    assert output.images.max() == output.reference_images.max() == 0


def test_from_pipe_takes_a_plain_pipeline_with_its_lora(world):
    ours = SPFPortraitPipeline.from_pipe(world.stock)
    ours.set_progress_bar_config(disable=True)
    assert ours.unet is world.stock.unet
    output = draw(ours, BASE, target_prompt=TARGET, compare=True)
    assert_close(output.images, draw(world.stock, FULL).images)
    assert_close(output.reference_images, draw(world.original, BASE).images)
    back = StableDiffusionPipeline.from_pipe(ours)
    back.set_progress_bar_config(disable=True)
    assert_equal(draw(back, BASE).images, draw(world.stock, BASE).images)


def test_what_it_saves_is_a_stock_pipeline(own_world, tmp_path):
    expected = draw(own_world.stock, BASE).images
    own_world.ours.fuse_lora()
    own_world.ours.unload_lora_weights()
    own_world.ours.vae.to(torch.bfloat16)
    own_world.ours.save_pretrained(tmp_path)
    assert own_world.ours.vae.dtype == torch.bfloat16
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is StableDiffusionPipeline
    assert_close(draw(loaded, BASE).images, expected, 0.02)


def test_nothing_is_saved_under_a_loras_names(own_world, tmp_path):
    with pytest.raises(ValueError, match="unload_lora_weights"):
        own_world.ours.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def lora_file(world, folder, change=None, **kwargs):
    """The world's LoRA as a file, its layers changed."""
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(world.ours.unet, adapter_name="style"))
    layers = change(layers) if change else layers
    config = {"r": 2, "lora_alpha": 8, "target_modules": ATTENTION}
    StableDiffusionPipeline.save_lora_weights(folder, layers, unet_lora_adapter_metadata=config, **kwargs)
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda layers: {key: value.repeat(1, 2) if "lora.down" in key else value for key, value in layers.items()},
            "has",
        ),
        (
            lambda layers: {key: value.repeat(2, 1) if "lora.up" in key else value for key, value in layers.items()},
            "features",
        ),
        (lambda layers: {f"other.{key}": value for key, value in layers.items()}, "there is no layer unet.other"),
    ],
)
def test_a_lora_for_another_architecture_is_refused_whole(tokenizer, world, tmp_path, change, message):
    folder, bare = lora_file(world, tmp_path / "lora", change), World(tokenizer, lora=False)
    before = state(bare.ours)
    with pytest.raises(ValueError, match=rf"(?s)lora: is for another architecture.*{message}.*trained on"):
        bare.ours.load_lora_weights(folder)
    assert state(bare.ours) == before and not getattr(bare.ours.unet, "peft_config", {})
    bare.ours.load_lora_weights(lora_file(world, tmp_path / "fits"))
    assert_close(draw(bare.ours, BASE).images, draw(world.stock, BASE).images)


@pytest.mark.parametrize(
    "change",
    [
        lambda layers: {key: value for key, value in layers.items() if "mid_block" not in key or "down" in key},
        lambda layers: {key: value[:1] if "lora.down" in key else value for key, value in layers.items()},
    ],
)
def test_a_lora_whose_matrices_do_not_belong_together_is_refused(tokenizer, world, tmp_path, change):
    bare = World(tokenizer, lora=False)
    with pytest.raises(ValueError, match=r"(?s)lora: layer 'unet\..*attn.* has (no lora_up|the ranks)"):
        bare.ours.load_lora_weights(lora_file(world, tmp_path / "lora", lambda layers: contiguous(change(layers))))
    assert not getattr(bare.ours.unet, "peft_config", {})


def contiguous(layers):
    return {key: value.contiguous() for key, value in layers.items()}


@pytest.mark.parametrize("ours", [False, True], ids=["stock", "ours"])
def test_a_lora_of_the_unet_alone_loads_without_an_alarm(tokenizer, world, tmp_path, monkeypatch, ours):
    """diffusers warns that no part is for the text encoder and asks to open an issue."""
    bare, said = World(tokenizer, lora=False), []
    speaker = logging.getLogger("diffusers.loaders.lora_base")
    filters = list(speaker.filters)
    monkeypatch.setattr(speaker, "handle", lambda record: said.append(record) if speaker.filter(record) else None)
    (bare.ours if ours else bare.stock).load_lora_weights(lora_file(world, tmp_path / "lora"))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        (bare.ours if ours else bare.stock).load_lora_weights(tmp_path / "lora", adapter_name="second")
    assert any("No LoRA keys" in record.getMessage() for record in said) != ours
    assert any("peft_config" in str(warning.message) for warning in warned) != ours
    assert speaker.filters == filters


def test_a_layer_with_packed_weights_has_its_features(tokenizer, world, tmp_path):
    bare = World(tokenizer, lora=False)
    for layer in bare.ours.unet.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight = torch.nn.Parameter(layer.weight.reshape(-1, 1))  # as 4-bit weights lie
    bare.ours.load_lora_weights(lora_file(world, tmp_path / "lora"))
    assert bare.ours.unet.peft_config


# ---------------------------------------------------------------------------------------------------------- loading

SCRIPT = """
import json, sys, torch
from diffusers import DiffusionPipeline

folder, lora, code = sys.argv[1:]
code = {{"custom_pipeline": code}} if code else {{}}
pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **code)
pipe.load_lora_weights(lora)
pipe.set_progress_bar_config(disable=True)
output = pipe(
    {base!r}, target_prompt={target!r}, compare=True, return_sfcm=True, num_inference_steps=2, output_type="np",
    guidance_scale=5.0, generator=torch.Generator().manual_seed(0),
)
pipe.visualize(output).save("where.png")
print(json.dumps([type(pipe).__name__, output.images.tolist(), output.reference_images.tolist()]))
print(output.sfcm.shape, "attention_processors" in sys.modules)
"""


@pytest.mark.parametrize("form", ["file", "directory", "model folder"])
def test_loads_as_custom_pipeline_in_a_fresh_process(world, tmp_path, form):
    model, code = tmp_path / "model", ROOT / "pipeline_spf_portrait.py"
    world.original.save_pretrained(model)
    if form == "directory":  # as it lies in a repository of the Hub
        code = tmp_path / "code"
        code.mkdir()
        for name, path in PIPELINE_CODE.items():
            shutil.copy(path, code / name)
    if form == "model folder":  # whose own index names the class
        for path in PIPELINE_CODE.values():
            shutil.copy(path, model)
        index = json.loads((model / "model_index.json").read_text(encoding="utf-8"))
        index["_class_name"] = ["pipeline_spf_portrait", "SPFPortraitPipeline"]
        (model / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
        code = ""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    script = elsewhere / "draw.py"
    script.write_text(SCRIPT.format(base=BASE, target=TARGET), encoding="utf-8")
    run = subprocess.run(
        [sys.executable, script, model, lora_file(world, tmp_path / "lora"), code],
        cwd=elsewhere,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "not found in your environment" not in run.stderr, "the loader asks for our own modules"
    result, more = run.stdout.strip().splitlines()[-2:]
    name, images, references = json.loads(result)
    assert name == "SPFPortraitPipeline"
    assert_close(np.array(images), draw(world.stock, FULL).images)
    assert_close(np.array(references), draw(world.original, BASE).images)
    # The siblings came with the pipeline; nothing was found on the path by chance.
    assert more == "torch.Size([1, 1, 8, 8]) False"
    assert PIL.Image.open(elsewhere / "where.png").width == 4 * 198 + 6
