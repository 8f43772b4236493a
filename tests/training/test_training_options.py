"""Tests of the trainer's options that are not the method: models, data, caches, LoRA, optimisation, precision."""

import importlib.util
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusionPipeline
from diffusers.models import attention_processor
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from safetensors.torch import load_file
from test_train import (  # noqa: F401 (fixtures)
    ROWS,
    SMOOTH,
    WEIGHTS,
    adapter_state,
    copy_model,
    difference,
    fresh_accelerator,
    train,
    trained,
    watch,
    watch_runs,
    world,
    write_data,
)

import train_spf_portrait_lora as script
from programs.picture_files import load_picture
from training.losses import diffusion_loss


@pytest.fixture
def losses(monkeypatch):
    """The losses of every step, by name."""
    return watch(monkeypatch, "train_step")


# ------------------------------------------------------------------------------------------------------------- models


def test_a_prediction_type_of_the_flag(world, tmp_path, monkeypatch):  # noqa: F811
    """The training's target and the pictures are both of it."""
    runs, batches, targets = watch_runs(monkeypatch), watch(monkeypatch, "draw_batch"), []
    monkeypatch.setattr(
        script, "diffusion_loss", lambda pred, target: targets.append(target) or diffusion_loss(pred, target)
    )
    train(world, tmp_path / "output", prediction_type="v_prediction", stage2_steps=0, num_validation_images=1)
    assert runs[0].pipeline.scheduler.config.prediction_type == "v_prediction"
    batch = batches[0]
    alpha_bar = runs[0].noise_scheduler.alphas_cumprod[batch.timesteps].view(-1, 1, 1, 1)
    velocity = alpha_bar.sqrt() * batch.noise - (1 - alpha_bar).sqrt() * batch.latents
    torch.testing.assert_close(targets[0], velocity)


def test_another_vae(world, tmp_path, monkeypatch):  # noqa: F811
    torch.manual_seed(7)
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(world.model, subfolder="vae"))
    vae.save_pretrained(tmp_path / "vae")
    runs = watch_runs(monkeypatch)
    flags = {"pretrained_vae_model_name_or_path": tmp_path / "vae", "stage2_steps": 0}
    train(world, tmp_path / "output", **flags)
    used = runs[0].pipeline.vae.state_dict()
    assert all(torch.equal(used[name], value) for name, value in vae.state_dict().items())


@pytest.fixture
def tiny_vae(world, tmp_path):  # noqa: F811
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


def test_a_tiny_vae_decodes_for_the_enhancement_alone(world, tmp_path, tiny_vae, monkeypatch, losses):  # noqa: F811
    runs, decoded = watch_runs(monkeypatch), watch(monkeypatch, "decode_for_clip")
    train(world, tmp_path / "output", stage2_objective="paper", tiny_vae_model_name_or_path=tiny_vae)
    run = runs[0]
    assert isinstance(run.decoder, AutoencoderTiny) and isinstance(run.pipeline.vae, AutoencoderKL)
    assert len(decoded) == 2 and decoded[0].shape[-2:] == (16, 16)
    assert "enhancement" in losses[-1] and run.released == ("vae", "text_encoder")
    latents = torch.randn(1, *run.training.latents[0].shape)
    torch.testing.assert_close(script.decode_for_clip(run, latents), run.decoder.decode(latents).sample)


def test_the_enhancement_decodes_no_larger_than_clip_looks(world, tmp_path, monkeypatch):  # noqa: F811
    """At 32 pixels, with a CLIP of 16: half the side, and the gradient goes through."""
    runs, decoded = watch_runs(monkeypatch), watch(monkeypatch, "decode_for_clip")
    train(world, tmp_path / "output", stage2_objective="paper", resolution=32)
    assert [tuple(pixels.shape[-2:]) for pixels in decoded] == [(16, 16)] * 2
    latents = torch.randn(1, *runs[0].training.latents[0].shape, requires_grad=True)
    script.decode_for_clip(runs[0], latents).sum().backward()
    assert latents.grad.abs().min() > 0


def test_the_enhancement_in_every_second_step_weighs_double(world, tmp_path, monkeypatch, losses):  # noqa: F811
    weights = watch(monkeypatch, "loss_weights")
    train(world, tmp_path / "output", stage2_objective="paper", enhancement_every=2, stage2_steps=4)
    assert ["enhancement" in step for step in losses[2:]] == [True, False, True, False]
    assert weights[-1]["enhancement"] == 2 * 20.0


def test_models_that_no_step_uses_leave_the_device_and_come_back(world, tmp_path, monkeypatch):  # noqa: F811
    """Seen in their `to`: on a machine without a GPU both places are one."""
    runs = watch_runs(monkeypatch)
    train(world, tmp_path / "output", stage2_steps=0)
    run, moves = runs[0], []
    assert run.released == ("vae", "text_encoder") and run.clip is None
    for name in ("vae", "text_encoder", "unet"):
        monkeypatch.setattr(
            getattr(run.pipeline, name), "to", lambda place, name=name: moves.append((name, str(place)))
        )
    fake = replace(run, accelerator=SimpleNamespace(device=torch.device("cuda:0")))
    with script.resident(fake):
        assert moves == [("vae", "cuda:0"), ("text_encoder", "cuda:0")]
    assert moves[2:] == [("vae", "cpu"), ("text_encoder", "cpu")]


@pytest.mark.parametrize(
    "flags, released",
    [
        ({"stage2_objective": "paper"}, ("text_encoder",)),
        ({"stage2_objective": "paper", "enhancement_loss": "none"}, ("vae", "text_encoder")),
        ({"cache_text_embeddings": False}, ("vae",)),
        ({"cache_latents": False}, ("text_encoder",)),
    ],
    ids=["enhancement", "no enhancement", "prompts each step", "pictures each step"],
)
def test_what_a_step_uses_stays(world, tmp_path, monkeypatch, flags, released):  # noqa: F811
    runs = watch_runs(monkeypatch)
    train(world, tmp_path / "output", **negatives(flags))
    assert runs[0].released == released
    assert (runs[0].clip is None) == ("enhancement_loss" in flags or "stage2_objective" not in flags)


def negatives(flags: dict) -> dict:
    """`False` as the flag that says no."""
    return {(f"no-{name}" if value is False else name): value is False or value for name, value in flags.items()}


# --------------------------------------------------------------------------------------------------------------- data


@pytest.fixture
def striped(tmp_path):
    """Six pictures of three shapes: two wide, three tall, one square."""
    folder = write_data(tmp_path / "striped")
    for i, size in enumerate([(32, 16), (30, 16), (16, 32), (18, 32), (16, 30), (20, 20)]):
        pixels = np.random.default_rng(i).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


BUCKETS = {"aspect_ratio_buckets": "16,32;32,16;16,16"}


@pytest.mark.parametrize("source", ["generated", "data", "both"])
@pytest.mark.parametrize("objective", ["composed", "both"])
def test_buckets(world, tmp_path, striped, monkeypatch, objective, source):  # noqa: F811
    runs, batches = watch_runs(monkeypatch), watch(monkeypatch, "draw_batch")
    alignments = watch(monkeypatch, "prepare_alignment")
    flags = {"stage2_objective": objective, "alignment_source": source, "num_alignment_images": 6, "stage2_steps": 4}
    output = train(
        world, tmp_path / "output", train_data_dir=striped, num_validation_images=2, stage1_steps=6, **BUCKETS, **flags
    )
    sizes = [tuple(latents.shape[-2:]) for latents in runs[0].training.latents]
    assert sizes == [(8, 16), (8, 16), (16, 8), (16, 8), (16, 8), (8, 8)]
    seen = Counter(i for batch in batches[:6] for i in batch.index.tolist())
    assert seen == dict.fromkeys(range(6), 2), "in six batches of two each portrait comes twice"
    for batch in batches:
        assert batch.noise.shape == batch.latents.shape == batch.noisy_latents.shape
    alignment = alignments[0]
    assert len(alignment.latents) == len(alignment.sfcm) == {"generated": 6, "data": 6, "both": 12}[source]
    for latents, sfcm, bucket in zip(alignment.latents, alignment.sfcm, alignment.buckets, strict=True):
        assert tuple(latents.shape[-2:]) == tuple(sfcm.shape[-2:]) == [(8, 16), (16, 8), (8, 8)][bucket]
    if source == "generated":
        assert sorted(alignment.buckets) == [0, 0, 1, 1, 1, 2]
    with Image.open(output / "validation" / "step_000010.png") as picture:
        assert picture.size == (4 * (192 + 6) + 6, 2 * (96 + 6) + 6 + 22), "the first portrait is wide"


def test_one_bucket_is_the_resolution(world, tmp_path, trained):  # noqa: F811
    output = train(world, tmp_path / "output", aspect_ratio_buckets="16,16", resolution=512)
    assert difference(output, trained()) == 0


def test_drawn_portraits_of_several_sizes_are_shared(world, tmp_path, striped, monkeypatch):  # noqa: F811
    runs, alignments = watch_runs(monkeypatch), watch(monkeypatch, "prepare_alignment")
    flags = {"num_alignment_images": 6, "stage1_steps": 1, "stage2_steps": 1}
    train(world, tmp_path / "output", train_data_dir=striped, **BUCKETS, **flags)
    shares = {}
    for index in range(2):
        accelerator = SimpleNamespace(
            num_processes=2,
            process_index=index,
            is_local_main_process=False,
            device=torch.device("cpu"),
            gather=lambda latents, index=index: shares.setdefault(index, []).append(latents) or latents,
        )
        script.draw_alignment_portraits(replace(runs[0], accelerator=accelerator))
    counts = Counter(alignments[0].buckets)
    start = 0
    for place, bucket in enumerate(sorted(counts)):
        drawn = torch.cat([shares[0][place], shares[1][place]])[: counts[bucket]]
        expected = torch.stack(alignments[0].latents[start : start + counts[bucket]])
        torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=1e-4)
        start += counts[bucket]


def test_mirrored_pictures(world, tmp_path, monkeypatch, losses):  # noqa: F811
    runs, batches = watch_runs(monkeypatch), watch(monkeypatch, "draw_batch")
    flags = {"random_flip": True, "stage1_steps": 12, "stage2_objective": "paper"}
    train(world, tmp_path / "output", **flags)
    run = runs[0]
    assert len(run.training.latents) == len(run.training.image_embeds) == 12
    index = torch.cat([batch.index for batch in batches[:12]])
    assert 4 < (index >= 6).sum() < 20 and torch.bincount(index % 6).tolist() == [4] * 6
    mirrored = run.training_set.pixels(script.Sample(2, flip=True))
    assert torch.equal(mirrored, run.training_set.pixels(script.Sample(2)).flip(-1))
    expected = script.encode_pixels(run.pipeline.vae, mirrored[None])[0]
    torch.testing.assert_close(run.training.latents[6 + 2], expected)
    pairs = torch.cat([batch.pairs for batch in batches[:12]])
    assert torch.equal(pairs, index % 6)


def test_crops_anywhere(world, tmp_path, monkeypatch):  # noqa: F811
    batches = watch(monkeypatch, "draw_batch")
    runs = watch_runs(monkeypatch)
    flags = negatives({"center_crop": False, "cache_latents": False, "stage2_steps": 0, "stage1_steps": 4})
    train(world, tmp_path / "output", **flags)
    samples = [run_sample for i in range(4) for run_sample in runs[0].training_set.samples(i)]
    centres = {sample.centering for sample in samples}
    assert len(centres) == 8 and all(0 <= part <= 1 for centre in centres for part in centre)
    pixels = torch.cat([batch.pixels for batch in batches])
    whole = torch.stack([runs[0].training_set.pixels(sample) for sample in samples])
    assert torch.equal(pixels, whole)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_read_the_same_pictures(world, tmp_path, trained, workers):  # noqa: F811
    flags = negatives({"cache_latents": False}) | {"dataloader_num_workers": workers, **SMOOTH}
    output = train(world, tmp_path / "output", **flags)
    assert difference(output, trained(**SMOOTH)) < 1e-5


def test_repeats(world, tmp_path, monkeypatch):  # noqa: F811
    """An epoch holds each portrait as often, in an order that may repeat one before all were there."""
    batches = watch(monkeypatch, "draw_batch")
    train(world, tmp_path / "output", repeats=3, stage1_steps=9, stage2_steps=0)
    index = torch.cat([batch.index for batch in batches])
    assert torch.bincount(index).tolist() == [3] * 6
    assert torch.bincount(index[:6], minlength=6).tolist() != [1] * 6


def test_the_interpolation_mode(world, tmp_path, monkeypatch):  # noqa: F811
    runs = watch_runs(monkeypatch)
    train(world, tmp_path / "output", image_interpolation_mode="nearest", stage2_steps=0)
    pixels = (runs[0].training_set.pixels(script.Sample(5)) + 1) * 127.5
    whole = np.asarray(load_picture(runs[0].inputs.rows[5].image, "")).reshape(-1, 3)
    colors = {tuple(color) for color in whole.tolist()}
    assert {tuple(color) for color in pixels.flatten(1).T.round().int().tolist()} <= colors


# ------------------------------------------------------------------------------------------------------------- caches


CACHES = [
    {"cache_latents": False},
    {"cache_text_embeddings": False},
    {"cache_latents": False, "cache_text_embeddings": False, "random_flip": True},
]


@pytest.mark.parametrize("objective", ["composed", "both"])
@pytest.mark.parametrize("flags", CACHES, ids=["pictures", "prompts", "all, mirrored"])
def test_cached_and_uncached_have_equal_losses(world, tmp_path, losses, objective, flags):  # noqa: F811
    shared = {"stage2_objective": objective, **SMOOTH}
    train(world, tmp_path / "cached", **shared, **{name: value for name, value in flags.items() if value is True})
    train(world, tmp_path / "uncached", **shared, **negatives(flags))
    cached, uncached = losses[:4], losses[4:]
    for first, second in zip(cached, uncached, strict=True):
        assert first == pytest.approx(second, rel=1e-4, abs=1e-6)
    assert difference(tmp_path / "cached", tmp_path / "uncached") < 1e-4


def test_a_cache_on_disk_serves_the_next_run(world, tmp_path, trained, monkeypatch):  # noqa: F811
    flags = {"cache_dir": tmp_path / "cache", "random_flip": True, "stage2_objective": "paper"}
    encoded, calls = [], watch(monkeypatch, "encode_pixels")
    for name in ("first", "second", "third"):
        before = len(calls)
        if name == "third":  # a picture changes under its name, and it alone is encoded again
            data = write_data(tmp_path / "data")
            Image.new("RGB", (20, 20), "red").save(data / "4.png")
            flags["train_data_dir"] = data
        train(world, tmp_path / name, **flags)
        encoded.append(len(calls) - before)
    assert encoded == [12, 0, 2]
    assert difference(tmp_path / "first", tmp_path / "second") == 0
    assert difference(tmp_path / "first", trained(random_flip=True, stage2_objective="paper")) == 0


def test_prompts_on_disk_are_not_encoded_again(world, tmp_path, monkeypatch):  # noqa: F811
    tables = watch(monkeypatch, "make_prompt_table")
    flags = {"cache_dir": tmp_path / "cache"}
    train(world, tmp_path / "first", **flags)
    from training import prompt_table as conditioning

    calls, encode = [], conditioning.TensorCache.get_or_compute

    def forbid(cache, keys, compute):
        return encode(cache, keys, lambda missing: calls.append(missing) or compute(missing))

    monkeypatch.setattr(conditioning.TensorCache, "get_or_compute", forbid)
    train(world, tmp_path / "second", **flags)
    assert calls == []
    assert torch.equal(tables[0].prompt_embeds.states, tables[1].prompt_embeds.states)


# --------------------------------------------------------------------------------------------------------------- LoRA


def test_lora_layers(world, tmp_path, trained):  # noqa: F811
    """Layers of both namings in one file, all of which the stock loader takes."""
    output = train(world, tmp_path / "output", lora_layers="proj_in,attn2.to_k,conv1", stage2_objective="both")
    names = {name.rsplit(".lora_", 1)[0] for name in load_file(output / WEIGHTS)}
    ends = Counter(name.split(".")[-1] for name in names)
    assert set(ends) == {"proj_in", "to_k", "conv1"} and all(".attn1." not in name for name in names)
    pipeline = StableDiffusionPipeline.from_pretrained(world.model, safety_checker=None)
    pipeline.load_lora_weights(output)
    loaded = [name for name, layer in pipeline.unet.named_modules() if isinstance(layer, BaseTunerLayer)]
    assert {f"unet.{name}" for name in loaded} == names


@pytest.mark.parametrize("objective", ["composed", "both"])
def test_dora(world, tmp_path, monkeypatch, objective):  # noqa: F811
    runs, states, step = watch_runs(monkeypatch), [], script.train_step
    latents = torch.randn(1, 4, 8, 8)

    def predict_and_step(run, stage, global_step, *args):
        if global_step == 2 and objective == "composed":
            call = (latents, torch.tensor([500]), run.table.prompt_embeds.states[:1])
            with torch.no_grad():
                adapted = run.unet(*call).sample
                with script.active_adapters(run.unet, None):
                    states.append((adapted, run.unet(*call).sample))
        return step(run, stage, global_step, *args)

    monkeypatch.setattr(script, "train_step", predict_and_step)
    flags = {"use_dora": True, "stage2_objective": objective, "num_validation_images": 1}
    output = train(world, tmp_path / "output", **flags)
    state = load_file(output / WEIGHTS)
    magnitudes = [name for name in state if "lora_magnitude_vector" in name]
    assert len(magnitudes) * 3 == len(state)
    for adapted, original in states:
        torch.testing.assert_close(adapted, original, rtol=1e-4, atol=1e-5)
    # Stage 1 starts at the norms of the weights, and so does stage 2 from zero.
    norms = {
        f"unet.{name}.lora_magnitude_vector": layer.get_base_layer().weight.norm(dim=1)
        for name, layer in runs[0].unet.named_modules()
        if isinstance(layer, BaseTunerLayer)
    }
    moved = max((state[name].flatten() - norms[name.removesuffix(".weight")]).abs().max() for name in magnitudes)
    assert 1e-3 < moved < 0.2
    pipeline = StableDiffusionPipeline.from_pretrained(world.model, safety_checker=None)
    pipeline.load_lora_weights(output)
    loaded = adapter_state(pipeline.unet, pipeline.get_active_adapters()[0])
    assert difference(loaded, state) == 0


def test_dropout_is_on_in_the_training_forward_alone(world, tmp_path, monkeypatch, trained):  # noqa: F811
    runs, modes = watch_runs(monkeypatch), []
    unet_of, forward = watch(monkeypatch, "draw_validation"), script.UNet2DConditionModel.forward

    def note_and_forward(self, *args, **kwargs):
        layer = next(module for module in self.modules() if isinstance(module, BaseTunerLayer))
        modes.append((torch.is_grad_enabled(), {name: drop.training for name, drop in layer.lora_dropout.items()}))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(script.UNet2DConditionModel, "forward", note_and_forward)
    flags = {"lora_dropout": 0.5, "stage2_objective": "both", "num_validation_images": 1, "validation_steps": 1}
    output = train(world, tmp_path / "output", **flags)
    assert {mode["default"] for grad, mode in modes if grad} == {True}
    assert not any(mode.get(script.STAGE1_ADAPTER) for _, mode in modes)
    drawn = [mode["default"] for grad, mode in modes if not grad]
    assert False in drawn and len(unet_of) == 5
    assert not any(module.training for module in runs[0].unet.modules())
    assert difference(output, trained(stage2_objective="both")) > 1e-4
    again = train(world, tmp_path / "again", **{**flags, "num_validation_images": 0})
    assert difference(output, again) == 0


# ------------------------------------------------------------------------------------------------------- optimisation


def test_min_snr_weighs_the_diffusion_loss(world, tmp_path, monkeypatch, losses):  # noqa: F811
    batches, runs = watch(monkeypatch, "draw_batch"), watch_runs(monkeypatch)
    raw = watch(monkeypatch, "diffusion_loss")
    train(world, tmp_path / "output", snr_gamma=0.5, stage2_steps=0, stage1_steps=1)
    alpha_bar = runs[0].noise_scheduler.alphas_cumprod[batches[0].timesteps]
    snr = alpha_bar / (1 - alpha_bar)
    expected = (raw[0].detach() * snr.clamp(max=0.5) / snr).mean().item()
    assert losses[0]["diffusion"] == pytest.approx(expected, rel=1e-5)


def test_the_noise_offset_is_one_a_channel(world, tmp_path, monkeypatch):  # noqa: F811
    batches = watch(monkeypatch, "draw_batch")
    for name, offset in (("plain", 0), ("offset", 0.5)):
        train(world, tmp_path / name, noise_offset=offset, stage1_steps=1, stage2_steps=1)
    plain, offset = batches[0], batches[2]
    added = offset.noise - plain.noise
    assert added.std((2, 3)).max() < 1e-6 < added.mean((2, 3)).std()
    assert torch.equal(plain.timesteps, offset.timesteps) and torch.equal(plain.index, offset.index)
    assert torch.equal(batches[1].noise, batches[3].noise), "alignment shows both paths the same noise as ever"


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_learning_rate_is_scaled(world, tmp_path, monkeypatch, accumulation):  # noqa: F811
    runs = watch_runs(monkeypatch)
    flags = {"scale_lr": True, "gradient_accumulation_steps": accumulation, "stage2_steps": 0}
    train(world, tmp_path / "output", **flags)
    assert runs[0].optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * 2 * accumulation)


@pytest.mark.parametrize(
    "flags, rates",
    [
        ({"lr_scheduler": "cosine_with_restarts", "lr_num_cycles": 2}, [0.01, 0.005, 0.01, 0.005]),
        ({"lr_scheduler": "polynomial", "lr_power": 2.0}, [0.01, 0.01 * 0.75**2, 0.01 * 0.5**2, 0.01 * 0.25**2]),
        ({"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 2}, [0, 0.005, 0.01, 0.01]),
    ],
    ids=["cycles", "power", "warm-up"],
)
def test_schedules(world, tmp_path, monkeypatch, flags, rates):  # noqa: F811
    seen, step = [], script.train_step
    monkeypatch.setattr(script, "train_step", lambda *args: seen.append(args[3].param_groups[0]["lr"]) or step(*args))
    train(world, tmp_path / "output", stage1_steps=4, stage2_steps=0, **flags)
    assert seen == pytest.approx(rates, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("flags", [{"optimizer": "prodigy", "learning_rate": 1.0}, {"use_8bit_adam": True}], ids=str)
def test_other_optimizers(world, tmp_path, monkeypatch, flags):  # noqa: F811
    pytest.importorskip("bitsandbytes" if "use_8bit_adam" in flags else "prodigyopt")
    runs = watch_runs(monkeypatch)
    output = train(world, tmp_path / "output", **flags)
    assert type(runs[0].optimizer.optimizer).__name__ == ("AdamW8bit" if "use_8bit_adam" in flags else "Prodigy")
    assert difference(output, output / "stage1") > 1e-6


# ------------------------------------------------------------------------------------------------------------- system


def test_tf32(world, tmp_path):  # noqa: F811
    before = torch.get_float32_matmul_precision()
    try:
        train(world, tmp_path / "output", stage1_steps=1, stage2_steps=0)
        assert torch.get_float32_matmul_precision() == before == "highest"
        train(world, tmp_path / "other", stage1_steps=1, stage2_steps=0, allow_tf32=True)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_xformers_in_self_attention(world, tmp_path, monkeypatch, trained):  # noqa: F811
    """xformers needs a GPU; torch's own attention stands in for its kernel, everything else is real."""
    calls = []

    def attend(query, key, value, attn_bias=None, op=None, scale=None):
        calls.append(query.shape)
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_bias, scale=scale)

    package = SimpleNamespace(ops=SimpleNamespace(memory_efficient_attention=attend))
    monkeypatch.setattr(attention_processor, "xformers", package, raising=False)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "xformers" or find_spec(name))
    runs = watch_runs(monkeypatch)
    flags = {"enable_xformers_memory_efficient_attention": True, "stage2_objective": "both", **SMOOTH}
    output = train(world, tmp_path / "output", num_validation_images=1, **flags)
    kinds = Counter(
        (name.split(".")[-2], type(processor).__name__) for name, processor in runs[0].unet.attn_processors.items()
    )
    assert set(kinds) == {("attn1", "XFormersAttnProcessor"), ("attn2", "AttnProcessor2_0")} and calls
    assert difference(output, trained(stage2_objective="both", **SMOOTH)) < 1e-4


@pytest.mark.parametrize("flags", [{}, {"use_dora": True}, {"dual_path": "single_pass"}], ids=str)
@pytest.mark.parametrize("objective", ["composed", "both"])
def test_bfloat16_keeps_lora_and_losses_in_float32(world, tmp_path, monkeypatch, flags, objective):  # noqa: F811
    runs, dtypes = watch_runs(monkeypatch), set()
    backward = script.Accelerator.backward
    monkeypatch.setattr(
        script.Accelerator, "backward", lambda self, loss: dtypes.add(loss.dtype) or backward(self, loss)
    )
    output = train(world, tmp_path / "output", mixed_precision="bf16", stage2_objective=objective, **flags)
    assert dtypes == {torch.float32}
    unet = runs[0].unet
    assert {p.dtype for p in unet.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for name, p in unet.named_parameters() if ".lora_" not in name} == {torch.bfloat16}
    assert {value.dtype for value in load_file(output / WEIGHTS).values()} == {torch.float32}
    assert all(torch.isfinite(value).all() for value in load_file(output / WEIGHTS).values())


def test_the_model_card_tells_targets_and_settings(world, trained):  # noqa: F811
    card = (trained() / "README.md").read_text(encoding="utf-8")
    assert "`red hair`" in card and "`--rank` | `2`" in card and ROWS[0]["base_prompt"] in card
    assert str(world.folder) not in card


def test_fp16_needs_a_gpu(world, tmp_path):  # noqa: F811
    with pytest.raises(SystemExit, match="error: --mixed_precision fp16 needs a GPU"):
        train(world, tmp_path / "output", mixed_precision="fp16")
    assert not (tmp_path / "output").exists()


def test_a_tracker_without_its_package(world, tmp_path, capsys):  # noqa: F811
    if "wandb" in {tracker.value for tracker in get_available_trackers()}:
        pytest.skip("wandb is installed")
    with pytest.raises(SystemExit):
        train(world, tmp_path / "output", report_to="wandb")
    assert "--report_to wandb" in capsys.readouterr().err and not (tmp_path / "output").exists()


@pytest.mark.parametrize(("rate", "warned"), [(1e-4, True), (1.0, False)])
def test_prodigy_with_a_rate_for_adam_is_warned_about(world, tmp_path, caplog, rate, warned):  # noqa: F811
    pytest.importorskip("prodigyopt")
    flags = {"optimizer": "prodigy", "learning_rate": rate, "stage1_steps": 1, "stage2_steps": 0}
    with caplog.at_level("WARNING"):
        train(world, tmp_path / "output", **flags)
    assert ("--learning_rate" in caplog.text) == warned


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_engines_that_shard_are_refused(world, tmp_path, monkeypatch, engine):  # noqa: F811
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(SystemExit, match=f"error: accelerate is set to {engine}"):
        train(world, tmp_path / "output")
    assert not (tmp_path / "output").exists()


def test_a_readme_of_ones_own_is_not_overwritten(world, tmp_path, capsys):  # noqa: F811
    output = train(world, tmp_path / "output", stage1_steps=1, stage2_steps=0)
    (output / WEIGHTS).unlink()
    train(world, output, stage1_steps=1, stage2_steps=0)
    (output / "README.md").write_text("# SPF-Portrait, my notes", encoding="utf-8")
    with pytest.raises(SystemExit):
        train(world, output, stage1_steps=1, stage2_steps=0)
    assert f"--output_dir {output} holds a README.md" in capsys.readouterr().err
    assert (output / "README.md").read_text(encoding="utf-8") == "# SPF-Portrait, my notes"


def test_a_resume_without_a_checkpoint_says_that_it_starts_anew(world, tmp_path, caplog):  # noqa: F811
    with caplog.at_level("WARNING"):
        train(world, tmp_path / "output", stage1_steps=1, stage2_steps=0, resume_from_checkpoint="latest")
    assert f"no whole checkpoint in {tmp_path / 'output'}" in caplog.text


def test_a_run_does_not_go_on_in_another_precision(world, tmp_path):  # noqa: F811
    """Also where accelerate's own configuration sets it."""
    flags = {"stage1_steps": 1, "stage2_steps": 0, "checkpointing_steps": 1}
    output = train(world, tmp_path / "output", **flags)
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(SystemExit, match="mixed_precision no, and now it is bf16"):
        train(world, output, **flags, mixed_precision="bf16", resume_from_checkpoint="latest")
