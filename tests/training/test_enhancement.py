"""Tests of the response enhancement: how it decodes, when it is computed, and its other forms."""

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, AutoencoderTiny
from test_train import difference, prepared, train, watch, watch_runs

import train_spf_portrait_lora as script
from training.enhancement import Enhancement


@pytest.fixture
def tiny_vae(world, tmp_path):
    """A tiny autoencoder with the latents of the base model's."""
    config = AutoencoderKL.load_config(world.model, subfolder="vae")
    levels = len(config["block_out_channels"])
    torch.manual_seed(0)
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8,) * levels,
        decoder_block_out_channels=(8,) * levels,
        num_encoder_blocks=(1,) * levels,
        num_decoder_blocks=(1,) * levels,
        latent_channels=config["latent_channels"],
    )
    vae.save_pretrained(tmp_path / "tiny_vae")
    return tmp_path / "tiny_vae"


def test_a_tiny_vae_decodes_for_the_enhancement_alone(world, tmp_path, tiny_vae, monkeypatch):
    runs, decoded = watch_runs(monkeypatch), watch(monkeypatch, Enhancement, "decode")
    losses = watch(monkeypatch, script, "train_step")
    train(world, tmp_path / "output", stage2_objective="paper", tiny_vae_model_name_or_path=tiny_vae)
    models, enhancement = runs[0].models, runs[0].enhancement
    assert isinstance(enhancement.decoder, AutoencoderTiny) and isinstance(models.pipeline.vae, AutoencoderKL)
    assert len(decoded) == 2 and decoded[0].shape[-2:] == (16, 16)
    assert "enhancement" in losses[-1] and models._kept == {"unet"}
    latents = torch.randn(1, *runs[0].training.latents[0].shape)
    torch.testing.assert_close(enhancement.decode(latents), enhancement.decoder.decode(latents).sample)


def test_clips_vision_tower_alone_stays_in_the_dtype_of_the_weights(world):
    """The targets are embedded before it is rounded; what it sees comes out in float32."""
    whole = prepared(world, stage2_objective="paper").parts.enhancement
    AcceleratorState._reset_state(reset_partial_state=True)
    half = prepared(world, stage2_objective="paper", mixed_precision="bf16").parts.enhancement
    for enhancement, dtype in ((whole, torch.float32), (half, torch.bfloat16)):
        parameters = dict(enhancement.clip.named_parameters())
        assert {parameter.dtype for parameter in parameters.values()} == {dtype}
        assert not any(name.startswith("text_") for name in parameters)
        assert enhancement._image_embeds.dtype == enhancement._targets.dtype == torch.float32
    assert torch.equal(half._targets, whole._targets)
    torch.testing.assert_close(half._image_embeds, whole._image_embeds, rtol=0.1, atol=0.1)


def test_the_enhancement_decodes_no_larger_than_clip_looks(world):
    """At 32 pixels, with a CLIP of 16: half the side, and the gradient goes through."""
    parts = prepared(world, stage2_objective="paper", resolution=32).parts
    latents = torch.randn(1, *parts.training.latents[0].shape, requires_grad=True)
    pixels = parts.enhancement.decode(latents)
    assert latents.shape[-2:] == (16, 16) and pixels.shape[-2:] == (16, 16)
    pixels.sum().backward()
    assert latents.grad.abs().min() > 0


def test_the_enhancement_in_every_second_step_weighs_double(world, tmp_path, monkeypatch):
    losses, objectives = watch(monkeypatch, script, "train_step"), watch(monkeypatch, script, "make_objectives")
    train(world, tmp_path / "output", stage2_objective="paper", enhancement_every=2, stage2_steps=4)
    assert ["enhancement" in step for step in losses[2:]] == [True, False, True, False]
    assert objectives[-1][-1].weights["enhancement"] == 2 * 20.0


@pytest.mark.parametrize("kind", ["direct", "none"])
def test_the_other_enhancement_losses(world, tmp_path, trained, monkeypatch, kind):
    steps = watch(monkeypatch, script, "train_step")
    output = train(world, tmp_path / "output", stage2_objective="paper", enhancement_loss=kind)
    assert ("enhancement" in steps[-1]) == (kind == "direct")
    assert difference(output, trained(stage2_objective="paper")) > 1e-4
