"""Tests of `spf_observer.py`: rows, maps and guidance, against separate calls of the models."""

import copy
import math

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
)
from diffusers.callbacks import SDCFGCutoffCallback
from pipeline_world import (
    BASE,
    FULL,
    OTHER,
    PHRASES,
    TARGET,
    World,
    add_ip_adapter,
    add_text_encoder_lora,
    assert_close,
    assert_equal,
    denoiser_of,
    draw,
    state,
)

from attention_processors import phrase_map_resolution
from prompts import make_prompt_pair, phrase_mask, tokenize_prompt_pair
from region_guidance import guidance_map, noise_difference
from sfcm import SFCM_MODES, free_regions, phrase_attention_maps
from spf_observer import RowLayout


@pytest.mark.parametrize(
    ("layout", "batch", "response", "original"),
    [
        (RowLayout(2), 4, [2, 3], []),  # a stock batch: two negatives, two responses
        (RowLayout(2, negative_adapters=False), 4, [2, 3], [0, 1]),
        (RowLayout(1, compare=True), 4, [2], [1, 3]),
        (RowLayout(1, compare=True), 2, [0], [1]),  # guidance is over
        (RowLayout(2, appended=1), 6, [2, 3], [4, 5]),
        (RowLayout(1, appended=2), 4, [1], [2]),
        (RowLayout(1, True, False, 2), 6, [2], [0, 1, 3, 4]),
    ],
)
def test_every_row_of_the_batch_has_its_owner(layout, batch, response, original):
    rows = torch.arange(batch)
    own = layout.own(rows)
    assert layout.response(own).tolist() == response
    assert layout.append(own).tolist() == [*own.tolist(), *response * layout.appended]
    assert sorted(layout.of_the_original(batch)) == original
    # Above the noise level that the LoRA begins at, it is off in all rows of the call itself.
    assert layout.of_the_original(batch, closed=True) == own.tolist()


def seen(world, pipeline, *inputs):
    """What a pipeline's denoiser predicts of a prompt, and its attention to the text at the maps' resolution."""
    with torch.no_grad(), type(world.ours)._capture(denoiser_of(pipeline)) as store, store.record():
        prediction = world.predict(pipeline, *inputs)
    features = store.pop()
    resolution = phrase_map_resolution(features.resolutions)
    layers = features.at_resolution(resolution).attention_probs.values()
    return prediction, torch.stack(list(layers)).mean(0), resolution


def expected_maps(world, prompt, latents_of_steps, mode):
    """The maps of one prompt and image, computed step by step with separate UNet calls."""
    pair = make_prompt_pair(prompt, TARGET)
    tokens, length = world.locate(pair)
    weights = torch.tensor([phrase_mask(tokens.phrase_positions, length)])
    differences, probs = [], []
    with torch.no_grad():
        for latents, timestep in zip(latents_of_steps, world.ours.scheduler.timesteps, strict=True):
            response = world.predict(world.ours, pair.full_prompt, latents, timestep, (24, 16))
            start, attention, resolution = seen(world, world.original, prompt, latents, timestep, (24, 16))
            words = world.predict(world.ours, prompt, latents, timestep, (24, 16))
            starts = {"averaged_target": [words], "averaged_both": [start, words]}.get(mode, [start])
            scale = world.scale(timestep)
            differences.append(torch.cat([noise_difference(response, own, scale) for own in starts], 1))
            probs.append(attention)
        embeds = world.clip_embeds(world.original, [*pair.base_phrases, TARGET])
    difference = torch.stack(differences).mean(0)
    maps = phrase_attention_maps([torch.stack(probs).mean(0)], [resolution], weights, difference.shape[-2:])
    distances = 1 - torch.nn.functional.cosine_similarity(embeds[:-1], embeds[-1:])[None]
    present = torch.ones(1, len(pair.base_phrases), dtype=torch.bool)
    return SFCM_MODES[mode].compute(difference, maps, distances, present), maps, distances


def check_sfcm(world, sfcm_mode, compare, guidance_scale, **others):
    steps = [torch.randn(1, 4, 12, 8, generator=torch.Generator().manual_seed(0))]

    def remember(pipeline, step, timestep, tensors):
        steps.append(tensors["latents"])
        return {}

    arguments = {"height": 24, "width": 16, "guidance_scale": guidance_scale, "negative_prompt": "bad"}
    arguments |= {"num_inference_steps": world.steps, **others}
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


@pytest.mark.parametrize(("compare", "guidance_scale"), [(True, 5.0), (False, 1.0)])
@pytest.mark.parametrize("sfcm_mode", ["averaged_target", "averaged", "averaged_both", "paper"])
def test_sfcm_is_that_of_separate_calls_on_the_responses_own_latents(world, sfcm_mode, compare, guidance_scale):
    check_sfcm(world, sfcm_mode, compare, guidance_scale)


@pytest.fixture(scope="module")
def text_world(tokenizer):
    """With a LoRA in the text encoder too. No test may change it."""
    world = World(tokenizer)
    add_text_encoder_lora(world)
    return world


@pytest.mark.parametrize(("sfcm_mode", "compare"), [("averaged", False), ("averaged_target", True)])
def test_sfcm_is_against_the_original_text_encoder(text_world, sfcm_mode, compare):
    check_sfcm(text_world, sfcm_mode, compare, guidance_scale=5.0 if compare else 1.0)


@pytest.mark.parametrize(
    ("sfcm_mode", "compare"), [("averaged", False), ("averaged_target", True), ("averaged_both", True)]
)
@pytest.mark.parametrize("start", [1.0, 1e-3])
def test_steps_without_the_lora_count_in_the_map_with_what_it_would_change(text_world, sfcm_mode, compare, start):
    check_sfcm(text_world, sfcm_mode, compare, 5.0 if compare else 1.0, sfcm_guidance_start=start)


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


def test_sfcm_without_a_lora_is_the_difference_of_the_prompts(bare_world):
    output = draw(bare_world.ours, BASE, target_prompt=TARGET, return_sfcm=True, output_type="pil")
    assert isinstance(output.images[0], PIL.Image.Image)
    assert output.sfcm.max() == 1


def test_without_a_target_both_differences_are_that_of_the_paths(world):
    both, paths = (
        draw(world.ours, BASE, return_sfcm=True, sfcm_mode=mode).sfcm for mode in ("averaged_both", "averaged")
    )
    assert torch.equal(both, paths) and both.max() == 1


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
    output = draw(world.ours, BASE, target_prompt=targets, return_sfcm=True)
    assert output.targets == [("red hair", "a hat")] and output.target_maps.shape == (1, 2, 8, 8)
    pair = make_prompt_pair(BASE, targets)
    tokens = tokenize_prompt_pair(pair, world.ours.tokenizer)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    world.ours.scheduler.set_timesteps(1)
    _, probs, resolution = seen(world, world.ours, pair.full_prompt, latents, world.ours.scheduler.timesteps[0])
    weights = torch.tensor([phrase_mask(tokens.each_target_positions, 77)])
    expected = phrase_attention_maps([probs], [resolution], weights, (8, 8))
    assert_close(output.target_maps, expected, 1e-3)


def test_without_a_target_the_map_is_what_the_lora_changes(world, bare_world):
    output = draw(world.ours, [BASE, OTHER], return_sfcm=True, seed=[1, 2])
    assert output.phrases == [PHRASES, ("a man", "a purple hat")]
    assert output.phrase_maps.shape == (2, 3, 8, 8) and output.phrase_maps[0].amax((-2, -1)).tolist() == [1, 1, 1]
    assert output.targets is output.target_maps is output.phrase_distances is None
    assert output.sfcm.max() == 1 and (output.sfcm == 0).any()
    given = draw(world.ours, BASE, return_sfcm=True, base_phrases=["woman"], seed=1)
    assert given.phrases == [("woman",)]
    output = draw(bare_world.ours, BASE, return_sfcm=True)
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


def test_phrases_that_were_cut_off_are_not_encoded(world):
    prompt = ", ".join(f"{i} hats" for i in range(300))
    encoded = []
    hook = world.ours.text_encoder.register_forward_pre_hook(
        lambda _, args, kwargs: encoded.append(len(args[0] if args else kwargs["input_ids"])), with_kwargs=True
    )
    output = draw(world.ours, prompt, target_prompt=[("0 hats", TARGET)], return_sfcm=True)
    hook.remove()
    assert output.phrase_distances.shape == (1, 299) and max(encoded) < 40
    assert (output.phrase_distances[0, 40:].abs() < 1e-6).all() and (output.phrase_distances[0, :5] > 1e-6).all()


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


def denoise(
    world, prompt, *, guide=0.0, exponent=2.0, mode="averaged_target", negative_lora=True, free=(), scale=5.0,
    gate=math.inf,
):  # fmt: skip
    """What a call computes, step by step with separate calls of the denoisers: latents after the last step."""
    ours, original = world.ours, world.original
    pair = make_prompt_pair(prompt, TARGET, free_phrases=free)
    tokens, length = world.locate(pair)
    weights = torch.tensor([phrase_mask(tokens.phrase_positions, length)])
    is_free = torch.tensor([[phrase in free for phrase in pair.base_phrases]])
    latents, total = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), 0
    ours.scheduler.set_timesteps(world.steps)
    for i, timestep in enumerate(ours.scheduler.timesteps):
        response = world.predict(ours, pair.full_prompt, latents, timestep)
        reference, probs, resolution = seen(world, original, prompt, latents, timestep)
        words = world.predict(ours, prompt, latents, timestep)
        starts = {"averaged_target": [words], "averaged": [reference], "averaged_both": [reference, words]}[mode]
        total = total + torch.stack([guidance_map(noise_difference(response, own)) for own in starts])
        each = [guidance_map(own) for own in total / (i + 1)]
        sfcm = math.prod(each) ** (exponent / len(each))
        maps = phrase_attention_maps([probs], [resolution], weights, (8, 8))
        mask = 1 - guide * (1 - free_regions(sfcm, maps, is_free))
        closed = world.noise_ratio(timestep) > gate
        guided = reference + (0 if closed else mask) * (response - reference)
        if scale > 1:
            negative = world.predict(ours if negative_lora and not closed else original, "bad", latents, timestep)
            guided = negative + scale * (guided - negative)
        latents = ours.scheduler.step(guided, timestep, latents).prev_sample
    return latents


GUIDANCES = [
    ({"negative_lora": False}, {"adapter_in_unconditional": False}),
    ({"guide": 1.0}, {"sfcm_guidance": 1.0}),
    ({"guide": 0.5, "exponent": 1.0}, {"sfcm_guidance": 0.5, "sfcm_guidance_exponent": 1.0}),
    ({"guide": 0.75, "mode": "averaged"}, {"sfcm_guidance": 0.75, "sfcm_mode": "averaged"}),
    ({"guide": 1.0, "mode": "averaged_both"}, {"sfcm_guidance": 1.0, "sfcm_mode": "averaged_both"}),
    ({"guide": 1.0, "scale": 1.0}, {"sfcm_guidance": 1}),
    (
        {"guide": 1.0, "negative_lora": False, "free": ["a green jacket"]},
        {"sfcm_guidance": 1.0, "adapter_in_unconditional": False, "free_phrases": ["a green jacket"]},
    ),
    # Of two steps the first has the noise ratio 1.43, the second .014.
    ({"gate": 1.0}, {"sfcm_guidance_start": 1.0}),
    ({"gate": 1.0, "negative_lora": False}, {"sfcm_guidance_start": 1.0, "adapter_in_unconditional": False}),
    ({"gate": 1.0, "guide": 1.0}, {"sfcm_guidance_start": 1, "sfcm_guidance": 1.0}),
    (
        {"gate": 1.0, "guide": 0.75, "scale": 1.0, "mode": "averaged"},
        {"sfcm_guidance_start": 1.0, "sfcm_guidance": 0.75, "sfcm_mode": "averaged"},
    ),
    (
        {"gate": 1.0, "guide": 1.0, "mode": "averaged_both"},
        {"sfcm_guidance_start": 1.0, "sfcm_guidance": 1.0, "sfcm_mode": "averaged_both"},
    ),
    (
        {"gate": 1.0, "guide": 1.0, "free": ["a green jacket"]},
        {"sfcm_guidance_start": 1.0, "sfcm_guidance": 1.0, "free_phrases": ["a green jacket"]},
    ),
]


def check_guidance(world, expected, arguments):
    before, scale = state(world.ours), expected.get("scale", 5.0)
    stock = {"num_inference_steps": world.steps, "output_type": "latent", "guidance_scale": scale}
    stock["negative_prompt"] = "bad"
    arguments = {"target_prompt": TARGET, **stock, **arguments}
    output = draw(world.ours, BASE, **arguments)
    with torch.no_grad():
        latents = denoise(world, BASE, **expected)
    assert_close(output.images, latents, 1e-3)
    assert np.abs(latents - draw(world.stock, FULL, **stock).images).max() > 1e-2
    # Beside the references, and while the maps are looked at, the images are the same.
    more = draw(world.ours, BASE, compare=True, return_sfcm=True, **arguments)
    assert_close(more.images, latents, 1e-3)
    assert_close(more.reference_images, draw(world.original, BASE, **stock).images, 1e-3)
    assert state(world.ours) == before


@pytest.mark.parametrize(("expected", "arguments"), GUIDANCES)
def test_guidance_is_what_separate_calls_compute(text_world, expected, arguments):
    check_guidance(text_world, expected, arguments)


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
    exact = draw(own_world.ours, BASE, compare=True, **guided)
    assert_close(exact.reference_images, draw(own_world.original, BASE, **image).images)
    own_world.ours.to(torch.bfloat16)
    assert_close(draw(own_world.ours, BASE, **guided).images, exact.images, 0.02)


GATED_SCHEDULERS = [
    DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
    PNDMScheduler(beta_schedule="scaled_linear", steps_offset=1, skip_prk_steps=True),
    EulerDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="linspace"),  # at 749.25 and 499.5, too
]


def check_that_references_part_when_the_gate_opens(world, scheduler, **guidance):
    """With 2 prompts, 2 images each: until then portraits are the references, and after it they are not."""
    world.use_scheduler(scheduler)
    apart, ratios = [], []

    def look(pipeline, step, timestep, tensors):
        portraits, references = tensors["latents"].chunk(2)
        apart.append((portraits - references).abs().amax((1, 2, 3)))
        ratios.append(world.noise_ratio(timestep))
        return {}

    arguments = {"target_prompt": TARGET, "compare": True, "callback_on_step_end": look, "num_inference_steps": 5}
    arguments |= {"seed": [1, 2, 3, 4], "num_images_per_prompt": 2, "sfcm_guidance_start": 1.5, **guidance}
    output = draw(world.ours, [BASE, OTHER], **arguments)
    opened = [ratio <= 1.5 for ratio in ratios]
    assert opened == sorted(opened) and opened.count(False) >= 2 and opened.count(True) >= 2
    for is_open, distances in zip(opened, apart, strict=True):
        assert (distances > 1e-2).all() if is_open else (distances < 1e-4).all()
    stock = {"num_inference_steps": 5, "num_images_per_prompt": 2, "seed": [1, 2, 3, 4]}
    assert_close(output.reference_images, draw(world.original, [BASE, OTHER], **stock).images)


@pytest.mark.parametrize("scheduler", GATED_SCHEDULERS, ids=lambda scheduler: type(scheduler).__name__)
@pytest.mark.parametrize("guidance", [{}, {"sfcm_guidance": 0.5}], ids=["alone", "guided"])
def test_until_the_gate_opens_the_portrait_is_the_reference(tokenizer, scheduler, guidance):
    world = World(tokenizer)
    add_text_encoder_lora(world)
    check_that_references_part_when_the_gate_opens(world, scheduler, **guidance)


@pytest.mark.parametrize("arguments", [{}, {"compare": True, "return_sfcm": True}, {"sfcm_guidance": 0.5}])
def test_a_gate_that_is_always_open_changes_nothing_to_the_bit(text_world, arguments):
    arguments = {"target_prompt": TARGET, "num_inference_steps": 3, **arguments}
    without = draw(text_world.ours, BASE, **arguments)
    output = draw(text_world.ours, BASE, sfcm_guidance_start=1e9, **arguments)
    assert_equal(output.images, without.images)
    if "compare" in arguments:
        assert_equal(output.reference_images, without.reference_images)
        assert torch.equal(output.sfcm, without.sfcm) and torch.equal(output.target_maps, without.target_maps)


def end_guidance(pipeline, step, timestep, tensors):
    pipeline._guidance_scale = 0.0
    return {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[1]} if step == 0 else {}


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"guidance_scale": 1.0},
        {"negative_prompt": "bad", "height": 24, "width": 16},
        {"callback_on_step_end": SDCFGCutoffCallback(cutoff_step_ratio=0.0)},
        {"callback_on_step_end": end_guidance, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]},
    ],
)
@pytest.mark.parametrize("ours", [{}, {"compare": True, "sfcm_guidance": 1.0}])
def test_a_gate_that_never_opens_leaves_the_original_models_portrait(text_world, arguments, ours):
    before = state(text_world.ours)
    arguments = {"num_inference_steps": 2, **arguments}
    output = draw(text_world.ours, BASE, target_prompt=TARGET, sfcm_guidance_start=1e-6, **ours, **arguments)
    assert_close(output.images, draw(text_world.original, BASE, **arguments).images)
    assert state(text_world.ours) == before


def test_pure_noise_has_a_ratio_too(own_world):
    own_world.use_scheduler(DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing"))
    arguments = {"target_prompt": TARGET, "num_inference_steps": 2}
    gated = (draw(own_world.ours, BASE, sfcm_guidance_start=start, **arguments).images for start in (1e9, 1000))
    plain = draw(own_world.ours, BASE, **arguments).images
    assert_equal(next(gated), plain)
    assert np.abs(next(gated) - plain).max() > 1e-3


@pytest.mark.parametrize(
    "scheduler",
    [
        EDMEulerScheduler(),
        EulerDiscreteScheduler(prediction_type="v_prediction", timestep_type="continuous"),
        DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    ],
    ids=["edm", "continuous", "flow"],
)
def test_a_scheduler_whose_noise_is_not_known_is_refused_before_encoding(own_world, scheduler):
    own_world.use_scheduler(scheduler)
    own_world.ours.text_encoder.register_forward_pre_hook(lambda *_: pytest.fail("a prompt was encoded"))
    with pytest.raises(ValueError, match=f"^`sfcm_guidance_start` .* {type(scheduler).__name__} "):
        draw(own_world.ours, BASE, target_prompt=TARGET, sfcm_guidance_start=5.0)
