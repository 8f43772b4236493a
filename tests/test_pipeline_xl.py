"""Tests of `pipeline_spf_portrait_xl.py`: the stock call, and what both families share, on tiny random components."""

import inspect
import re

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.callbacks import SDXLCFGCutoffCallback
from diffusers.utils import convert_state_dict_to_diffusers
from peft import get_peft_model_state_dict
from pipeline_world import (
    BASE,
    FULL,
    OTHER,
    PHRASES,
    TARGET,
    XLWorld,
    add_ip_adapter,
    add_text_encoder_lora,
    assert_close,
    assert_equal,
    draw,
    lora_config,
    lora_file,
    make_components,
    make_xl_components,
    state,
)
from test_spf_observer import (
    GATED_SCHEDULERS,
    GUIDANCES,
    check_guidance,
    check_sfcm,
    check_that_references_part_when_the_gate_opens,
)
from toy_bases import write_random_lora

from pipeline_spf_portrait import SPFPortraitPipeline
from pipeline_spf_portrait_xl import SPFPortraitXLPipeline
from toy_portraits.pipelines import load_base


def rescale_latents(pipeline, step, timestep, tensors):
    return {"latents": tensors["latents"] * 0.9}


ONES = {"prompt_embeds": torch.ones(1, 77, 28), "pooled_prompt_embeds": torch.ones(1, 10)}
NEGATIVE_ONES = {f"negative_{name}": tensor for name, tensor in ONES.items()}
# A call for each argument of the stock pipeline, which means something there and differs from its default.
STOCK_ARGUMENTS = {
    "prompt": {"prompt": [BASE, OTHER]},
    "prompt_2": {"prompt_2": OTHER},
    "height": {"height": 24, "width": 16},
    "width": {"width": 24},
    "num_inference_steps": {"num_inference_steps": 3},
    "timesteps": {"timesteps": [900, 300]},
    "sigmas": {"sigmas": [10.0, 1.0]},
    "denoising_end": {"num_inference_steps": 4, "denoising_end": 0.5},
    "guidance_scale": {"guidance_scale": 1.0},
    "negative_prompt": {"negative_prompt": "bad"},
    "negative_prompt_2": {"negative_prompt": "bad", "negative_prompt_2": "ugly"},
    "num_images_per_prompt": {"num_images_per_prompt": 2},
    "eta": {"eta": 1.0, "seed": [5]},
    "generator": {"num_images_per_prompt": 2, "seed": [3, 4]},
    "latents": {"latents": torch.linspace(-1, 1, 256).reshape(1, 4, 8, 8)},
    "prompt_embeds": {"prompt": None, **ONES},
    "negative_prompt_embeds": NEGATIVE_ONES,
    "pooled_prompt_embeds": {"prompt": None, **ONES, "pooled_prompt_embeds": torch.zeros(1, 10)},
    "negative_pooled_prompt_embeds": {**NEGATIVE_ONES, "negative_pooled_prompt_embeds": torch.zeros(1, 10)},
    "ip_adapter_image": {"ip_adapter_image": PIL.Image.new("RGB", (8, 8), (255, 0, 0))},
    "ip_adapter_image_embeds": {"ip_adapter_image_embeds": [torch.ones(2, 1, 6)]},
    "output_type": {"output_type": "pt"},
    "return_dict": {"return_dict": False},
    "cross_attention_kwargs": {"cross_attention_kwargs": {"scale": 0.5}},
    "guidance_rescale": {"guidance_rescale": 0.5},
    "original_size": {"original_size": (64, 48)},
    "crops_coords_top_left": {"crops_coords_top_left": (3, 5)},
    "target_size": {"target_size": (64, 48)},
    "negative_original_size": {"negative_original_size": (4, 4), "negative_target_size": (64, 64)},
    "negative_crops_coords_top_left": {
        "negative_original_size": (16, 16), "negative_target_size": (16, 16), "negative_crops_coords_top_left": (9, 9),
    },
    "negative_target_size": {"negative_original_size": (16, 16), "negative_target_size": (64, 64)},
    "clip_skip": {"clip_skip": 1},
    "callback_on_step_end": {"callback_on_step_end": rescale_latents},
    "callback_on_step_end_tensor_inputs": {
        "callback_on_step_end": rescale_latents,
        "callback_on_step_end_tensor_inputs": ["latents", "add_time_ids"],
    },
    "kwargs": {"callback": print, "callback_steps": 1},
}  # fmt: skip
# Those that change neither the numbers of the image nor its shape, and those that change its shape.
SAME = {"generator", "output_type", "return_dict", "kwargs", "ip_adapter_image", "ip_adapter_image_embeds"}
OTHER_SHAPE = {"prompt", "height", "width", "num_images_per_prompt"}
# Only some schedulers take them.
SCHEDULERS = {
    "timesteps": DDPMScheduler(beta_schedule="scaled_linear", clip_sample=False, variance_type="fixed_small"),
    "sigmas": EulerDiscreteScheduler(steps_offset=1),
}


@pytest.fixture(scope="module")
def worlds(tokenizer, xl_world):
    """By stock argument the world that a call with it needs. No test may change them."""
    found = dict.fromkeys(STOCK_ARGUMENTS, xl_world)
    for name, scheduler in SCHEDULERS.items():
        found[name] = XLWorld(tokenizer)
        found[name].use_scheduler(scheduler)
    found["ip_adapter_image"] = found["ip_adapter_image_embeds"] = XLWorld(tokenizer)
    add_ip_adapter(found["ip_adapter_image"])
    return found


@pytest.fixture(scope="module")
def text_xl_world(tokenizer):
    """With a LoRA in both text encoders too. No test may change it."""
    world = XLWorld(tokenizer)
    add_text_encoder_lora(world)
    return world


def test_the_signature_is_the_stock_one_and_then_that_of_every_family():
    stock = list(inspect.signature(StableDiffusionXLPipeline.__call__).parameters.values())
    ours = list(inspect.signature(SPFPortraitXLPipeline.__call__).parameters.values())
    others = list(inspect.signature(SPFPortraitPipeline.__call__).parameters.values())
    assert [(p.name, p.default, p.kind) for p in ours] == [
        (p.name, p.default, p.kind) for p in [*stock[:-1], *others[-12:]]
    ]
    assert {p.name for p in stock} - {"self"} == set(STOCK_ARGUMENTS)


# ------------------------------------------------------------------------------------------------- the stock call


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_without_our_arguments_the_images_are_the_stock_ones_to_the_bit(xl_world, bare_xl_world, output_type):
    for own in (xl_world, bare_xl_world):
        ours = draw(own.ours, BASE, output_type=output_type, num_inference_steps=2)
        assert type(ours).__name__ == "StableDiffusionXLPipelineOutput"
        assert_equal(ours.images, draw(own.stock, BASE, output_type=output_type, num_inference_steps=2).images)


@pytest.mark.parametrize("name", list(STOCK_ARGUMENTS))
def test_every_stock_argument_is_passed_on_to_the_bit(worlds, name):
    world, arguments = worlds[name], {"prompt": BASE, **STOCK_ARGUMENTS[name]}
    ours = draw(world.ours, **arguments)[0]
    assert_equal(ours, draw(world.stock, **arguments)[0])
    if name in OTHER_SHAPE:
        assert ours.shape != draw(world.stock, BASE)[0].shape
    elif name not in SAME:
        assert np.abs(ours - draw(world.stock, BASE)[0]).max() > 1e-4


@pytest.mark.parametrize("name", [name for name in STOCK_ARGUMENTS if name not in ("return_dict", "kwargs")])
def test_every_stock_argument_goes_with_compare(worlds, name):
    world, arguments = worlds[name], {"prompt": BASE, **STOCK_ARGUMENTS[name]}
    target, full = {}, {}
    if arguments["prompt"] is not None and name != "prompt_2":
        target = {"target_prompt": TARGET}
        full = {"prompt": FULL if arguments["prompt"] == BASE else [FULL, f"{OTHER}, {TARGET}"]}
    output = draw(world.ours, compare=True, **arguments, **target)
    assert_close(output.images, draw(world.stock, **arguments | full)[0])
    arguments.pop("cross_attention_kwargs", None)  # the original pipeline has no LoRA to scale
    assert_close(output.reference_images, draw(world.original, **arguments)[0])
    assert np.abs(np.asarray(output.images) - np.asarray(output.reference_images)).max() > 1e-4


def test_target_alone_is_the_stock_call_with_the_full_prompt(xl_world):
    for prompt_2 in (None, BASE, [BASE], ""):
        output = draw(xl_world.ours, BASE, target_prompt=TARGET, prompt_2=prompt_2)
        assert_equal(output.images, draw(xl_world.stock, FULL).images)
    pair = draw(xl_world.ours, [BASE], target_prompt=("a green jacket", "a red hat"), prompt_2=BASE)
    assert_equal(pair.images, draw(xl_world.stock, ["a woman, a red hat, a purple background"]).images)


# ------------------------------------------------------------------------------------- rows beside those of a call


@pytest.mark.parametrize("force_zeros", [True, False])
def test_nothing_asked_is_what_the_pipeline_says(tokenizer, force_zeros):
    """Zeros for all of the negative prompt, or the words of an empty one."""
    world = XLWorld(tokenizer)
    for pipeline in (world.ours, world.stock, world.original):
        pipeline.register_to_config(force_zeros_for_empty_prompt=force_zeros)
    images = []
    for negative in (None, ""):
        output = draw(world.ours, BASE, target_prompt=TARGET, compare=True, negative_prompt=negative)
        assert_close(output.images, draw(world.stock, FULL, negative_prompt=negative).images)
        assert_close(output.reference_images, draw(world.original, BASE, negative_prompt=negative).images)
        images.append(output.images)
    assert (np.abs(images[0] - images[1]).max() > 1e-4) == force_zeros


def test_a_lora_on_cross_attention_is_not_at_work_where_nothing_is_asked(toy_xl, tmp_path):
    """Zeros have neither keys nor values; words of a negative prompt have."""
    pipeline = load_base("sdxl")
    pipeline.load_lora_weights(write_random_lora(tmp_path, base="sdxl"))
    for negative, same in ((None, True), ("a man", False)):
        images = [
            draw(pipeline, "a woman", negative_prompt=negative, adapter_in_unconditional=within).images
            for within in (True, False)
        ]
        assert (np.abs(images[0] - images[1]).max() < 1e-5) == same


def test_compare_equals_two_runs_and_leaves_nothing_behind(text_xl_world):
    world, before = text_xl_world, state(text_xl_world.ours)
    arguments = {"num_images_per_prompt": 2, "seed": [3, 4], "eta": 1.0, "num_inference_steps": 2}
    arguments["negative_prompt"] = ["bad", "ugly"]
    arguments["seed"] = [3, 4, 5, 6]
    output = draw(world.ours, [BASE, OTHER], target_prompt=TARGET, compare=True, return_sfcm=True, **arguments)
    assert_close(output.images, draw(world.stock, [FULL, f"{OTHER}, {TARGET}"], **arguments).images)
    assert_close(output.reference_images, draw(world.original, [BASE, OTHER], **arguments).images)
    assert np.abs(output.images - output.reference_images).max() > 1e-3
    assert output.nsfw_content_detected is None
    assert state(world.ours) == before


def test_the_pooled_prompt_tells_the_reference_from_the_portrait_too(text_xl_world):
    """Cross-attention is not the only way from a text to the UNet."""
    world, told = text_xl_world, []

    def remember(unet, args, kwargs):
        told.append((kwargs["encoder_hidden_states"], kwargs["added_cond_kwargs"]["text_embeds"]))

    hook = world.ours.unet.register_forward_pre_hook(remember, with_kwargs=True)
    draw(world.ours, BASE, target_prompt=TARGET, compare=True, return_sfcm=True)
    hook.remove()
    for rows, index in zip(told[0], (0, 2)):
        assert len(rows) == 4
        assert_close(rows[2], world.stock.encode_prompt(FULL, device="cpu")[index][0].detach())
        assert_close(rows[3], world.original.encode_prompt(BASE, device="cpu")[index][0].detach())


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, EulerAncestralDiscreteScheduler])
def test_the_published_models_scheduler(tokenizer, scheduler):
    world = XLWorld(tokenizer)
    world.use_scheduler(scheduler(beta_schedule="scaled_linear", steps_offset=1))  # it scales the UNet's input
    arguments = {"num_inference_steps": 3, "target_prompt": TARGET, "compare": True, "return_sfcm": True}
    output = draw(world.ours, BASE, **arguments)
    assert_close(output.images, draw(world.stock, FULL, num_inference_steps=3).images)
    assert_close(output.reference_images, draw(world.original, BASE, num_inference_steps=3).images)
    assert output.sfcm.max() == 1


def test_a_guidance_embedding_is_extended_too(tokenizer):
    world = XLWorld(tokenizer, time_cond_proj_dim=8)
    output = draw(world.ours, BASE, target_prompt=TARGET, return_sfcm=True, compare=True)
    assert_close(output.images, draw(world.stock, FULL).images)
    assert_close(output.reference_images, draw(world.original, BASE).images)


NEGATIVE_SIZES = {"negative_original_size": (4, 4), "negative_target_size": (64, 64)}


@pytest.mark.parametrize("arguments", [{"compare": True}, {"return_sfcm": True}, {"adapter_in_unconditional": False}])
def test_negative_sizes_are_those_of_the_negative_rows(xl_world, arguments):
    """The stock call mixes up the rows of several images, and has those of one image right."""
    call = {"negative_prompt": "bad", **NEGATIVE_SIZES}
    stock = draw(xl_world.stock, [FULL] * 2, **call | {"negative_prompt": ["bad"] * 2}, seed=[1, 2]).images
    output = draw(xl_world.ours, BASE, target_prompt=TARGET, num_images_per_prompt=2, **call, **arguments, seed=[1, 2])
    for image, seed in enumerate((1, 2)):
        alone = draw(xl_world.ours, BASE, target_prompt=TARGET, **call, **arguments, seed=seed)
        assert_close(output.images[image : image + 1], alone.images)
        if "adapter_in_unconditional" not in arguments:
            assert_close(alone.images, draw(xl_world.stock, FULL, **call, seed=seed).images)
    if "adapter_in_unconditional" not in arguments:
        assert np.abs(stock - output.images).max() > 1e-3, "the stock call is mended: leave its sizes as they are"


def test_diffusers_own_callback_may_end_guidance_beside_other_rows(xl_world):
    # It keeps the last row of what the UNet is told, which is enough for one image.
    arguments = {"callback_on_step_end": SDXLCFGCutoffCallback(cutoff_step_ratio=0.0), "num_inference_steps": 3}
    for sizes in ({}, NEGATIVE_SIZES):
        stock = draw(xl_world.stock, FULL, **arguments, **sizes).images
        original = draw(xl_world.original, BASE, **arguments, **sizes).images
        for return_sfcm in (False, True):
            call = {"target_prompt": TARGET, "compare": True, "return_sfcm": return_sfcm}
            output = draw(xl_world.ours, BASE, **call, **arguments, **sizes)
            assert_close(output.images, stock)
            assert_close(output.reference_images, original)


def test_guidance_may_end_by_a_callback_of_the_users_own(xl_world):
    def end_guidance(pipeline, step, timestep, tensors):
        pipeline._guidance_scale = 0.0
        return {name: tensor.chunk(2)[1] for name, tensor in tensors.items()} if step == 0 else {}

    arguments = {"callback_on_step_end": end_guidance, "num_inference_steps": 2}
    arguments["callback_on_step_end_tensor_inputs"] = ["prompt_embeds", "add_text_embeds", "add_time_ids"]
    for sizes in ({}, NEGATIVE_SIZES):
        output = draw(xl_world.ours, BASE, target_prompt=TARGET, compare=True, return_sfcm=True, **arguments, **sizes)
        assert_close(output.images, draw(xl_world.stock, FULL, **arguments, **sizes).images)
        assert_close(output.reference_images, draw(xl_world.original, BASE, **arguments, **sizes).images)


def test_another_second_prompt_goes_with_the_references_alone(xl_world):
    for arguments in ({"target_prompt": TARGET}, {"return_sfcm": True}):
        with pytest.raises(ValueError, match=f"leave out `prompt_2`, which is {OTHER!r}"):
            draw(xl_world.ours, BASE, prompt_2=OTHER, **arguments)
    output = draw(xl_world.ours, BASE, prompt_2=OTHER, compare=True)
    assert_close(output.reference_images, draw(xl_world.original, BASE, prompt_2=OTHER).images)


def test_a_watermark_is_on_both(own_xl_world):
    class Stamp:
        def apply_watermark(self, images):
            return torch.cat([torch.ones_like(images[:, :, :2]), images[:, :, 2:]], dim=2)

    for pipeline in (own_xl_world.ours, own_xl_world.stock, own_xl_world.original):
        pipeline.watermark = Stamp()
    output = draw(own_xl_world.ours, BASE, target_prompt=TARGET, compare=True)
    assert (output.images[:, :2] == 1).all() and (output.reference_images[:, :2] == 1).all()
    assert_close(output.images, draw(own_xl_world.stock, FULL).images)
    assert_close(output.reference_images, draw(own_xl_world.original, BASE).images)


# ---------------------------------------------------------------------------------------------- maps and guidance


@pytest.mark.parametrize(("compare", "guidance_scale"), [(True, 5.0), (False, 1.0)])
@pytest.mark.parametrize("sfcm_mode", ["averaged_target", "averaged", "averaged_both", "paper"])
def test_sfcm_is_that_of_separate_calls(text_xl_world, sfcm_mode, compare, guidance_scale):
    check_sfcm(text_xl_world, sfcm_mode, compare, guidance_scale)


@pytest.mark.parametrize(("expected", "arguments"), GUIDANCES)
def test_guidance_is_what_separate_calls_compute(text_xl_world, expected, arguments):
    check_guidance(text_xl_world, expected, arguments)


@pytest.mark.parametrize("guidance", [{}, {"sfcm_guidance": 0.5}], ids=["alone", "guided"])
def test_until_the_gate_opens_the_portrait_is_the_reference(tokenizer, guidance):
    world = XLWorld(tokenizer)
    add_text_encoder_lora(world)
    check_that_references_part_when_the_gate_opens(world, GATED_SCHEDULERS[-1], **guidance)


@pytest.mark.parametrize("callback", [None, SDXLCFGCutoffCallback(cutoff_step_ratio=0.0)])
def test_a_gate_that_never_opens_leaves_the_original_models_portrait(text_xl_world, callback):
    arguments = {"num_inference_steps": 2, "callback_on_step_end": callback, "height": 24, "width": 16}
    output = draw(text_xl_world.ours, BASE, target_prompt=TARGET, sfcm_guidance_start=1e-6, **arguments)
    assert_close(output.images, draw(text_xl_world.original, BASE, **arguments).images)


def test_maps_of_several_prompts_and_images_are_those_of_runs_of_their_own(xl_world):
    arguments = {"target_prompt": TARGET, "return_sfcm": True}
    output = draw(xl_world.ours, [BASE, OTHER], num_images_per_prompt=2, seed=[1, 2, 3, 4], **arguments)
    assert output.sfcm.shape == (4, 1, 8, 8) and output.phrase_maps.shape == (4, 3, 8, 8)
    assert output.phrases == [PHRASES] * 2 + [("a man", "a purple hat")] * 2 and output.targets == [(TARGET,)] * 4
    for image, prompt in enumerate([BASE, BASE, OTHER, OTHER]):
        alone = draw(xl_world.ours, prompt, seed=image + 1, **arguments)
        phrases = len(alone.phrases[0])
        assert_close(output.sfcm[image : image + 1], alone.sfcm, 1e-3)
        assert_close(output.phrase_maps[image : image + 1, :phrases], alone.phrase_maps, 1e-3)
        assert_close(output.phrase_distances[image : image + 1, :phrases], alone.phrase_distances)
        assert_close(output.target_maps[image : image + 1], alone.target_maps, 1e-3)


def test_maps_of_each_step_end_with_denoising(xl_world):
    arguments = {"target_prompt": TARGET, "return_sfcm": "per_step", "num_inference_steps": 4, "denoising_end": 0.5}
    assert draw(xl_world.ours, BASE, **arguments).sfcm_per_step.shape == (1, 2, 8, 8)


def test_a_map_of_no_step_is_refused_in_one_line(xl_world):
    arguments = {"num_inference_steps": 4, "denoising_end": 0.01}
    for mode in (True, "per_step"):
        with pytest.raises(ValueError, match="^`return_sfcm` is about the steps .* `denoising_end` leaves none of"):
            draw(xl_world.ours, BASE, target_prompt=TARGET, return_sfcm=mode, **arguments)
    stock = draw(xl_world.stock, BASE, **arguments).images
    for changes in ({}, {"sfcm_guidance": 0.5}, {"compare": True}):
        assert_close(draw(xl_world.ours, BASE, target_prompt=TARGET, **changes, **arguments).images, stock)


@pytest.mark.parametrize("name", ["prompt_2", "negative_prompt", "negative_prompt_2"])
@pytest.mark.parametrize("arguments", [{}, {"target_prompt": TARGET}], ids=["stock", "target"])
def test_weights_in_any_prompt_are_said_to_be_words(xl_world, caplog, name, arguments):
    weights = f"({name} {'with' if arguments else 'without'} target:1.2)"  # each is told once
    given = {"negative_prompt": "bad", name: f"a man, {weights}"}
    if name == "prompt_2" and arguments:
        arguments = {"compare": True}
    for _ in range(2):
        draw(xl_world.ours, BASE, **given, **arguments)
    (message,) = [record.getMessage() for record in caplog.records if record.name == "spf_arguments"]
    assert message.startswith(f"{weights!r} in a prompt is read as words: ")


def test_textual_inversions_of_several_vectors_are_refused_for_the_map(tokenizer):
    world = XLWorld(tokenizer)
    make = type(tokenizer).from_pretrained
    world.ours.tokenizer_2 = make(tokenizer.name_or_path, model_max_length=77, pad_token="!")
    vectors = {"tokenizer": world.ours.tokenizer_2, "text_encoder": world.ours.text_encoder_2}
    world.ours.load_textual_inversion({"<dots>": torch.ones(2, 12)}, token="<dots>", **vectors)
    prompt = "a woman, a <dots> jacket"
    draw(world.ours, prompt, target_prompt=TARGET, compare=True)
    with pytest.raises(ValueError, match="several vectors"):
        draw(world.ours, prompt, target_prompt=TARGET, return_sfcm=True)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_visualize_shows_everything(xl_world, output_type):
    output = draw(
        xl_world.ours, [BASE, OTHER], target_prompt=TARGET, compare=True, return_sfcm=True, output_type=output_type
    )
    picture = xl_world.ours.visualize(output, 1)
    assert picture.mode == "RGB" and picture.width == 4 * 198 + 6
    with pytest.raises(ValueError, match="return_sfcm"):
        xl_world.ours.visualize(draw(xl_world.ours, BASE))


# -------------------------------------------------------------------------------------------------------- adapters


def test_several_adapters_each_with_its_target_and_strength(own_xl_world):
    world = own_xl_world
    torch.manual_seed(3)
    world.ours.unet.add_adapter(lora_config(["conv1", "to_k"]), "hat")
    world.ours.unet.set_adapter("style")
    before, targets = state(world.ours), {"style": "red hair", "hat": "a hat"}
    output = draw(world.ours, BASE, target_prompt=targets, target_scale={"hat": 0.5}, compare=True, return_sfcm=True)
    assert state(world.ours) == before
    world.stock.set_adapters(["style", "hat"], [1.0, 0.5])
    assert_close(output.images, draw(world.stock, f"{BASE}, red hair, a hat").images)
    assert_close(output.reference_images, draw(world.original, BASE).images)
    assert output.targets == [("red hair", "a hat")]


def test_the_text_encoders_adapters_are_scaled_with_it(text_xl_world):
    before = state(text_xl_world.ours)
    arguments = {"target_prompt": TARGET, "target_scale": {"text": 0.0, "style": 0.0}}
    with_all = draw(text_xl_world.ours, BASE, target_prompt=TARGET).images
    original = draw(text_xl_world.original, FULL).images
    assert_close(draw(text_xl_world.ours, BASE, **arguments).images, original)
    assert np.abs(with_all - original).max() > 1e-3
    assert state(text_xl_world.ours) == before


def test_a_lora_of_the_unet_alone_loads_without_an_alarm(tokenizer, xl_world, tmp_path, recwarn):
    bare = XLWorld(tokenizer, lora=False)
    bare.ours.load_lora_weights(lora_file(xl_world, tmp_path / "lora"))
    bare.ours.load_lora_weights(tmp_path / "lora", adapter_name="second")
    assert not [own for own in recwarn if "peft_config" in str(own.message)]
    bare.ours.set_adapters(["second"])
    assert_close(draw(bare.ours, BASE).images, draw(xl_world.stock, BASE).images)


def test_a_lora_of_all_three_models_is_loaded_and_checked(tokenizer, text_xl_world, tmp_path):
    layers = {
        f"{name}_lora_layers": convert_state_dict_to_diffusers(
            get_peft_model_state_dict(getattr(text_xl_world.ours, name), adapter_name=adapter)
        )
        for name, adapter in (("unet", "style"), ("text_encoder", "text"), ("text_encoder_2", "text"))
    }
    metadata = {
        f"{name}_lora_adapter_metadata": getattr(text_xl_world.ours, name).peft_config[adapter].to_dict()
        for name, adapter in (("unet", "style"), ("text_encoder", "text"), ("text_encoder_2", "text"))
    }
    StableDiffusionXLPipeline.save_lora_weights(tmp_path / "all", **layers, **metadata)
    bare = XLWorld(tokenizer, lora=False)
    bare.ours.load_lora_weights(tmp_path / "all")
    assert_close(draw(bare.ours, FULL).images, draw(text_xl_world.stock, FULL).images)

    own = layers["text_encoder_2_lora_layers"]
    layers["text_encoder_2_lora_layers"] = {key.replace("layers.1", "layers.7"): value for key, value in own.items()}
    StableDiffusionXLPipeline.save_lora_weights(tmp_path / "other", **layers, **metadata)
    bare = XLWorld(tokenizer, lora=False)
    with pytest.raises(ValueError, match=r"other: is for another architecture: there is no layer text_encoder_2\."):
        bare.ours.load_lora_weights(tmp_path / "other")
    assert not getattr(bare.ours.unet, "peft_config", {})


# ------------------------------------------------------------------------------------- the stock pipeline's own ways


def test_from_pipe_takes_a_plain_pipeline_with_its_lora(xl_world):
    for kind in (SPFPortraitXLPipeline.from_pipe, StableDiffusionXLImg2ImgPipeline.from_pipe):
        assert kind(xl_world.stock).unet is xl_world.stock.unet
    ours = SPFPortraitXLPipeline.from_pipe(xl_world.stock, add_watermarker=False)
    ours.set_progress_bar_config(disable=True)
    output = draw(ours, BASE, target_prompt=TARGET, compare=True)
    assert_close(output.images, draw(xl_world.stock, FULL).images)
    assert_close(output.reference_images, draw(xl_world.original, BASE).images)
    back = StableDiffusionXLPipeline.from_pipe(ours, add_watermarker=False)
    back.set_progress_bar_config(disable=True)
    assert_equal(draw(back, BASE).images, draw(xl_world.stock, BASE).images)


def test_from_pipe_keeps_the_empty_prompt_and_the_precision_that_is_given(own_xl_world):
    own_xl_world.stock.register_to_config(force_zeros_for_empty_prompt=False)
    own_xl_world.stock.to(torch.bfloat16)
    ours = SPFPortraitXLPipeline.from_pipe(own_xl_world.stock, dtype=torch.bfloat16)
    assert ours.config.force_zeros_for_empty_prompt is False
    assert ours.unet.dtype == own_xl_world.stock.unet.dtype == torch.bfloat16
    # Without it diffusers turns the models that both share into float32.
    SPFPortraitXLPipeline.from_pipe(own_xl_world.stock)
    assert own_xl_world.stock.unet.dtype == torch.float32


def test_what_it_saves_is_a_stock_pipeline(own_xl_world, tmp_path):
    expected = draw(own_xl_world.stock, BASE).images
    own_xl_world.ours.register_to_config(force_zeros_for_empty_prompt=False)
    with pytest.raises(ValueError, match="unload_lora_weights"):
        own_xl_world.ours.save_pretrained(tmp_path)
    own_xl_world.ours.fuse_lora()
    own_xl_world.ours.unload_lora_weights()
    own_xl_world.ours.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path, add_watermarker=False)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is StableDiffusionXLPipeline
    assert loaded.config.force_zeros_for_empty_prompt is False
    assert_close(draw(loaded, BASE, **NEGATIVE_ONES).images, draw(own_xl_world.ours, BASE, **NEGATIVE_ONES).images)
    loaded.register_to_config(force_zeros_for_empty_prompt=True)
    assert_close(draw(loaded, BASE).images, expected)


def test_half_precision(own_xl_world):
    for pipeline in (own_xl_world.ours, own_xl_world.original):
        pipeline.to(torch.bfloat16)
    output = draw(own_xl_world.ours, BASE, target_prompt=TARGET, compare=True, return_sfcm=True)
    assert_close(output.images, draw(own_xl_world.stock, FULL).images, 0.05)
    assert_close(output.reference_images, draw(own_xl_world.original, BASE).images, 0.05)
    assert output.sfcm.dtype == output.phrase_distances.dtype == torch.float32 and output.sfcm.max() == 1


# ------------------------------------------------------------------------------------------------- the other family


def refuse(kind, components):
    with pytest.raises(ValueError) as error:
        kind(**components)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_each_class_refuses_the_others_model(tokenizer, bare_world, bare_xl_world, tmp_path):
    xl, sd = make_xl_components(tokenizer), make_components(tokenizer)
    assert "use pipeline_spf_portrait_xl.py instead" in refuse(SPFPortraitPipeline, {**sd, "unet": xl["unet"]})
    assert "use pipeline_spf_portrait.py instead" in refuse(SPFPortraitXLPipeline, {**xl, "unet": sd["unet"]})
    for world, kind in ((bare_world, SPFPortraitXLPipeline), (bare_xl_world, SPFPortraitPipeline)):
        world.original.save_pretrained(tmp_path / kind.__name__)
        right = "pipeline_spf_portrait_xl.py" if kind is SPFPortraitPipeline else "pipeline_spf_portrait.py"
        with pytest.raises(ValueError, match=re.escape(f"use {right} instead")):
            kind.from_pretrained(tmp_path / kind.__name__)


def test_a_pipeline_may_have_no_unet(tokenizer):
    for kind, components in ((SPFPortraitPipeline, make_components), (SPFPortraitXLPipeline, make_xl_components)):
        # To encode prompts alone.
        assert kind(**components(tokenizer) | {"unet": None}).unet is None


def test_the_refiner_is_refused(tokenizer):
    components = make_xl_components(tokenizer, projection_class_embeddings_input_dim=5 * 8 + 10)
    assert "5 numbers about a picture's size instead of 6" in refuse(SPFPortraitXLPipeline, components)
