"""Tests of `spf_call.py`: the references beside the portraits, the adapters of a call, and the picture of it."""

import numpy as np
import pytest
import torch
from diffusers import (
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)
from diffusers.callbacks import SDCFGCutoffCallback
from peft import IA3Config
from pipeline_world import (
    BASE,
    FULL,
    OTHER,
    TARGET,
    World,
    add_text_encoder_lora,
    assert_close,
    assert_equal,
    draw,
    lora_config,
    state,
)

from pictures import captioned_pictures, overlay_heat_map
from pipeline_spf_portrait import SPFPortraitPipelineOutput


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


@pytest.mark.parametrize("seed", [0, [3, 4]])
def test_compare_equals_two_runs_and_leaves_nothing_behind(world, seed):
    before = state(world.ours)
    arguments = {"num_images_per_prompt": 2, "seed": seed, "eta": 1.0, "num_inference_steps": 2}
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


def test_compare_works_without_any_lora(bare_world):
    world = bare_world
    output = draw(world.ours, BASE, compare=True, output_type="pil")
    assert len(output.images) == len(output.reference_images) == 1
    assert_equal(output.images, output.reference_images)
    output = draw(world.ours, BASE, target_prompt=TARGET, compare=True)
    assert_close(output.images, draw(world.original, FULL).images)
    assert_close(output.reference_images, draw(world.original, BASE).images)


@pytest.fixture(scope="module")
def schedulers_world(tokenizer):
    return World(tokenizer)


@pytest.mark.parametrize(
    "scheduler",
    [
        EulerAncestralDiscreteScheduler(steps_offset=1),  # draws noise at each step
        PNDMScheduler(steps_offset=1, skip_prk_steps=True),  # one more call of the UNet than steps
        HeunDiscreteScheduler(steps_offset=1),  # two calls of the UNet per step
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_compare_with_other_schedulers(schedulers_world, scheduler):
    world = schedulers_world
    world.use_scheduler(scheduler)
    output = draw(world.ours, BASE, target_prompt=TARGET, compare=True, num_inference_steps=3)
    assert_close(output.images, draw(world.stock, FULL, num_inference_steps=3).images)
    assert_close(output.reference_images, draw(world.original, BASE, num_inference_steps=3).images)


def test_compare_without_generator_gives_both_halves_the_same_noise(bare_world):
    world = bare_world
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


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_visualize_shows_everything_with_its_words(world, output_type, monkeypatch):
    shown = {}

    def remember(pictures, captions, columns):
        shown.update(captions=list(captions), pictures=list(pictures))
        return captioned_pictures(pictures, captions, columns)

    monkeypatch.setattr("pictures.captioned_pictures", remember)
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
