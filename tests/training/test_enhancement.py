"""Tests of the response enhancement: how it decodes, when it is computed, and its other forms."""

import weakref

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, AutoencoderTiny
from test_train import difference, prepared, train, watch, watch_runs

import train_spf_portrait_lora as script
from training.enhancement import Enhancement, row_by_row
from training.losses import enhancement_difference


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
    assert len(decoded) == 2 * 2 and decoded[0].shape == (1, 3, 16, 16)  # steps and rows
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


class Saved:
    """What a graph holds of a tensor as long as it lives."""

    def __init__(self, tensor):
        self.tensor = tensor


def test_the_enhancement_row_by_row_is_that_of_the_batch_at_once(world):
    """Value and gradient, and nothing of a row's decoding is left when the next one's begins, or afterwards."""
    parts = prepared(world, stage2_objective="paper", train_batch_size=3).parts
    enhancement, noise, batch = parts.enhancement, parts.models.noise, parts.batches.training(parts.training, 2)
    pred = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(1)).requires_grad_()

    latents = noise.original_sample(batch.noisy_latents, pred, batch.timesteps)
    seen = enhancement._see(enhancement.decode(latents))
    image_embeds = enhancement._image_embeds[batch.index]
    terms = enhancement_difference(seen, image_embeds, enhancement._targets[batch.pairs])
    expected = (noise.signal(batch.timesteps) * terms).mean()
    (gradient,) = torch.autograd.grad(7 * expected, pred)
    del latents, seen, terms

    graph, kept = weakref.WeakSet(), []

    def pack(tensor):
        graph.add(own := Saved(tensor))
        return own

    hook = enhancement.decoder.decoder.register_forward_pre_hook(lambda *_: kept.append(len(graph)))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda own: own.tensor):
        loss = enhancement.loss(batch, pred, noise, 2)
    hook.remove()
    assert kept == [kept[0]] * 3
    assert sum(own.tensor.numel() for own in graph) < 3 * pred.numel()
    torch.testing.assert_close(loss, expected)
    (own,) = torch.autograd.grad(7 * loss, pred)
    torch.testing.assert_close(own, gradient, rtol=1e-3, atol=1e-5 * gradient.abs().max().item())


def test_rows_are_drawn_as_often_as_they_would_weigh(world):
    """So the mean over the steps is that of the weighed loss; what is drawn is a function of seed and step."""
    run = prepared(world, stage2_objective="paper", train_batch_size=4, enhancement_weighting="drawn")
    enhancement, noise = run.parts.enhancement, run.parts.models.noise
    timesteps, steps = torch.tensor([0, 300, 600, 999]), 3000
    drawn = [enhancement.drawn(timesteps, step, noise).tolist() for step in range(steps)]
    share = torch.tensor([sum(place in rows for rows in drawn) / steps for place in range(4)])
    torch.testing.assert_close(share, noise.signal(timesteps), rtol=0, atol=4 * 0.5 / steps**0.5)
    assert [enhancement.drawn(timesteps, step, noise).tolist() for step in (7, 3)] == [drawn[7], drawn[3]]
    enhancement._seed += 1
    assert [enhancement.drawn(timesteps, step, noise).tolist() for step in range(20)] != drawn[:20]


def test_each_process_draws_its_part_of_the_rows(world):
    run = prepared(world, stage2_objective="paper", train_batch_size=4, enhancement_weighting="drawn")
    enhancement, noise, timesteps = run.parts.enhancement, run.parts.models.noise, torch.tensor([200, 400, 500, 600])
    alone = [enhancement.drawn(timesteps, step, noise).tolist() for step in range(20)]
    enhancement._num_processes, parts = 2, []
    for enhancement._process_index in (0, 1):
        own = timesteps[2 * enhancement._process_index :][:2]
        parts.append([enhancement.drawn(own, step, noise) + 2 * enhancement._process_index for step in range(20)])
    assert [torch.cat(both).tolist() for both in zip(*parts, strict=True)] == alone


@pytest.mark.parametrize("cached", [True, False])
def test_rows_that_are_not_drawn_cost_nothing(world, monkeypatch, cached):
    """Those that are have the weight 1; where there are none the loss is 0."""
    extra = {} if cached else {"no-cache_latents": True}
    run = prepared(world, stage2_objective="paper", train_batch_size=3, enhancement_weighting="drawn", **extra)
    enhancement, noise = run.parts.enhancement, run.parts.models.noise
    run.parts.training.start_reading(range(2, 3))
    batch = run.parts.batches.training(run.parts.training, 2)
    pred = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    decoded = watch(monkeypatch, Enhancement, "decode")
    for rows in ([0, 1, 2], [0, 2], [1], []):
        monkeypatch.setattr(Enhancement, "drawn", lambda *_, rows=rows: torch.tensor(rows, dtype=torch.long))
        decoded.clear()
        loss = enhancement.loss(batch, pred, noise, 2)
        assert len(decoded) == len(rows)
        if len(rows) == 3:
            parts = torch.autograd.grad(loss, pred)[0]
            whole = loss.item()
        elif rows:
            (own,) = torch.autograd.grad(loss, pred)
            expected = torch.zeros_like(parts).index_copy(0, torch.tensor(rows), parts[rows])
            torch.testing.assert_close(own, expected, rtol=1e-3, atol=1e-6)
            assert 0 < loss.item() < whole
        else:
            assert loss.item() == 0


def test_small_gradients_of_rows_are_not_lost_in_float16():
    """Each is 2^-27, below what float16 holds, and the scaler of the run comes later."""
    latents = torch.ones(2, 4, 8, 8, requires_grad=True)
    losses = row_by_row(lambda i, row: row.half().flatten(1).float().sum(1) * 2.0**-27, latents)
    (2.0**16 * losses.sum()).backward()
    assert torch.equal(losses.detach(), torch.full((2,), 256 * 2.0**-27))
    assert torch.equal(latents.grad, torch.full_like(latents, 2.0**-11))


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
