"""Tests of `pipeline_spf_portrait_3.py`: the stock call, and what all families share, on tiny random components."""

import inspect
import re

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    FluxTransformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
)
from diffusers.callbacks import SD3CFGCutoffCallback
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterTimeImageProjection
from pipeline_world import (
    BASE,
    FULL,
    OTHER,
    PHRASES,
    TARGET,
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
from sd3_world import SD3World, make_sd3_components, make_t5_tokenizer, write_sd3, write_sd3_lora
from test_spf_observer import GUIDANCES, check_guidance, check_sfcm, check_that_references_part_when_the_gate_opens

from pipeline_spf_portrait import SPFPortraitPipeline
from pipeline_spf_portrait_3 import LEAST_SIGNAL, SPFPortrait3Pipeline
from pipeline_spf_portrait_xl import SPFPortraitXLPipeline


def rescale_latents(pipeline, step, timestep, tensors):
    return {"latents": tensors["latents"] * 0.9}


ONES = {"prompt_embeds": torch.ones(1, 288, 32), "pooled_prompt_embeds": torch.ones(1, 18)}
NEGATIVE_ONES = {f"negative_{name}": tensor for name, tensor in ONES.items()}
SKIPPING = {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 1.0, "num_inference_steps": 3}
RED = PIL.Image.new("RGB", (8, 8), (255, 0, 0))
# A call for each argument of the stock pipeline, which means something there and differs from its default.
STOCK_ARGUMENTS = {
    "prompt": {"prompt": [BASE, OTHER]},
    "prompt_2": {"prompt_2": OTHER},
    "prompt_3": {"prompt_3": OTHER},
    "height": {"height": 24},
    "width": {"width": 24},
    "num_inference_steps": {"num_inference_steps": 3},
    "sigmas": {"sigmas": [0.9, 0.3]},
    "guidance_scale": {"guidance_scale": 1.0},
    "negative_prompt": {"negative_prompt": "bad"},
    "negative_prompt_2": {"negative_prompt": "bad", "negative_prompt_2": "ugly"},
    "negative_prompt_3": {"negative_prompt": "bad", "negative_prompt_3": "ugly"},
    "num_images_per_prompt": {"num_images_per_prompt": 2},
    "generator": {"num_images_per_prompt": 2, "seed": [3, 4]},
    "latents": {"latents": torch.linspace(-1, 1, 256).reshape(1, 4, 8, 8)},
    "prompt_embeds": {"prompt": None, **ONES},
    "negative_prompt_embeds": NEGATIVE_ONES,
    "pooled_prompt_embeds": {"prompt": None, **ONES, "pooled_prompt_embeds": torch.zeros(1, 18)},
    "negative_pooled_prompt_embeds": {**NEGATIVE_ONES, "negative_pooled_prompt_embeds": torch.zeros(1, 18)},
    "ip_adapter_image": {"ip_adapter_image": RED},
    "ip_adapter_image_embeds": {"ip_adapter_image_embeds": torch.linspace(-1, 1, 36).reshape(2, 3, 6)},
    "output_type": {"output_type": "pt"},
    "return_dict": {"return_dict": False},
    "joint_attention_kwargs": {"joint_attention_kwargs": {"scale": 0.5}},
    "clip_skip": {"clip_skip": 1},
    "callback_on_step_end": {"callback_on_step_end": rescale_latents},
    "callback_on_step_end_tensor_inputs": {
        "callback_on_step_end": rescale_latents,
        "callback_on_step_end_tensor_inputs": ["latents", "pooled_prompt_embeds"],
    },
    "max_sequence_length": {"max_sequence_length": 24},
    "skip_guidance_layers": SKIPPING,
    "skip_layer_guidance_scale": SKIPPING | {"skip_layer_guidance_scale": 5.0},
    "skip_layer_guidance_stop": SKIPPING | {"skip_layer_guidance_stop": 0.5},
    "skip_layer_guidance_start": SKIPPING | {"skip_layer_guidance_start": 0.5},
    "mu": {"mu": 2.0, "num_inference_steps": 3},
}
WITHOUT_T5 = {"text_encoder_3": None, "tokenizer_3": None}  # has to be said of a folder without it, too
# Those that change neither the numbers of the image nor its shape (no IP-Adapter is there to look at a picture), and
# those that change its shape.
SAME = {"generator", "output_type", "return_dict", "ip_adapter_image"}
OTHER_SHAPE = {"prompt", "height", "width", "num_images_per_prompt"}
ALONE = {"return_dict", *(name for name in STOCK_ARGUMENTS if name.startswith(("skip", "ip_adapter")))}


def add_ip_adapter(world):
    """A tiny IP-Adapter with random weights in both pipelines' transformer."""
    transformer = world.ours.transformer
    torch.manual_seed(2)
    sizes = {"hidden_size": 16, "ip_hidden_states_dim": 16, "head_dim": 8, "timesteps_emb_dim": 64}
    transformer.set_attn_processor(
        {name: SD3IPAdapterJointAttnProcessor2_0(**sizes).eval() for name in transformer.attn_processors}
    )
    transformer.image_proj = IPAdapterTimeImageProjection(
        embed_dim=6, output_dim=16, hidden_dim=64, heads=1, num_queries=2, timestep_in_dim=320
    ).eval()


@pytest.fixture(scope="module")
def worlds(sd3_world):
    """By stock argument the world that a call with it needs. No test may change them."""
    found = dict.fromkeys(STOCK_ARGUMENTS, sd3_world)
    found["mu"] = SD3World()
    found["mu"].use_scheduler(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
    found["ip_adapter_image_embeds"] = SD3World()
    add_ip_adapter(found["ip_adapter_image_embeds"])
    return found


@pytest.fixture(scope="module")
def text_sd3_world():
    """With a LoRA in CLIP's text encoders too. No test may change it."""
    world = SD3World()
    add_text_encoder_lora(world)
    return world


def test_the_signature_is_the_stock_one_and_then_that_of_every_family():
    stock = list(inspect.signature(StableDiffusion3Pipeline.__call__).parameters.values())
    ours = list(inspect.signature(SPFPortrait3Pipeline.__call__).parameters.values())
    others = list(inspect.signature(SPFPortraitPipeline.__call__).parameters.values())
    expected = [(p.name, p.default, p.kind) for p in [*stock, *others[-12:-1]]]
    # 256 is what it means where T5 knows as many.
    expected = [("max_sequence_length", None, kind) if name == "max_sequence_length" else (name, default, kind)
                for name, default, kind in expected]  # fmt: skip
    assert [(p.name, p.default, p.kind) for p in ours] == expected
    assert {p.name for p in stock} - {"self"} == set(STOCK_ARGUMENTS)


# ------------------------------------------------------------------------------------------------- the stock call


@pytest.mark.parametrize("guidance_scale", [1.0, 7.0])
@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_without_our_arguments_the_images_are_the_stock_ones_to_the_bit(
    sd3_world, bare_sd3_world, output_type, guidance_scale
):
    arguments = {"output_type": output_type, "num_inference_steps": 2, "guidance_scale": guidance_scale}
    for own in (sd3_world, bare_sd3_world):  # with T5 and without
        ours = draw(own.ours, BASE, **arguments)
        assert type(ours).__name__ == "StableDiffusion3PipelineOutput"
        assert_equal(ours.images, draw(own.stock, BASE, **arguments).images)


@pytest.mark.parametrize("name", list(STOCK_ARGUMENTS))
def test_every_stock_argument_is_passed_on_to_the_bit(worlds, name):
    world, arguments = worlds[name], {"prompt": BASE, **STOCK_ARGUMENTS[name]}
    ours = draw(world.ours, **arguments)[0]
    assert_equal(ours, draw(world.stock, **arguments)[0])
    if name in OTHER_SHAPE:
        assert ours.shape != draw(world.stock, BASE)[0].shape
    elif name not in SAME:
        assert np.abs(ours - draw(world.stock, BASE)[0]).max() > 1e-4


@pytest.mark.parametrize("name", [name for name in STOCK_ARGUMENTS if name not in ALONE])
def test_every_stock_argument_goes_with_compare(worlds, name):
    world, arguments = worlds[name], {"prompt": BASE, **STOCK_ARGUMENTS[name]}
    target, full = {}, {}
    if arguments["prompt"] is not None and name not in ("prompt_2", "prompt_3"):
        target = {"target_prompt": TARGET}
        full = {"prompt": FULL if arguments["prompt"] == BASE else [FULL, f"{OTHER}, {TARGET}"]}
    output = draw(world.ours, compare=True, **arguments, **target)
    assert_close(output.images, draw(world.stock, **arguments | full)[0])
    arguments.pop("joint_attention_kwargs", None)  # the original pipeline has no LoRA to scale
    assert_close(output.reference_images, draw(world.original, **arguments)[0])
    assert np.abs(np.asarray(output.images) - np.asarray(output.reference_images)).max() > 1e-4


def test_target_alone_is_the_stock_call_with_the_full_prompt(sd3_world, bare_sd3_world):
    for world in (sd3_world, bare_sd3_world):
        for other in (None, BASE, [BASE], ""):
            output = draw(world.ours, BASE, target_prompt=TARGET, prompt_2=other, prompt_3=other)
            assert_equal(output.images, draw(world.stock, FULL).images)
        pair = draw(world.ours, [BASE], target_prompt=("a green jacket", "a red hat"), prompt_3=BASE)
        assert_equal(pair.images, draw(world.stock, ["a woman, a red hat, a purple background"]).images)
        skipped = draw(world.ours, BASE, target_prompt=TARGET, **SKIPPING)
        assert_equal(skipped.images, draw(world.stock, FULL, **SKIPPING).images)


def test_an_ip_adapter_goes_with_a_target_and_with_nothing_beside_it(worlds):
    world, embeds = worlds["ip_adapter_image_embeds"], STOCK_ARGUMENTS["ip_adapter_image_embeds"]
    output = draw(world.ours, BASE, target_prompt=TARGET, **embeds)
    assert_equal(output.images, draw(world.stock, FULL, **embeds).images)
    for name in ("ip_adapter_image", "ip_adapter_image_embeds"):
        for arguments in ({"compare": True}, {"target_prompt": TARGET, "sfcm_guidance_start": 2.0}):
            with pytest.raises(ValueError, match="^An IP-Adapter's picture does not go with `compare`"):
                draw(world.ours, BASE, **arguments, **STOCK_ARGUMENTS[name])
    with pytest.raises(ValueError, match="SD3IPAdapterJoint.* call pipeline.unload_ip_adapter"):
        draw(world.ours, BASE, return_sfcm=True)


def test_the_longest_text_of_t5_is_the_stock_one_or_what_the_tokenizer_knows(own_sd3_world):
    world, lengths = own_sd3_world, []
    world.ours.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["encoder_hidden_states"].shape[1]), with_kwargs=True
    )
    draw(world.ours, BASE)
    world.ours.tokenizer_3 = make_t5_tokenizer(length=77)
    short = draw(world.ours, BASE)
    assert_equal(short.images, draw(world.stock, BASE, max_sequence_length=77).images)
    draw(world.ours, BASE, target_prompt=TARGET, return_sfcm=True)
    draw(world.ours, BASE, target_prompt=TARGET, return_sfcm=True, max_sequence_length=48)
    assert lengths == [32 + length for length in (256, 77, 77, 77, 48)]


# ------------------------------------------------------------------------------------- rows beside those of a call


def test_compare_equals_two_runs_and_leaves_nothing_behind(text_sd3_world):
    world, before = text_sd3_world, state(text_sd3_world.ours)
    arguments = {"num_images_per_prompt": 2, "seed": [3, 4, 5, 6], "num_inference_steps": 2}
    arguments["negative_prompt"] = ["bad", "ugly"]
    output = draw(world.ours, [BASE, OTHER], target_prompt=TARGET, compare=True, return_sfcm=True, **arguments)
    assert_close(output.images, draw(world.stock, [FULL, f"{OTHER}, {TARGET}"], **arguments).images)
    assert_close(output.reference_images, draw(world.original, [BASE, OTHER], **arguments).images)
    assert np.abs(output.images - output.reference_images).max() > 1e-3
    assert output.nsfw_content_detected is None
    assert state(world.ours) == before


def test_compare_without_t5_and_without_a_lora(bare_sd3_world):
    output = draw(bare_sd3_world.ours, BASE, compare=True)
    assert_close(output.images, output.reference_images, 1e-6)
    output = draw(bare_sd3_world.ours, BASE, target_prompt=TARGET, compare=True, return_sfcm=True)
    assert_close(output.images, draw(bare_sd3_world.original, FULL).images)
    assert_close(output.reference_images, draw(bare_sd3_world.original, BASE).images)
    assert output.sfcm.max() == 1 and output.phrases == [PHRASES]


def test_a_row_is_told_its_own_prompt_in_all_forms(text_sd3_world):
    """Of the text encoders' states and of the pooled embeddings, with the LoRA's and without."""
    world, told = text_sd3_world, []

    def remember(transformer, args, kwargs, output):
        told.append([kwargs[name] for name in ("encoder_hidden_states", "pooled_projections", "timestep")])

    hook = world.ours.transformer.register_forward_hook(remember, with_kwargs=True)
    draw(world.ours, BASE, target_prompt=TARGET, return_sfcm=True, sfcm_mode="averaged_both")
    hook.remove()
    (*embeds, timesteps), others = told[0], ("", "", "cpu")
    assert timesteps.tolist() == [1000.0] * 4
    for rows, index in zip(embeds, (0, 2)):
        assert len(rows) == 4  # negative, response, reference, and the base prompt under the LoRA
        for row, (pipeline, text) in enumerate([(world.ours, FULL), (world.original, BASE), (world.ours, BASE)]):
            assert_close(rows[row + 1], pipeline.encode_prompt(text, *others)[index][0].detach())


def test_another_second_or_third_prompt_goes_with_the_references_alone(sd3_world):
    for name in ("prompt_2", "prompt_3"):
        for arguments in ({"target_prompt": TARGET}, {"return_sfcm": True}):
            with pytest.raises(ValueError, match=f"leave out `{name}`, which is {OTHER!r}"):
                draw(sd3_world.ours, BASE, **{name: OTHER}, **arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"compare": True}, {"return_sfcm": True}, {"target_prompt": TARGET, "sfcm_guidance": 0.5},
        {"target_prompt": TARGET, "sfcm_guidance_start": 2.0}, {"adapter_in_unconditional": False},
    ],
)  # fmt: skip
def test_skipped_layers_do_not_go_with_other_rows(sd3_world, arguments):
    encoder = sd3_world.ours.text_encoder
    hook = encoder.register_forward_pre_hook(lambda *_: pytest.fail("a prompt was encoded"))
    with pytest.raises(ValueError, match="^`skip_guidance_layers` does not go with `compare`") as error:
        draw(sd3_world.ours, BASE, **arguments, **SKIPPING)
    hook.remove()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchHeunDiscreteScheduler(shift=2.0),  # two calls of the transformer per step
        DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=2.0),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_other_schedulers(scheduler):
    world = SD3World()
    world.use_scheduler(scheduler)
    arguments = {"num_inference_steps": 3, "target_prompt": TARGET, "compare": True, "return_sfcm": True}
    output = draw(world.ours, BASE, **arguments)
    assert_close(output.images, draw(world.stock, FULL, num_inference_steps=3).images)
    assert_close(output.reference_images, draw(world.original, BASE, num_inference_steps=3).images)
    assert output.sfcm.max() == 1
    check_that_references_part_when_the_gate_opens(world, scheduler)


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchLCMScheduler(),
        FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
        DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, algorithm_type="sde-dpmsolver++"
        ),
    ],
)
def test_compare_needs_a_scheduler_that_draws_no_noise(own_sd3_world, scheduler):
    own_sd3_world.use_scheduler(scheduler)
    with pytest.raises(ValueError, match=f"^`compare` is about one noise, and this {type(scheduler).__name__} "):
        draw(own_sd3_world.ours, BASE, compare=True)
    assert draw(own_sd3_world.ours, BASE, target_prompt=TARGET, return_sfcm=True).sfcm.max() == 1


def test_diffusers_own_callback_may_end_guidance_beside_other_rows(sd3_world):
    # It keeps the last row of what the transformer is told, which is enough for one image.
    arguments = {"callback_on_step_end": SD3CFGCutoffCallback(cutoff_step_ratio=0.0), "num_inference_steps": 3}
    stock = draw(sd3_world.stock, FULL, **arguments).images
    original = draw(sd3_world.original, BASE, **arguments).images
    for return_sfcm in (False, True):
        call = {"target_prompt": TARGET, "compare": True, "return_sfcm": return_sfcm}
        output = draw(sd3_world.ours, BASE, **call, **arguments)
        assert_close(output.images, stock)
        assert_close(output.reference_images, original)


def test_guidance_may_end_by_a_callback_of_the_users_own(sd3_world):
    def end_guidance(pipeline, step, timestep, tensors):
        pipeline._guidance_scale = 0.0
        return {name: tensor.chunk(2)[1] for name, tensor in tensors.items()} if step == 0 else {}

    arguments = {"callback_on_step_end": end_guidance, "num_inference_steps": 2}
    arguments["callback_on_step_end_tensor_inputs"] = ["prompt_embeds", "pooled_prompt_embeds"]
    output = draw(sd3_world.ours, BASE, target_prompt=TARGET, compare=True, return_sfcm=True, **arguments)
    assert_close(output.images, draw(sd3_world.stock, FULL, **arguments).images)
    assert_close(output.reference_images, draw(sd3_world.original, BASE, **arguments).images)


# ---------------------------------------------------------------------------------------------- maps and guidance


@pytest.mark.parametrize(("compare", "guidance_scale"), [(True, 5.0), (False, 1.0)])
@pytest.mark.parametrize("sfcm_mode", ["averaged_target", "averaged", "averaged_both", "paper"])
def test_sfcm_is_that_of_separate_calls(text_sd3_world, sfcm_mode, compare, guidance_scale):
    check_sfcm(text_sd3_world, sfcm_mode, compare, guidance_scale)


def test_sfcm_without_t5_is_of_the_words_of_both_others():
    check_sfcm(SD3World(with_t5=False), "averaged_target", True, 5.0)


@pytest.mark.parametrize("start", [1.0, 1e-3])
def test_steps_without_the_lora_count_in_the_map_with_what_it_would_change(text_sd3_world, start):
    check_sfcm(text_sd3_world, "averaged_both", True, 5.0, sfcm_guidance_start=start)


def test_a_phrase_stands_in_both_parts_of_the_text(sd3_world, bare_sd3_world, monkeypatch):
    import spf_call

    seen, phrases_of = [], spf_call.spf_observer.phrases_of
    monkeypatch.setattr(
        spf_call.spf_observer, "phrases_of", lambda rows: seen.append(phrases_of(rows)) or seen[-1]
    )
    for world in (sd3_world, bare_sd3_world):
        draw(world.ours, BASE, target_prompt=TARGET, return_sfcm=True)
    for phrases, has_t5 in zip(seen, (True, False)):
        for weights, count in ((phrases.weights, 3), (phrases.target_weights, 1)):
            assert weights.shape == (1, count, len(phrases.columns))
            clip, t5 = weights[0][:, phrases.columns < 32], weights[0][:, phrases.columns >= 32]
            assert clip.any(-1).all() and (t5.any(-1).all() if has_t5 else not t5.any())
            torch.testing.assert_close(weights.sum(-1), torch.ones(1, count))
    first = seen[0].columns[seen[0].weights[0, 0].nonzero().flatten()]
    assert first.tolist() == [1, 2, 32, 33]  # T5's text has no beginning


def test_a_long_prompt_keeps_the_target_that_only_t5_has_whole(sd3_world, bare_sd3_world):
    prompt = ", ".join([BASE] + [f"a {color} hat" for color in ("red", "blue", "green", "purple", "blonde") * 2])
    output = draw(sd3_world.ours, prompt, target_prompt=TARGET, return_sfcm=True)
    assert output.target_maps[0, 0].max() == 1
    with pytest.raises(ValueError, match="does not fit into the 32 tokens"):
        draw(bare_sd3_world.ours, prompt, target_prompt=TARGET)


@pytest.mark.parametrize(("expected", "arguments"), GUIDANCES)
def test_guidance_is_what_separate_calls_compute(text_sd3_world, expected, arguments):
    check_guidance(text_sd3_world, expected, arguments)


def test_no_guidance_changes_nothing_to_the_bit(sd3_world):
    stock = draw(sd3_world.stock, FULL).images
    for arguments in ({"sfcm_guidance": 0.0}, {"sfcm_guidance": 0, "adapter_in_unconditional": True}):
        assert_equal(draw(sd3_world.ours, BASE, target_prompt=TARGET, **arguments).images, stock)
    guided = draw(sd3_world.ours, BASE, target_prompt=TARGET, sfcm_guidance=1.0).images
    assert np.abs(guided - stock).max() > 1e-3


def test_full_guidance_leaves_the_reference_outside_of_the_region(sd3_world):
    """With a mask of ones and zeros each latent is the one or the other model's."""
    arguments = {"target_prompt": TARGET, "output_type": "latent", "guidance_scale": 1.0, "compare": True}
    plain = draw(sd3_world.ours, BASE, **arguments)
    guided = draw(sd3_world.ours, BASE, sfcm_guidance=1.0, sfcm_guidance_exponent=1e6, **arguments).images
    kept, free = ((guided - own).abs().amax(1) < 1e-5 for own in (plain.reference_images, plain.images))
    assert (kept | free).all() and kept.sum() > 32 and free.sum() > 0


@pytest.mark.parametrize("guidance", [{}, {"sfcm_guidance": 0.5}], ids=["alone", "guided"])
def test_until_the_gate_opens_the_portrait_is_the_reference(guidance):
    world = SD3World()
    add_text_encoder_lora(world)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    check_that_references_part_when_the_gate_opens(world, scheduler, **guidance)


@pytest.mark.parametrize("callback", [None, SD3CFGCutoffCallback(cutoff_step_ratio=0.0)])
def test_a_gate_that_never_opens_leaves_the_original_models_portrait(text_sd3_world, callback):
    arguments = {"num_inference_steps": 2, "callback_on_step_end": callback, "height": 24, "width": 16}
    output = draw(text_sd3_world.ours, BASE, target_prompt=TARGET, sfcm_guidance_start=1e-6, **arguments)
    assert_close(output.images, draw(text_sd3_world.original, BASE, **arguments).images)


@pytest.mark.parametrize("arguments", [{}, {"compare": True, "return_sfcm": True}, {"sfcm_guidance": 0.5}])
def test_a_gate_that_is_always_open_changes_nothing_to_the_bit(text_sd3_world, arguments):
    arguments = {"target_prompt": TARGET, "num_inference_steps": 3, **arguments}
    without = draw(text_sd3_world.ours, BASE, **arguments)
    output = draw(text_sd3_world.ours, BASE, sfcm_guidance_start=1e9, **arguments)
    assert_equal(output.images, without.images)
    if "compare" in arguments:
        assert_equal(output.reference_images, without.reference_images)
        assert torch.equal(output.sfcm, without.sfcm) and torch.equal(output.target_maps, without.target_maps)


def test_velocities_become_noise_by_what_is_left_of_the_signal(own_sd3_world):
    """As two predictions of one noisy picture say it themselves; that of pure noise does not vanish."""
    pipeline, (latents, first, second) = own_sd3_world.ours, torch.randn(3, 1, 4, 2, 2)
    for timestep in (200.0, 800.0):
        sigma = timestep / 1000
        noises = [latents + (1 - sigma) * velocity for velocity in (first, second)]
        for velocity, noise in zip((first, second), noises):
            # The same picture, of the noise and of the signal that the velocity is made of.
            torch.testing.assert_close((1 - sigma) * (noise - velocity) + sigma * noise, latents)
        scale = pipeline._to_epsilon(torch.tensor(timestep))
        torch.testing.assert_close(noises[0] - noises[1], scale * (first - second))
    assert pipeline._to_epsilon(torch.tensor(1000.0)) == LEAST_SIGNAL
    ratios = {500.0: 1.0, 800.0: 4.0, 1000.0: 1 / LEAST_SIGNAL}
    for timestep, ratio in ratios.items():
        closed = [pipeline._gate(start)(torch.tensor(timestep)) for start in (0.99 * ratio, 1.01 * ratio)]
        assert closed == [True, False]
    own_sd3_world.use_scheduler(EDMEulerScheduler())  # no flow
    assert pipeline._to_epsilon(torch.tensor(800.0)) == 1
    with pytest.raises(ValueError, match="^`sfcm_guidance_start` .* EDMEulerScheduler "):
        draw(pipeline, BASE, target_prompt=TARGET, sfcm_guidance_start=5.0)


def test_maps_of_several_prompts_and_images_are_those_of_runs_of_their_own(sd3_world):
    arguments = {"target_prompt": TARGET, "return_sfcm": True}
    output = draw(sd3_world.ours, [BASE, OTHER], num_images_per_prompt=2, seed=[1, 2, 3, 4], **arguments)
    assert output.sfcm.shape == (4, 1, 8, 8) and output.phrase_maps.shape == (4, 3, 8, 8)
    assert output.phrases == [PHRASES] * 2 + [("a man", "a purple hat")] * 2 and output.targets == [(TARGET,)] * 4
    for image, prompt in enumerate([BASE, BASE, OTHER, OTHER]):
        alone = draw(sd3_world.ours, prompt, seed=image + 1, **arguments)
        phrases = len(alone.phrases[0])
        assert_close(output.sfcm[image : image + 1], alone.sfcm, 1e-3)
        assert_close(output.phrase_maps[image : image + 1, :phrases], alone.phrase_maps, 1e-3)
        assert_close(output.phrase_distances[image : image + 1, :phrases], alone.phrase_distances)
        assert_close(output.target_maps[image : image + 1], alone.target_maps, 1e-3)


def test_the_maps_of_each_step(sd3_world):
    arguments = {"target_prompt": TARGET, "num_images_per_prompt": 2, "num_inference_steps": 3, "seed": [1, 2]}
    output = draw(sd3_world.ours, BASE, return_sfcm="per_step", **arguments)
    assert output.sfcm_per_step.shape == (2, 3, 8, 8) and output.sfcm.shape == (2, 1, 8, 8)
    assert len({tuple(step.flatten().tolist()) for step in output.sfcm_per_step[0]}) == 3
    # Not even that of the first step, where there is no signal at all, is empty.
    assert output.sfcm_per_step.amax((-2, -1)).min() == 1


def test_without_a_target_the_map_is_what_the_lora_changes(sd3_world, bare_sd3_world):
    output = draw(sd3_world.ours, [BASE, OTHER], return_sfcm=True, seed=[1, 2])
    assert output.phrases == [PHRASES, ("a man", "a purple hat")]
    assert output.targets is output.target_maps is output.phrase_distances is None
    assert output.sfcm.max() == 1 and (output.sfcm == 0).any()
    output = draw(bare_sd3_world.ours, BASE, return_sfcm=True)
    assert output.sfcm is None and output.phrase_maps.shape == (1, 3, 8, 8)


def test_maps_and_embeddings_do_not_go_together(sd3_world):
    for arguments in ({"target_prompt": TARGET}, {"return_sfcm": True}):
        with pytest.raises(ValueError, match="need the text as `prompt`, not `prompt_embeds`"):
            draw(sd3_world.ours, **ONES, **arguments)


@pytest.mark.parametrize("name", ["prompt_2", "prompt_3", "negative_prompt", "negative_prompt_2", "negative_prompt_3"])
def test_weights_in_any_prompt_are_said_to_be_words(sd3_world, caplog, name):
    weights = f"({name} of three:1.2)"  # each is told once
    given = {"negative_prompt": "bad", name: f"a man, {weights}"}
    for _ in range(2):
        draw(sd3_world.ours, BASE, **given)
    (message,) = [record.getMessage() for record in caplog.records if record.name == "spf_arguments"]
    assert message.startswith(f"{weights!r} in a prompt is read as words: ")


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_visualize_shows_everything(sd3_world, output_type):
    output = draw(
        sd3_world.ours, [BASE, OTHER], target_prompt=TARGET, compare=True, return_sfcm=True, output_type=output_type
    )
    picture = sd3_world.ours.visualize(output, 1)
    assert picture.mode == "RGB" and picture.width == 4 * 198 + 6
    with pytest.raises(ValueError, match="return_sfcm"):
        sd3_world.ours.visualize(draw(sd3_world.ours, BASE))


# -------------------------------------------------------------------------------------------------------- adapters


def test_several_adapters_each_with_its_target_and_strength(own_sd3_world):
    world = own_sd3_world
    torch.manual_seed(3)
    world.ours.transformer.add_adapter(lora_config(["ff.net.2", "attn2.to_k"]), "hat")
    world.ours.transformer.set_adapter("style")
    before, targets = state(world.ours), {"style": "red hair", "hat": "a hat"}
    output = draw(world.ours, BASE, target_prompt=targets, target_scale={"hat": 0.5}, compare=True, return_sfcm=True)
    assert state(world.ours) == before
    world.stock.set_adapters(["style", "hat"], [1.0, 0.5])
    assert_close(output.images, draw(world.stock, f"{BASE}, red hair, a hat").images)
    assert_close(output.reference_images, draw(world.original, BASE).images)
    assert output.targets == [("red hair", "a hat")]


def test_the_text_encoders_adapters_are_scaled_with_it(text_sd3_world):
    before = state(text_sd3_world.ours)
    arguments = {"target_prompt": TARGET, "target_scale": {"text": 0.0, "style": 0.0}}
    with_all = draw(text_sd3_world.ours, BASE, target_prompt=TARGET).images
    original = draw(text_sd3_world.original, FULL).images
    assert_close(draw(text_sd3_world.ours, BASE, **arguments).images, original)
    assert np.abs(with_all - original).max() > 1e-3
    assert state(text_sd3_world.ours) == before


def test_a_lora_of_the_file_draws_what_the_stock_pipeline_draws(tmp_path, recwarn):
    write_sd3_lora(tmp_path, seed=7)
    ours, stock = SD3World(lora=False).ours, SD3World(lora=False).stock
    for pipeline in (ours, stock):
        pipeline.load_lora_weights(tmp_path)
    without = draw(SD3World(lora=False).stock, FULL).images
    expected = draw(stock, FULL).images
    assert np.abs(expected - without).max() > 1e-3
    assert_equal(draw(ours, FULL).images, expected)
    output = draw(ours, BASE, target_prompt=TARGET, compare=True)
    assert_close(output.images, expected)
    recwarn.clear()
    ours.load_lora_weights(tmp_path, adapter_name="second")
    assert not [own for own in recwarn if "peft_config" in str(own.message)]


def test_a_lora_for_another_transformer_is_refused_whole(sd3_world, tmp_path):
    bare = SD3World(lora=False).ours
    before = state(bare)
    lora_file(sd3_world, tmp_path / "deep", lambda layers: {k.replace("s.3.", "s.7."): v for k, v in layers.items()})
    with pytest.raises(ValueError, match=r"deep: is for another architecture: there is no layer transformer\."):
        bare.load_lora_weights(tmp_path / "deep")
    wide = write_sd3_lora(tmp_path / "wide", num_attention_heads=4, caption_projection_dim=32)
    with pytest.raises(ValueError, match="wide: is for another architecture: .* has 32 x 32 features, not 16 x 16"):
        bare.load_lora_weights(wide)
    assert state(bare) == before and not getattr(bare.transformer, "peft_config", {})


# ------------------------------------------------------------------------------------- the stock pipeline's own ways


def test_from_pipe_takes_a_plain_pipeline_with_its_lora(sd3_world):
    for kind in (SPFPortrait3Pipeline.from_pipe, StableDiffusion3Img2ImgPipeline.from_pipe):
        assert kind(sd3_world.stock).transformer is sd3_world.stock.transformer
    ours = SPFPortrait3Pipeline.from_pipe(sd3_world.stock)
    ours.set_progress_bar_config(disable=True)
    output = draw(ours, BASE, target_prompt=TARGET, compare=True)
    assert_close(output.images, draw(sd3_world.stock, FULL).images)
    assert_close(output.reference_images, draw(sd3_world.original, BASE).images)
    back = StableDiffusion3Pipeline.from_pipe(ours)
    back.set_progress_bar_config(disable=True)
    assert_equal(draw(back, BASE).images, draw(sd3_world.stock, BASE).images)


@pytest.mark.parametrize("with_t5", [True, False])
def test_what_it_saves_is_a_stock_pipeline(tmp_path, with_t5):
    world = SD3World(with_t5)
    expected = draw(world.stock, BASE).images
    with pytest.raises(ValueError, match="unload_lora_weights"):
        world.ours.save_pretrained(tmp_path)
    world.ours.fuse_lora()
    world.ours.unload_lora_weights()
    world.ours.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path, **({} if with_t5 else WITHOUT_T5))
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is StableDiffusion3Pipeline and (loaded.text_encoder_3 is not None) == with_t5
    assert_close(draw(loaded, BASE).images, expected)


@pytest.mark.parametrize("with_t5", [True, False])
def test_a_folder_is_loaded_and_t5_may_be_left_out(tmp_path, with_t5):
    ours = SPFPortrait3Pipeline.from_pretrained(write_sd3(tmp_path), **({} if with_t5 else WITHOUT_T5))
    ours.set_progress_bar_config(disable=True)
    output = draw(ours, BASE, target_prompt=TARGET, compare=True, return_sfcm=True)
    original = SD3World(with_t5, lora=False).original
    assert_close(output.reference_images, draw(original, BASE).images)
    assert_close(output.images, draw(original, FULL).images)


@pytest.mark.slow
def test_a_compiled_transformer(own_sd3_world):
    pipeline = own_sd3_world.ours
    pipeline.transformer = torch.compile(pipeline.transformer, backend="eager")
    expected = draw(own_sd3_world.stock, [FULL, BASE]).images
    assert_close(draw(pipeline, [FULL, BASE]).images, expected)
    output = draw(pipeline, BASE, target_prompt=TARGET, compare=True, return_sfcm=True)
    assert_close(output.images, expected[:1])
    assert_close(output.reference_images, draw(own_sd3_world.original, BASE).images)
    assert_close(draw(pipeline, [FULL, BASE]).images, expected)


def test_half_precision(own_sd3_world):
    for pipeline in (own_sd3_world.ours, own_sd3_world.original):
        pipeline.to(torch.bfloat16)
    output = draw(own_sd3_world.ours, BASE, target_prompt=TARGET, compare=True, return_sfcm=True)
    assert_close(output.images, draw(own_sd3_world.stock, FULL).images, 0.05)
    assert_close(output.reference_images, draw(own_sd3_world.original, BASE).images, 0.05)
    assert output.sfcm.dtype == output.phrase_distances.dtype == torch.float32 and output.sfcm.max() == 1


# ------------------------------------------------------------------------------------------------ the other families


def test_each_class_refuses_the_others_model(tokenizer):
    sd, xl, third = make_components(tokenizer), make_xl_components(tokenizer), make_sd3_components()
    names = {
        SPFPortraitPipeline: ("unet", sd, "pipeline_spf_portrait.py"),
        SPFPortraitXLPipeline: ("unet", xl, "pipeline_spf_portrait_xl.py"),
        SPFPortrait3Pipeline: ("transformer", third, "pipeline_spf_portrait_3.py"),
    }
    for kind, (name, components, own) in names.items():
        for model, others, right in names.values():
            if right != own:
                message = re.escape(f": use {right} instead of {own}.")
                with pytest.raises(ValueError, match=f"^The (UNet|transformer) is of Stable Diffusion .*{message}$"):
                    kind(**{**components, name: others[model]})
    flux = FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    with pytest.raises(ValueError, match="^A FluxTransformer2DModel is no model of Stable Diffusion 3.$"):
        SPFPortrait3Pipeline(**third | {"transformer": flux})
    assert SPFPortrait3Pipeline(**third | {"transformer": None}).transformer is None  # to encode prompts alone
