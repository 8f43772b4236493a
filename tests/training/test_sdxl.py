"""Tests of training on Stable Diffusion XL: all that it shares with Stable Diffusion, and sizes and crops.

On a tiny random base model of the real classes. Runs go through `main`, as a user's do.
"""

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sdxl_world import make_sdxl, save_sdxl_lora
from test_train import (
    CARD,
    LOSSES,
    OBJECTIVES,
    WEIGHTS,
    copy_model,
    difference,
    files,
    prepared,
    train,
    watch,
    watch_runs,
)

import train_spf_portrait_lora as script
from adapters import original_rows
from families.stable_diffusion_xl import StableDiffusionXL
from loras.writing import save_kohya_lora
from pipeline_spf_portrait_xl import SPFPortraitXLPipeline
from programs.original_layout import one_file
from training.batches import BatchDrawer
from training.engine import Engine
from training.models import decoded_without_autocast
from training.objectives import make_objectives
from training.pixels import micro_conditioning, whole_picture
from training.prompt_table import BASE, EMPTY, FULL


def load(world, lora=None):
    pipeline = StableDiffusionXLPipeline.from_pretrained(world.model, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        pipeline.load_lora_weights(lora)
    return pipeline


# ------------------------------------------------------------------------------------------------- micro-conditioning


@pytest.mark.parametrize(
    ("image_size", "size", "place", "expected"),
    [
        ((64, 64), (64, 64), {}, (64, 64, 0, 0, 64, 64)),
        ((100, 50), (64, 64), {}, (50, 100, 0, 32, 64, 64)),  # resized to 128 x 64, the middle taken
        ((100, 50), (64, 64), {"centering": (0.25, 0.9)}, (50, 100, 0, 16, 64, 64)),
        ((100, 50), (64, 64), {"centering": (0.25, 0.9), "flip": True}, (50, 100, 0, 48, 64, 64)),
        ((768, 1333), (1152, 896), {"centering": (0.5, 1.0)}, (1333, 768, 403, 0, 1152, 896)),
        ((30, 40), (64, 48), {"flip": True}, (40, 30, 0, 0, 64, 48)),  # enlarged, and its own size is said
    ],
)
def test_size_and_crop_of_a_picture(image_size, size, place, expected):
    assert micro_conditioning(image_size, size, **place) == expected


def test_a_drawn_picture_is_whole():
    assert whole_picture((1024, 768)) == (1024, 768, 0, 0, 1024, 768)


def test_the_crop_that_is_said_is_the_one_that_is_taken(xl_world, tmp_path):
    """A picture whose pixels say where they are."""
    across, down = np.meshgrid(np.arange(40), np.arange(16))
    picture = np.stack([across * 6, down * 15, across * 0], axis=-1).astype(np.uint8)
    folder = tmp_path / "data"
    folder.mkdir()
    Image.fromarray(picture).save(folder / "0.png")
    row = {"file_name": "0.png", "base_prompt": "a woman, a green hat", "target_prompt": "red hair"}
    (folder / "metadata.jsonl").write_text(json.dumps(row))
    changes = {"train_data_dir": folder, "no-center_crop": True, "no-cache_latents": True, "random_flip": True}
    own = prepared(xl_world, **changes).parts.training.training_set
    flips = set()
    for step in range(8):
        for sample, pixels, ids in zip(own.samples(step), own.batch_pixels(step), own.time_ids(own.samples(step))):
            assert ids[:2].tolist() == [16, 40] and ids[2] == 0 and ids[4:].tolist() == [16, 16]
            first = (pixels[0, 0, -1 if sample.flip else 0] + 1) / 2 * 255 / 6
            left = 40 - 16 - first if sample.flip else first
            assert abs(left - ids[3]) <= 0.6
            flips.add(sample.flip)
    assert flips == {True, False}


def test_each_row_is_told_its_own_picture(xl_world):
    """Training portraits their size and crop, drawn ones that they are whole; all prompts of a portrait the same."""
    run = prepared(xl_world)
    parts, told = run.parts, []
    batch = parts.batches.training(parts.training, 0)
    sizes = [parts.training.training_set.image_sizes[i] for i in batch.index.tolist()]
    assert batch.time_ids.dtype == torch.float32
    assert batch.time_ids.tolist() == [list(micro_conditioning(size, (16, 16))) for size in sizes]

    portraits = script.prepare_alignment(run.flags, run.inputs, parts, run.accelerator)
    assert portraits.time_ids.tolist() == [list(whole_picture((16, 16)))] * 3
    parts.models.denoiser.register_forward_pre_hook(
        lambda unet, args, kwargs: told.append(kwargs["added_cond_kwargs"]["time_ids"].tolist()), with_kwargs=True
    )
    parts.maps.fill_bank(portraits, 2, False)
    assert told and all(row == list(whole_picture((16, 16))) for call in told for row in call)


@pytest.mark.parametrize(
    "flags",
    [
        {"stage2_objective": "both"},
        {"stage2_objective": "both", "dual_path": "single_pass"},
        {"preservation": "prior", "alignment_source": "generated"},
        {"preservation": "dop", "alignment_source": "generated"},
        {"preservation": "cat", "alignment_source": "generated", "unrelated_prompts": ("a dog", "a street")},
    ],
    ids=lambda flags: " ".join(flags.values() if isinstance(flags, str) else map(str, flags.values())),
)
def test_no_call_mixes_up_its_rows(xl_world, tmp_path, monkeypatch, flags):
    """A row's noise tells which portrait it is, its states which prompt: size, crop and pooled must be theirs."""
    sizes, runs, seen = {}, watch_runs(monkeypatch), []
    inputs = watch(monkeypatch, script, "check_inputs")

    def remember(name, expected):
        draw = getattr(BatchDrawer, name)

        def drawn(self, portraits, micro_step, *args, **kwargs):
            batch = draw(self, portraits, micro_step, *args, **kwargs)
            rows = expected(portraits, micro_step, batch.index.tolist())
            sizes.update((noisy.numpy().tobytes(), list(row)) for noisy, row in zip(batch.noisy_latents, rows))
            return batch

        monkeypatch.setattr(BatchDrawer, name, drawn)

    def of_training(portraits, micro_step, index):
        own = portraits.training_set
        return [
            micro_conditioning(own.image_sizes[one.index], own.sizes[own.buckets[one.index]], flip=one.flip)
            for one in own.samples(micro_step)
        ]

    def of_alignment(portraits, micro_step, index):
        drawn, given = 8, inputs[0]
        whole = [whole_picture(given.sizes[portraits.buckets[i]]) for i in range(drawn)]
        images = runs[0].training.training_set.image_sizes
        data = [micro_conditioning(own, given.sizes[b]) for own, b in zip(images, given.buckets)]
        return [(whole + data)[i] for i in index]

    remember("training", of_training)
    remember("aligned", of_alignment)
    monkeypatch.setattr(UNet2DConditionModel, "forward", seeing(UNet2DConditionModel.forward, seen))
    train(
        xl_world, tmp_path / "output", **{
            "train_batch_size": 3, "random_flip": True, "resolution": None, "aspect_ratio_buckets": "16,16;16,24",
            "num_alignment_images": 8, "alignment_source": "both", "base_prompt_share": 0.5, "stage1_steps": 3,
            "stage2_steps": 0 if "preservation" in flags else 3, **flags,
        }
    )  # fmt: skip
    embeds = runs[0].table.prompt_embeds
    pooled = {states.numpy().tobytes(): own for states, own in zip(embeds.states, embeds.pooled)}
    known = [(noisy, states, added) for noisy, states, added in seen if noisy.numpy().tobytes() in sizes]
    assert len(known) > 15 and len({tuple(row) for row in sizes.values()}) > 3
    for noisy, states, (text, ids) in known:
        assert ids.tolist() == sizes[noisy.numpy().tobytes()]
        if states.numpy().tobytes() in pooled:  # unrelated prompts are in no table
            assert torch.equal(text, pooled[states.numpy().tobytes()])


def seeing(forward, seen):
    """A UNet's forward that notes each row of what it is given."""

    def noted(self, sample, timestep, encoder_hidden_states, *args, added_cond_kwargs=None, **kwargs):
        added = zip(added_cond_kwargs["text_embeds"], added_cond_kwargs["time_ids"], strict=True)
        seen.extend(zip(sample.detach(), encoder_hidden_states.detach(), added, strict=True))
        return forward(
            self, sample, timestep, encoder_hidden_states, *args, added_cond_kwargs=added_cond_kwargs, **kwargs
        )

    return noted


def test_pictures_of_several_sizes_are_told_their_bucket(xl_world):
    run = prepared(xl_world, resolution=None, aspect_ratio_buckets="16,16;16,24", num_alignment_images=4)
    own = run.parts.training.training_set
    targets = {tuple(own.time_ids(own.samples(step))[0, 4:].tolist()) for step in range(8)}
    assert targets == {(16.0, 16.0), (16.0, 24.0)}


# ---------------------------------------------------------------------------------------------------- both stages


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_both_stages_train_and_the_stock_pipeline_loads_the_lora(xl_world, tmp_path, objective):
    output = train(xl_world, tmp_path / "output", stage2_objective=objective, num_validation_images=1)
    pictures = {f"validation/{name}.png" for name in ("step_000000", "step_000004", "alignment")}
    assert files(output) == {WEIGHTS, CARD, "run.yaml", f"stage1/{WEIGHTS}", *pictures}
    assert difference(output / "stage1", output) > 0.005

    def draw(pipeline):
        generator = torch.Generator().manual_seed(0)
        return pipeline("a man, red hair", num_inference_steps=2, generator=generator, output_type="np").images

    pipeline = load(xl_world, output)
    layers = [module for module in pipeline.unet.modules() if isinstance(module, BaseTunerLayer)]
    assert len(layers) == 7 * 4 and {scale for layer in layers for scale in layer.scaling.values()} == {2.0}
    assert np.abs(draw(pipeline) - draw(load(xl_world))).max() > 1e-4
    card = (output / CARD).read_text(encoding="utf-8")
    assert "stable-diffusion-xl" in card and "pipeline_spf_portrait_xl.py" in card


@pytest.mark.parametrize("preservation", ["mask", "prior", "dop", "cat"])
def test_other_ways_to_keep_a_portrait(xl_world, tmp_path, preservation):
    rows = [json.loads(line) for line in (xl_world.data / "metadata.jsonl").read_text().splitlines()]
    data = tmp_path / "data"
    data.mkdir()
    for row in rows:
        image = Image.open(xl_world.data / row["file_name"])
        image.save(data / row["file_name"])
        Image.new("L", image.size, 255).save(data / f"mask_{row['file_name']}")
        row["mask_file_name"] = f"mask_{row['file_name']}"
    (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = train(
        xl_world, tmp_path / "output", train_data_dir=data, preservation=preservation, stage1_steps=3, stage2_steps=0
    )
    assert all(value.isfinite().all() for value in load_file(output / WEIGHTS).values())


def test_losses_have_their_names(xl_world, tmp_path, monkeypatch):
    steps = watch(monkeypatch, script, "train_step")
    train(xl_world, tmp_path / "output", stage2_objective="both")
    assert set(steps[-1]) == LOSSES["both"] and set(steps[0]) == {"diffusion"}


# -------------------------------------------------------------------------------------------------------- equalities


def first_losses(world, **changes):
    """The losses and gradients of the first batch of stage 2."""
    run = prepared(world, stage2_objective="both", base_prompt_share=0.5, train_batch_size=4, **changes)
    parts, models = run.parts, run.parts.models
    torch.manual_seed(5)
    for layer in models.adapters.layers:
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.3)
    parts = type(parts)(**{**vars(parts), "alignment": script.prepare_alignment(
        run.flags, run.inputs, parts, run.accelerator)})  # fmt: skip
    values = {}
    for objective in make_objectives(2, run.flags, parts):
        objective.prepare(None)
        with objective.losses(4) as losses:
            sum(losses.values()).backward()
            values |= {name: loss.item() for name, loss in losses.items()}
    gradients = {name: own.grad.clone() for name, own in models.denoiser.named_parameters() if own.grad is not None}
    return values, gradients


def test_single_pass_and_checkpointing_compute_the_same(xl_world):
    losses, gradients = first_losses(xl_world)
    largest = max(value.abs().max() for value in gradients.values())
    for changes in ({"dual_path": "single_pass"}, {"gradient_checkpointing": True}):
        others, own = first_losses(xl_world, **changes)
        assert others.keys() == losses.keys() and own.keys() == gradients.keys()
        for name in losses:
            assert others[name] == pytest.approx(losses[name], rel=1e-4, abs=1e-6)
        assert max((own[name] - gradients[name]).abs().max() for name in own) < 1e-4 * largest


@torch.no_grad()
def test_without_its_adapters_it_is_the_original_model_to_the_bit(xl_world):
    run = prepared(xl_world)
    models, parts = run.parts.models, run.parts
    original = load(xl_world).unet.eval()
    batch = parts.batches.training(parts.training, 0)
    embeds = parts.table.response(batch.rows, batch.time_ids)
    for layer in models.adapters.layers:
        torch.nn.init.normal_(layer.lora_B["default"].weight)
    expected = StableDiffusionXL.predict(original, batch.noisy_latents, batch.timesteps, embeds)
    with models.adapters.only(None):
        assert torch.equal(models.predict(batch.noisy_latents, batch.timesteps, embeds), expected)
    with original_rows(models.denoiser, range):
        assert torch.equal(models.predict(batch.noisy_latents, batch.timesteps, embeds), expected)
    assert not torch.allclose(models.predict(batch.noisy_latents, batch.timesteps, embeds), expected)


@torch.no_grad()
def test_prompts_encoded_in_each_step_are_those_encoded_once(xl_world, tmp_path):
    tables = [prepared(xl_world, **changes).parts.table for changes in ({}, {"no-cache_text_embeddings": True})]
    # From the cache on the disk as well.
    for _ in range(2):
        tables.append(prepared(xl_world, cache_dir=tmp_path).parts.table)
    count = len(tables[0].distances)
    rows, sizes = torch.tensor([FULL * count, BASE * count + 1, EMPTY * count]), torch.zeros(3, 6)
    first = tables[0].response(rows, sizes)
    assert first.pooled[2].abs().max() == 0 and first.states[2].abs().max() == 0
    assert first.pooled[1].abs().max() > 0
    for table in tables[1:]:
        own = table.response(rows, sizes)
        torch.testing.assert_close(own.states, first.states)
        torch.testing.assert_close(own.pooled, first.pooled)


def test_a_run_goes_on_exactly(xl_world, tmp_path):
    options = {"stage1_steps": 3, "stage2_steps": 3, "checkpointing_steps": 2, "random_flip": True}
    options |= {"alignment_source": "both"}
    whole = train(xl_world, tmp_path / "whole", **options)
    for step in (2, 4):
        own = tmp_path / f"from_{step}"
        train(xl_world, own, resume_from_checkpoint=whole / f"checkpoint-{step}", **options)
        assert difference(whole, own) == 0


def save_lora_of_all_models(world, folder):
    pipeline, layers = load(world), {}
    for name, targets in (("unet", ["attn2.to_k"]), ("text_encoder", ["q_proj"]), ("text_encoder_2", ["v_proj"])):
        model = getattr(pipeline, name)
        torch.manual_seed(3)
        model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False))
        layers[f"{name}_lora_layers"] = get_peft_model_state_dict(model)
    StableDiffusionXLPipeline.save_lora_weights(folder, **layers)
    return folder


def test_a_reference_lora_on_both_text_encoders_is_merged(xl_world, tmp_path):
    earlier = save_lora_of_all_models(xl_world, tmp_path / "earlier")
    plain = prepared(xl_world).parts.models.pipeline
    merged = prepared(xl_world, reference_lora=earlier, reference_lora_scale=0.5).parts.models.pipeline
    for name in ("text_encoder", "text_encoder_2"):
        before, after = (getattr(own, name).state_dict() for own in (plain, merged))
        assert any(not torch.equal(before[key], after[key]) for key in before)


def test_dora_trains(xl_world, tmp_path):
    output = train(xl_world, tmp_path / "output", use_dora=True)
    assert any("magnitude" in name for name in load_file(output / WEIGHTS))


def test_a_dry_run_shows_the_prompts(xl_world, tmp_path, capsys):
    train(xl_world, tmp_path / "output", dry_run=True)
    assert "Nothing was trained" in capsys.readouterr().out and not (tmp_path / "output").exists()


# ----------------------------------------------------------------------------------------------- memory and precision


def test_each_model_is_on_the_device_while_it_works_alone(xl_world, monkeypatch):
    """Seen in their `to`: on a machine without a GPU both places are one."""
    moves, device = [], torch.device("cpu", 0)
    for kind in {type(model) for model in load(xl_world).components.values() if isinstance(model, torch.nn.Module)}:
        own = kind.to

        def to(self, *place, own=own):
            moves.append((type(self).__name__, str(place[0])))
            return own(self, *place)

        monkeypatch.setattr(kind, "to", to)
    models = prepared(xl_world).parts.models
    assert models.pipeline.vae.use_slicing
    order = [name for name, place in moves if not place.startswith("torch.")]
    encoders = ["CLIPTextModel", "CLIPTextModelWithProjection"]
    assert order == [*encoders, *encoders, "AutoencoderKL", "AutoencoderKL", "UNet2DConditionModel"]
    assert models.device.type == device.type and models._kept == {"unet"}


def test_a_vae_in_float32_decodes_in_float32_where_autocast_is_on(xl_world):
    vae, seen = load(xl_world).vae, []
    vae.decoder.conv_in.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        vae.decode(torch.randn(1, 4, 4, 4))
        with decoded_without_autocast(vae):
            vae.decode(torch.randn(1, 4, 4, 4, dtype=torch.bfloat16))
        vae.decode(torch.randn(1, 4, 4, 4))
    assert seen == [torch.bfloat16, torch.float32, torch.bfloat16] and "decode" not in vars(vae)


def test_latents_that_are_not_finite_are_found_before_any_step(xl_world, tmp_path, monkeypatch):
    monkeypatch.setattr(Engine, "start_stage", lambda *args: pytest.fail("a stage was begun"))
    to_latents = StableDiffusionXL.to_latents
    monkeypatch.setattr(StableDiffusionXL, "to_latents", staticmethod(lambda vae, pixels: to_latents(vae, pixels) / 0))
    with pytest.raises(SystemExit, match=r"metadata.jsonl, line 1: the VAE makes .* not finite.*bf16"):
        train(xl_world, tmp_path / "output")


@pytest.mark.parametrize("precision", ["bf16"])
def test_half_precision_trains_and_draws(xl_world, tmp_path, precision, monkeypatch):
    runs = watch_runs(monkeypatch)
    output = train(xl_world, tmp_path / "output", mixed_precision=precision, num_validation_images=1)
    assert runs[0].models.pipeline.text_encoder_2.dtype == torch.bfloat16
    assert all(value.isfinite().all() for value in load_file(output / WEIGHTS).values())


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unet/config.json": {"projection_class_embeddings_input_dim": 50}}, "is told 50 numbers"),
        ({"unet/config.json": {"in_channels": 9}}, "it takes 9 channels and not 4"),
    ],
)
def test_what_is_no_base_model_is_refused(xl_world, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(SPFPortraitXLPipeline, "from_pretrained", lambda *args: pytest.fail("weights were loaded"))
    model = copy_model(xl_world, tmp_path, changes)
    with pytest.raises(SystemExit, match=message):
        train(xl_world, tmp_path / "output", pretrained_model_name_or_path=model)


def test_a_lora_for_the_other_family_is_refused_by_name(world, xl_world, tmp_path):
    earlier = save_lora_of_all_models(xl_world, tmp_path / "earlier")
    with pytest.raises(SystemExit, match="--reference_lora .*SDXL"):
        train(world, tmp_path / "output", reference_lora=earlier, reference_lora_scale=1.0)


# --------------------------------------------------------------------------------- files as other programs write them


@pytest.fixture(scope="module")
def published(xl_world, tmp_path_factory):
    """A tiny SDXL in the published blocks, as a folder and one file, and a LoRA for all its models in two formats."""
    folder = tmp_path_factory.mktemp("published")
    pipeline = make_sdxl(xl_world.tokenizer)
    pipeline.save_pretrained(folder / "model")
    save_file(one_file(pipeline), folder / "model.safetensors")
    lora = save_sdxl_lora(pipeline, folder / "lora")
    save_kohya_lora(lora, folder / "kohya.safetensors")
    return folder


def test_one_file_and_a_lora_of_kohya_train_as_folder_and_diffusers_lora(xl_world, published, tmp_path):
    with safe_open(published / "kohya.safetensors", "pt") as file:
        keys = set(file.keys())
    assert any(key.startswith("lora_unet_input_blocks") for key in keys)
    assert all(any(key.startswith(name) for key in keys) for name in ("lora_te1_text_model", "lora_te2_text_model"))
    results = []
    for name, base, lora in (("folder", "model", "lora"), ("file", "model.safetensors", "kohya.safetensors")):
        flags = {"pretrained_model_name_or_path": published / base, "reference_lora": published / lora}
        flags |= {"base_config": published / "model"} if name == "file" else {}
        results.append(train(xl_world, tmp_path / name, reference_lora_scale=0.5, **flags))
    assert difference(*results) == 0.0
