"""Tests of `families/stable_diffusion_xl.py`, on a tiny pipeline of random components of the real classes."""

import json
import logging
import shutil

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from pipeline_world import make_xl_components
from test_prompts import two_tokenizers, write_vocabulary  # noqa: F401 (fixture)
from transformers import CLIPTokenizer

from families.find import check_model
from families.stable_diffusion_xl import StableDiffusionXL
from pipeline_spf_portrait_xl import SPFPortraitXLPipeline
from programs.loading import InputError
from prompts import make_prompt_pair


PROMPTS = ["a woman, a green hat", "a man!! a hat", "a woman"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("xl")
    tokenizer = CLIPTokenizer.from_pretrained(write_vocabulary(folder / "vocabulary"), model_max_length=77)
    StableDiffusionXLPipeline(**make_xl_components(tokenizer)).save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def pipeline(folder):
    return SPFPortraitXLPipeline.from_pretrained(folder)


def tokens(pipeline, prompts):
    names = [getattr(pipeline, name) for name in StableDiffusionXL.tokenizers]
    return torch.tensor(StableDiffusionXL.tokenize(names, prompts))


def changed(folder, tmp_path, **changes):
    """The model without weights, some of its configurations changed: file without .json -> values."""
    model = tmp_path / "model"
    shutil.copytree(folder, model, ignore=shutil.ignore_patterns("*.safetensors"))
    for name, values in changes.items():
        path = model / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return str(model)


# ------------------------------------------------------------------------------------------------- what can be trained


def test_what_is_known_without_weights(folder, tmp_path):
    family, facts = check_model(changed(folder, tmp_path))
    assert family is StableDiffusionXL and family.pipeline_class is SPFPortraitXLPipeline
    assert [config.hidden_size for config in facts.text_configs] == [16, 12] and len(facts.tokenizers) == 2
    assert facts.side_multiple == 4 and facts.noise.num_train_timesteps == 1000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unet/config": {"projection_class_embeddings_input_dim": 50}}, ", unet: is told 50 numbers .* training for"),
        ({"unet/config": {"addition_time_embed_dim": None}}, ", unet: is told 58 numbers besides the prompt"),
        ({"unet/config": {"in_channels": 9}}, ", unet: it takes 9 channels and not 4"),
        ({"model_index": {"text_encoder": [None, None]}}, ", unet: the refiner of Stable Diffusion XL"),
    ],
)
def test_what_there_is_no_training_for_is_named(folder, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        check_model(changed(folder, tmp_path, **changes))


@pytest.mark.parametrize("part", ["text_encoder_2", "tokenizer_2"])
def test_a_part_that_is_missing_is_named(folder, tmp_path, part):
    model = changed(folder, tmp_path)
    shutil.rmtree(f"{model}/{part}")
    with pytest.raises(InputError, match=f"^--pretrained_model_name_or_path {model}.*{part}"):
        check_model(model)


@pytest.mark.parametrize(
    ("name", "changes", "warned"),
    [
        ("sdxl-turbo", {}, True),
        ("RealVis_Lightning", {}, True),
        ("dreamshaperXL_v21TurboDPMSDE", {}, True),
        ("realvisxlV50_v50LightningBakedvae", {}, True),
        ("juggernautXL_lightningByRD", {}, True),
        ("hypernova", {}, False),
        ("dream", {"scheduler/scheduler_config": {"_class_name": "LCMScheduler"}}, True),
        ("dream", {"unet/config": {"time_cond_proj_dim": 256}}, True),
        ("dream", {}, False),
    ],
)
def test_a_distilled_model_is_warned_of(folder, tmp_path, caplog, name, changes, warned):
    # The name of a folder above says nothing.
    (tmp_path / "lcm").mkdir()
    model = shutil.move(changed(folder, tmp_path, **changes), tmp_path / "lcm" / name)
    with caplog.at_level(logging.WARNING):
        check_model(str(model))
    assert ("seems to be distilled" in caplog.text) == warned


# ---------------------------------------------------------------------------------------------------------- prompts


@torch.no_grad()
def test_prompts_are_encoded_as_the_stock_pipeline_does(pipeline):
    embeds = StableDiffusionXL.encode(pipeline, tokens(pipeline, PROMPTS))
    states, _, pooled, _ = pipeline.encode_prompt(PROMPTS, None, "cpu", 1, False)
    assert torch.equal(embeds.states, states) and torch.equal(embeds.pooled, pooled)
    assert StableDiffusionXL.pooled_dim(pipeline) == pooled.shape[1]
    packed = embeds.packed()
    assert packed.shape == (3, 77 * 28 + 10)
    again = embeds.unpacked(packed, 77, 10)
    assert torch.equal(again.states, states) and torch.equal(again.pooled, pooled)


@torch.no_grad()
@pytest.mark.parametrize("zeros", [True, False])
def test_nothing_asked_is_what_the_models_own_guidance_has(pipeline, zeros):
    own = SPFPortraitXLPipeline(**pipeline.components, force_zeros_for_empty_prompt=zeros, add_watermarker=False)
    embeds = StableDiffusionXL.encode(own, tokens(own, ["a man", ""]))
    _, negative, _, negative_pooled = own.encode_prompt("a man", None, "cpu", 1, True)
    torch.testing.assert_close(embeds.states[1:], negative)
    torch.testing.assert_close(embeds.pooled[1:], negative_pooled)
    assert (embeds.states[1].abs().max() == 0) == zeros and embeds.states[0].abs().max() > 0


def test_a_word_that_one_tokenizer_counts_twice_is_located_in_both(two_tokenizers):  # noqa: F811
    pair = make_prompt_pair("a woman!! a green jacket", "red hair")
    located, alone = (StableDiffusionXL.locate(pair, own) for own in (two_tokenizers, two_tokenizers[:1]))
    assert len(located.target_positions) > len(alone.target_positions)


@torch.no_grad()
def test_distances_are_those_that_the_pipeline_draws_with(pipeline):
    pair = make_prompt_pair("a woman, a green hat", "red hair")
    located = StableDiffusionXL.locate(pair, [pipeline.tokenizer, pipeline.tokenizer_2])
    (own,) = StableDiffusionXL.distances(pipeline, [pair], [located])
    assert torch.equal(own, pipeline._phrase_distances([pair], [located])[0]) and own.min() > 0


# ----------------------------------------------------------------------------------------------- denoiser and latents


@torch.no_grad()
def test_the_unet_is_told_prompt_pooled_and_sizes(pipeline):
    embeds = StableDiffusionXL.encode(pipeline, tokens(pipeline, PROMPTS[:2]))
    sizes = torch.tensor([[16.0, 16, 0, 0, 16, 16], [1333, 1023, 7, 0, 16, 16]])
    latents, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([10, 500])
    added = {"text_embeds": embeds.pooled, "time_ids": sizes}
    expected = pipeline.unet(latents, timesteps, embeds.states, added_cond_kwargs=added).sample
    own = StableDiffusionXL.predict(pipeline.unet, latents, timesteps, embeds.of(sizes))
    assert torch.equal(own, expected)
    whole = StableDiffusionXL.predict(pipeline.unet, latents, timesteps, embeds.of(sizes[:1].repeat(2, 1)))
    assert torch.equal(whole[0], own[0]) and not torch.allclose(whole[1], own[1])


@torch.no_grad()
@pytest.mark.parametrize("moments", [{}, {"latents_mean": [0.5, -1, 0, 2], "latents_std": [2.0, 1, 3, 0.5]}])
def test_latents_are_scaled_as_the_stock_pipeline_unscales_them(pipeline, moments):
    vae, pixels = pipeline.vae, torch.rand(2, 3, 16, 16) * 2 - 1
    before = {name: vae.config[name] for name in ("latents_mean", "latents_std")}
    vae.register_to_config(**moments)
    try:
        latents = StableDiffusionXL.to_latents(vae, pixels)
        plain = vae.encode(pixels).latent_dist.mode()
        mean, std = (torch.tensor(moments.get(name, [value] * 4)).view(1, 4, 1, 1)
                     for name, value in (("latents_mean", 0.0), ("latents_std", 1.0)))  # fmt: skip
        torch.testing.assert_close(latents, (plain - mean) * vae.config.scaling_factor / std)
        torch.testing.assert_close(StableDiffusionXL.to_pixels(vae, latents), vae.decode(plain).sample)
    finally:
        vae.register_to_config(**before)


@pytest.mark.parametrize(
    ("upcast", "dtype", "expected"),
    [
        (True, torch.float16, torch.float32),
        (False, torch.float16, torch.float16),
        (True, torch.bfloat16, torch.bfloat16),
        (True, torch.float32, torch.float32),
    ],
)
def test_a_vae_that_overflows_in_half_is_kept_in_float32(pipeline, upcast, dtype, expected):
    vae = pipeline.vae
    before = vae.config.force_upcast
    vae.register_to_config(force_upcast=upcast)
    try:
        assert StableDiffusionXL.vae_dtype(vae, dtype) == expected
    finally:
        vae.register_to_config(force_upcast=before)
