"""Tests of `pipeline_spf_portrait.py`: the stock call and the stock pipeline's ways, on tiny random components."""

import inspect
import logging
import warnings
from operator import attrgetter

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import cpu_offload_with_hook
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
)
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from pipeline_world import (
    BASE,
    FULL,
    OTHER,
    TARGET,
    World,
    add_ip_adapter,
    assert_close,
    assert_equal,
    draw,
    lora_file,
    state,
)
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
)

from pipeline_spf_portrait import SPFPortraitPipeline


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
        ("sfcm_guidance_start", None),
        ("adapter_in_unconditional", True),
    ]


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_without_our_arguments_the_images_are_the_stock_ones_to_the_bit(world, bare_world, output_type):
    for own in (world, bare_world):
        ours = draw(own.ours, BASE, output_type=output_type, num_inference_steps=2)
        assert type(ours).__name__ == "StableDiffusionPipelineOutput"
        stock = draw(own.stock, BASE, output_type=output_type, num_inference_steps=2)
        assert_equal(ours.images, stock.images)


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
SCHEDULERS = {
    "timesteps": DDPMScheduler(beta_schedule="scaled_linear", clip_sample=False, variance_type="fixed_small"),
    "sigmas": EulerDiscreteScheduler(steps_offset=1),
}


@pytest.fixture(scope="module")
def worlds(tokenizer, world):
    """By stock argument the world that a call with it needs. No test may change them."""
    found = dict.fromkeys(STOCK_ARGUMENTS, world)
    for name, scheduler in SCHEDULERS.items():
        found[name] = World(tokenizer)
        found[name].use_scheduler(scheduler)
    found["ip_adapter_image"] = found["ip_adapter_image_embeds"] = World(tokenizer)
    add_ip_adapter(found["ip_adapter_image"])
    return found


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
def test_every_stock_argument_is_passed_on_to_the_bit(worlds, name):
    world, arguments = worlds[name], {"prompt": BASE, **STOCK_ARGUMENTS[name]}
    ours = draw(world.ours, **arguments)
    assert_equal(ours[0], draw(world.stock, **stock_arguments(world.stock, arguments))[0])
    if name in EFFECTS:
        assert np.abs(ours[0] - draw(world.stock, BASE)[0]).max() > 1e-4


@pytest.mark.parametrize("name", [name for name in STOCK_ARGUMENTS if name not in ("return_dict", "kwargs")])
def test_every_stock_argument_goes_with_compare(worlds, name):
    world, arguments = worlds[name], {"prompt": BASE, **STOCK_ARGUMENTS[name]}
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
    expected = draw(own_world.stock, [FULL, BASE]).images
    assert_close(draw(pipeline, [FULL, BASE]).images, expected)
    output = draw(pipeline, BASE, target_prompt=TARGET, compare=True, return_sfcm=True)
    assert_close(output.reference_images, draw(own_world.original, BASE).images)
    assert output.sfcm.max() == 1
    output = draw(pipeline, BASE, target_prompt=TARGET, compare=True)
    assert_close(output.reference_images, draw(own_world.original, BASE).images)
    assert_close(draw(pipeline, [FULL, BASE]).images, expected)
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
def test_a_lora_for_another_architecture_is_refused_whole(world, bare_world, tmp_path, change, message):
    folder, ours = lora_file(world, tmp_path / "lora", change), bare_world.ours
    before = state(ours)
    with pytest.raises(ValueError, match=rf"(?s)lora: is for another architecture.*{message}.*trained on"):
        ours.load_lora_weights(folder)
    assert state(ours) == before and not getattr(ours.unet, "peft_config", {})


@pytest.mark.parametrize(
    "change",
    [
        lambda layers: {key: value for key, value in layers.items() if "mid_block" not in key or "down" in key},
        lambda layers: {key: value[:1].contiguous() if "lora.down" in key else value for key, value in layers.items()},
    ],
)
def test_a_lora_whose_matrices_do_not_belong_together_is_refused(world, bare_world, tmp_path, change):
    folder = lora_file(world, tmp_path / "lora", lambda layers: contiguous(change(layers)))
    with pytest.raises(ValueError, match=r"(?s)lora: layer 'unet\..*attn.* has (no lora_up|the ranks)"):
        bare_world.ours.load_lora_weights(folder)
    assert not getattr(bare_world.ours.unet, "peft_config", {})


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
    assert_close(draw(bare.ours, BASE).images, draw(world.stock, BASE).images)
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
