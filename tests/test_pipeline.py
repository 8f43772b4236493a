"""Tests of `pipeline_spf_portrait.py`, on tiny random components of the real classes."""

import copy
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from test_prompts import BASE, write_vocabulary
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from attention_processors import capture_cross_attention, phrase_map_resolution
from pipeline_spf_portrait import SPFPortraitPipeline, SPFPortraitPipelineOutput, overlay_heat_map
from prompts import make_prompt_pair, phrase_mask, tokenize_prompt_pair
from sfcm import SFCM_MODES, noise_difference, phrase_attention_maps


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
        ("compare", False),
        ("return_sfcm", False),
        ("sfcm_mode", "averaged"),
    ]


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_without_our_arguments_the_images_are_the_stock_ones_to_the_bit(tokenizer, lora, output_type):
    world = World(tokenizer, lora=lora)
    ours = draw(world.ours, BASE, output_type=output_type)
    assert type(ours).__name__ == "StableDiffusionPipelineOutput"
    assert_equal(ours.images, draw(world.stock, BASE, output_type=output_type).images)


@pytest.mark.parametrize(
    "arguments",
    [
        {"prompt": [BASE, OTHER], "negative_prompt": ["bad", "ugly"]},
        {"prompt": BASE, "negative_prompt": "bad", "num_images_per_prompt": 2},
        {"prompt": BASE, "guidance_scale": 1.0},
        {"prompt": BASE, "eta": 1.0, "height": 24, "width": 16, "guidance_rescale": 0.5},
        {"prompt": BASE, "cross_attention_kwargs": {"scale": 0.5}, "return_dict": False},
        {"prompt_embeds": torch.ones(1, 77, 16), "negative_prompt_embeds": torch.zeros(1, 77, 16)},
        {"prompt": BASE, "latents": torch.ones(1, 4, 8, 8), "clip_skip": None, "callback_steps": 1},
    ],
)
def test_stock_arguments_are_passed_on(world, arguments):
    ours, stock = draw(world.ours, **arguments), draw(world.stock, **arguments)
    assert_equal(ours[0], stock[0])


def test_target_alone_is_the_stock_call_with_the_full_prompt(world):
    assert_equal(draw(world.ours, BASE, target_prompt=TARGET).images, draw(world.stock, FULL).images)
    replaced = draw(world.ours, BASE, target_prompt=[("a green jacket", "a red hat"), TARGET], negative_prompt="bad")
    full = f"a woman, a red hat, a purple background, {TARGET}"
    assert_equal(replaced.images, draw(world.stock, full, negative_prompt="bad").images)
    several = draw(world.ours, [BASE, OTHER], target_prompt=TARGET, return_dict=False)
    assert_equal(several[0], draw(world.stock, [FULL, f"{OTHER}, {TARGET}"]).images)
    assert np.abs(replaced.images - draw(world.stock, BASE, negative_prompt="bad").images).max() > 1e-3


# ---------------------------------------------------------------------------------------------------------- compare


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"guidance_scale": 1.0},
        {"negative_prompt": "bad", "guidance_rescale": 0.5},
        {"num_images_per_prompt": 2, "eta": 1.0},
        {"num_images_per_prompt": 2, "eta": 1.0, "seed": [3, 4]},
        {"eta": 1.0, "guidance_scale": 1.0, "height": 24, "width": 16},
        {"latents": torch.linspace(-1, 1, 256).reshape(1, 4, 8, 8)},
        {"negative_prompt_embeds": torch.ones(1, 77, 16)},
        {"cross_attention_kwargs": {"scale": 0.5}},
    ],
)
def test_compare_equals_two_runs(world, arguments):
    before = state(world.ours)
    output = draw(world.ours, BASE, target_prompt=TARGET, compare=True, **arguments)
    assert isinstance(output, SPFPortraitPipelineOutput)
    assert output.sfcm is None and output.phrases is None
    assert_close(output.images, draw(world.ours, BASE, target_prompt=TARGET, **arguments).images)
    arguments.pop("cross_attention_kwargs", None)  # the original pipeline has no LoRA to scale
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
            differences.append(noise_difference(response, reference))
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
@pytest.mark.parametrize("sfcm_mode", ["averaged", "paper"])
def test_sfcm_is_that_of_separate_calls_on_the_responses_own_latents(world, sfcm_mode, compare, guidance_scale):
    check_sfcm(world, sfcm_mode, compare, guidance_scale)


def test_sfcm_is_against_the_original_text_encoder(own_world):
    add_text_encoder_lora(own_world)
    check_sfcm(own_world, "averaged", compare=False, guidance_scale=5.0)


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


# ----------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"return_sfcm": True}, "target_prompt"),
        ({"base_phrases": ["a woman"]}, "target_prompt"),
        ({"target_prompt": TARGET, "sfcm_mode": "best"}, "sfcm_mode.*averaged.*'best'"),
        ({"target_prompt": TARGET, "prompt": None, "prompt_embeds": torch.zeros(1, 77, 16)}, "prompt_embeds"),
        ({"compare": True, "prompt": None, "prompt_embeds": torch.zeros(1, 77, 16)}, "prompt_embeds"),
        ({"target_prompt": TARGET, "prompt": None}, "`prompt` has to be"),
        ({"target_prompt": TARGET, "prompt": []}, "`prompt` has to be"),
        ({"target_prompt": ""}, "empty"),
        ({"target_prompt": ("a hat", "a scarf")}, "list of strings"),
        ({"target_prompt": [["a hat", "a scarf"]]}, "list of strings"),
        ({"target_prompt": [("a hat", "a scarf", "a tie")]}, "list of strings"),
        ({"target_prompt": [("a hat", "a scarf")]}, "'a hat' is not in the base prompt"),
        ({"target_prompt": "a woman"}, "already a phrase"),
        ({"target_prompt": "with very red hair " * 20}, "does not fit"),
        ({"target_prompt": TARGET, "base_phrases": "a woman"}, "base_phrases"),
        ({"target_prompt": TARGET, "base_phrases": ["a dog"]}, "'a dog' is not in the base prompt"),
        ({"target_prompt": TARGET, "prompt": [BASE, OTHER], "base_phrases": ["a woman", "a man"]}, "2 prompts"),
        ({"target_prompt": TARGET, "prompt": [BASE, OTHER], "base_phrases": [["a woman"]]}, "2 prompts"),
        ({"target_prompt": TARGET, "compare": True, "return_dict": False}, "return_dict"),
        ({"target_prompt": TARGET, "return_sfcm": True, "return_dict": False}, "return_dict"),
        ({"target_prompt": TARGET, "compare": True, "ip_adapter_image": PIL.Image.new("RGB", (8, 8))}, "IP-Adapter"),
        ({"target_prompt": TARGET, "return_sfcm": True, "ip_adapter_image_embeds": [torch.zeros(1, 1, 4)]}, "unsupp"),
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


# ---------------------------------------------------------------------------------------------------------- loading

SCRIPT = """
import json, sys, torch
from diffusers import DiffusionPipeline

folder, lora, code = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=code, trust_remote_code=True)
pipe.load_lora_weights(lora)
pipe.set_progress_bar_config(disable=True)
output = pipe(
    {base!r}, target_prompt={target!r}, compare=True, return_sfcm=True, num_inference_steps=2, output_type="np",
    guidance_scale=5.0, generator=torch.Generator().manual_seed(0),
)
print(json.dumps([type(pipe).__name__, output.images.tolist(), output.reference_images.tolist()]))
print(output.sfcm.shape, "attention_processors" in sys.modules)
"""


def test_loads_as_custom_pipeline_in_a_fresh_process(world, tmp_path):
    world.original.save_pretrained(tmp_path / "model")
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(world.ours.unet, adapter_name="style"))
    config = {"r": 2, "lora_alpha": 8, "target_modules": ATTENTION}
    StableDiffusionPipeline.save_lora_weights(tmp_path / "lora", layers, unet_lora_adapter_metadata=config)
    (tmp_path / "elsewhere").mkdir()
    script = tmp_path / "elsewhere" / "draw.py"
    script.write_text(SCRIPT.format(base=BASE, target=TARGET), encoding="utf-8")
    run = subprocess.run(
        [sys.executable, script, tmp_path / "model", tmp_path / "lora", ROOT / "pipeline_spf_portrait.py"],
        cwd=tmp_path / "elsewhere",
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


# --------------------------------------------------------------------------------------------------------- heat map


def test_overlay_is_brighter_where_the_map_is_higher():
    image = PIL.Image.new("RGB", (20, 12), (200, 30, 30))
    overlay = overlay_heat_map(image, torch.tensor([[0.0, 1.0]]))
    assert overlay.size == (20, 12) and overlay.mode == "RGB"
    luma = np.asarray(overlay.convert("L"), dtype=int)
    assert (np.diff(luma, axis=1) >= 0).all() and luma[0, -1] - luma[0, 0] > 100
    assert_equal(np.asarray(overlay), np.asarray(overlay_heat_map(image, np.array([[0.0, 1.0]]))))
    # The image is greyed: its colour does not matter where its brightness is the same.
    grey = image.convert("L").convert("RGB")
    assert_equal(
        np.asarray(overlay_heat_map(image, torch.zeros(2, 2))), np.asarray(overlay_heat_map(grey, np.zeros((2, 2))))
    )
    plain = overlay_heat_map(image, torch.zeros(3, 3), opacity=0.0)
    assert_equal(np.asarray(plain), np.asarray(grey))


@pytest.mark.parametrize("heat_map", [torch.zeros(1, 4, 4), torch.full((4, 4), 1.1), torch.full((4, 4), float("nan"))])
def test_overlay_refuses_what_is_no_map(heat_map):
    with pytest.raises(ValueError, match="heat_map"):
        overlay_heat_map(PIL.Image.new("RGB", (8, 8)), heat_map)
