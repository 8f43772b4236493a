"""Tests of --preservation: the ways to keep a portrait that other trainers have, as modes of the same trainer."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from test_train import CARD, ROWS, RUN_FILE, WEIGHTS, difference, files, train, watch, watch_runs, write_data

import train_spf_portrait_lora as script
from training import losses as loss_module
from training.batches import BatchDrawer
from training.maps import MapMaker
from training.objectives import diffusion, paper
from training.objectives.kept_rows import KeepingRows
from training.objectives.objective import Parts
from training.prompt_table import BASE, FULL


WITH_ROWS = ("prior", "dop", "cat")


@pytest.fixture
def masked(tmp_path) -> Path:
    """The data with a mask for each portrait: white in the upper half, of portrait 1 in the lower."""
    folder = write_data(
        tmp_path / "masked", [{**row, "mask_file_name": f"mask_{i}.png"} for i, row in enumerate(ROWS)]
    )
    for i in range(len(ROWS)):
        with Image.open(folder / ROWS[i]["file_name"]) as image:
            mask = np.zeros((image.height, image.width), dtype=np.uint8)
        half = len(mask) // 2
        mask[half:] = 255 * (i == 1)
        mask[:half] = 255 * (i != 1)
        Image.fromarray(mask).save(folder / f"mask_{i}.png")
    return folder


@torch.no_grad()
def encoded(parts: Parts, world, texts: list[str]) -> torch.Tensor:
    """What the base model's text encoder makes of prompts."""
    ids = world.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
    return parts.models.pipeline.text_encoder(ids)[0]


def steps_of(monkeypatch) -> list[dict[str, float]]:
    """The losses of every step."""
    return watch(monkeypatch, script, "train_step")


def test_none_is_a_plain_lora_of_as_many_steps(world, trained):
    plain = trained(stage1_steps=4, stage2_steps=0)
    assert difference(trained(preservation="none"), plain) == 0
    assert files(trained(preservation="none")) == files(plain)


@pytest.mark.parametrize("way", WITH_ROWS)
def test_a_row_beside_each_training_portrait(world, tmp_path, monkeypatch, way):
    """One forward has both; the second half's prompts ask for no target, and only that half is kept."""
    kept, forwards = watch(monkeypatch, KeepingRows, "kept_rows"), []
    stages, losses = watch(monkeypatch, script, "make_objectives"), steps_of(monkeypatch)
    prepare = script.prepare

    def prepare_and_watch(*args) -> Parts:
        parts = prepare(*args)
        parts.models.denoiser.register_forward_pre_hook(
            lambda module, given: forwards.append(given) if torch.is_grad_enabled() else None
        )
        return parts

    monkeypatch.setattr(script, "prepare", prepare_and_watch)
    output = train(world, tmp_path / "output", preservation=way, preservation_weight=3.0)
    ((objective,),) = stages
    models = objective.models
    assert files(output) == {WEIGHTS, CARD, RUN_FILE} and len(losses) == len(kept) == len(forwards) == 4
    assert set(losses[0]) == {"diffusion", "preservation"}
    assert objective.weights == {"diffusion": 1.0, "preservation": 3.0}
    assert list(models.denoiser.peft_config) == ["default"]
    latents, timesteps, embeds = forwards[1]
    assert len(latents) == 4 and torch.equal(latents[2:], kept[1].noisy_latents)
    assert torch.equal(embeds[2:], kept[1].embeds.states) and torch.equal(timesteps[2:], kept[1].timesteps)
    assert (objective.alignment is not None) == (way == "prior")
    if way == "prior":
        assert not torch.equal(timesteps[:2], timesteps[2:])
    else:
        assert torch.equal(latents[:2], latents[2:])
        with torch.no_grad(), models.adapters.only(None):
            original = models.predict(kept[1].noisy_latents, kept[1].timesteps, kept[1].embeds)
        torch.testing.assert_close(kept[1].target, original)
        # Before the first update the LoRA changes nothing, so there is nothing to keep yet.
        assert losses[0]["preservation"] == pytest.approx(0, abs=1e-10) and losses[2]["preservation"] > 1e-8


def test_prior_keeps_the_noise_of_the_original_models_portraits(world, tmp_path, monkeypatch):
    batches, drawn_batches = watch(monkeypatch, BatchDrawer, "training"), watch(monkeypatch, BatchDrawer, "aligned")
    portraits, kept = watch(monkeypatch, script, "draw_portraits"), watch(monkeypatch, KeepingRows, "kept_rows")
    runs = watch_runs(monkeypatch)
    train(world, tmp_path / "output", preservation="prior", stage1_steps=1, stage2_steps=0)
    ((training,), (drawn,), (alignment,), (parts,)) = batches, drawn_batches, portraits, runs
    assert (training.kinds == FULL).all() and len(alignment.latents) == 3
    assert torch.equal(kept[0].target, drawn.noise) and not torch.equal(training.noise, drawn.noise)
    assert all(any(torch.equal(own, latents) for latents in alignment.latents) for own in drawn.latents)
    base = parts.table.response(BASE * parts.batches.pairs + drawn.pairs, drawn.time_ids)
    assert torch.equal(kept[0].embeds.states, base.states)


BUCKETS = {"resolution": None, "aspect_ratio_buckets": "16,16;24,16", "preservation": "prior"}


def test_prior_keeps_portraits_of_the_size_of_the_batch(world, tmp_path, monkeypatch):
    kept, batches = watch(monkeypatch, KeepingRows, "kept_rows"), watch(monkeypatch, BatchDrawer, "training")
    train(world, tmp_path / "output", **BUCKETS, num_alignment_images=6, stage1_steps=6)
    assert [rows.noisy_latents.shape for rows in kept] == [batch.latents.shape for batch in batches]
    assert len({rows.noisy_latents.shape for rows in kept}) == 2, "one size alone shows nothing"


def test_prior_needs_a_portrait_of_each_size(world, tmp_path):
    with pytest.raises(SystemExit, match="--num_alignment_images 1 draws no portrait of 16x(16|24) pixels"):
        train(world, tmp_path / "output", **BUCKETS, num_alignment_images=1)
    assert not (tmp_path / "output").exists()


def test_equal_prompts_are_drawn_in_each_size(world, tmp_path, monkeypatch):
    data = write_data(tmp_path / "data", [{**row, "base_prompt": "a man, a green hat"} for row in ROWS])
    portraits = watch(monkeypatch, script, "draw_portraits")
    train(world, tmp_path / "output", **BUCKETS, train_data_dir=data, num_alignment_images=2)
    assert len(set(portraits[0].buckets)) == 2


def test_dop_asks_for_the_base_prompt(world, tmp_path, monkeypatch):
    batches, kept = watch(monkeypatch, BatchDrawer, "training"), watch(monkeypatch, KeepingRows, "kept_rows")
    runs, inputs = watch_runs(monkeypatch), watch(monkeypatch, script, "check_inputs")
    train(world, tmp_path / "output", preservation="dop", stage1_steps=1, stage2_steps=0)
    texts = [inputs[0].pairs[i].base_prompt for i in batches[0].pairs.tolist()]
    torch.testing.assert_close(kept[0].embeds.states, encoded(runs[0], world, texts))


@pytest.mark.parametrize("prompts", [None, ("a dog", "a red car, a street")])
def test_cat_asks_for_unrelated_prompts(world, tmp_path, monkeypatch, prompts):
    kept, runs = watch(monkeypatch, KeepingRows, "kept_rows"), watch_runs(monkeypatch)
    train(world, tmp_path / "output", preservation="cat", unrelated_prompts=prompts, stage1_steps=6, stage2_steps=0)
    expected, seen = encoded(runs[0], world, list(prompts or [""])), set()
    for rows in kept:
        for row in rows.embeds.states:
            distances = [(row - own).abs().max().item() for own in expected]
            assert min(distances) < 1e-5
            seen.add(int(np.argmin(distances)))
    assert seen == set(range(len(prompts or [""])))


def test_a_masked_loss_is_deaf_outside_the_mask(world, tmp_path, masked, monkeypatch):
    batches, losses = watch(monkeypatch, BatchDrawer, "training"), steps_of(monkeypatch)
    loss, masks, gradients = diffusion.masked_diffusion_loss, [], []

    def watched(pred, target, mask):
        masks.append(mask)
        pred.register_hook(gradients.append)
        return loss(pred, target, mask)

    monkeypatch.setattr(diffusion, "masked_diffusion_loss", watched)
    output = train(world, tmp_path / "output", preservation="mask", train_data_dir=masked)
    assert files(output) == {WEIGHTS, CARD, RUN_FILE} and set(losses[0]) == {"diffusion"}
    for batch, mask, gradient in zip(batches, masks, gradients, strict=True):
        assert mask.shape == (2, 1, *batch.latents.shape[-2:]) and gradient.shape == batch.latents.shape
        middle = mask.shape[-2] // 2
        for index, own, moved in zip(batch.index.tolist(), mask, gradient, strict=True):
            upper = index != 1
            assert (own[0, :middle] == float(upper)).all() and (own[0, middle:] == float(not upper)).all()
            assert (moved[:, own[0] == 0] == 0).all() and (moved[:, own[0] == 1] != 0).any()


@pytest.mark.parametrize(
    "flags",
    [
        {"random_flip": True},
        pytest.param({"no-center_crop": True, "no-cache_latents": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_masks_are_cropped_and_mirrored_with_their_pictures(world, tmp_path, monkeypatch, flags):
    """Each mask is a picture's own red channel, so that the two must be the same where they are read."""
    folder = write_data(tmp_path / "data", [{**row, "mask_file_name": f"mask_{i}.png"} for i, row in enumerate(ROWS)])
    for i, row in enumerate(ROWS):
        with Image.open(folder / row["file_name"]) as image:
            image.getchannel("R").save(folder / f"mask_{i}.png")
    runs = watch_runs(monkeypatch)
    train(world, tmp_path / "output", preservation="mask", train_data_dir=folder, **flags)
    # A mask is resized by area, whatever the pictures are resized by.
    training_set = replace(runs[0].training.training_set, interpolation="box")
    for step in range(3):
        torch.testing.assert_close(training_set.batch_masks(step), training_set.batch_pixels(step)[:, :1] / 2 + 0.5)


@pytest.mark.parametrize("way", ["prior", pytest.param("cat", marks=pytest.mark.slow)])
def test_it_goes_on_to_the_same_bits(world, tmp_path, way):
    flags = {"preservation": way, "checkpointing_steps": 2}
    whole = train(world, tmp_path / "whole", **flags)
    AcceleratorState._reset_state(reset_partial_state=True)
    again = tmp_path / "again"
    train(world, again, resume_from_checkpoint=whole / "checkpoint-2", **flags)
    assert difference(again, whole) == 0


def test_a_run_does_not_go_on_with_other_masks(world, tmp_path, masked):
    flags = {"preservation": "mask", "train_data_dir": masked, "checkpointing_steps": 2}
    whole = train(world, tmp_path / "whole", **flags)
    flags["resume_from_checkpoint"] = whole / "checkpoint-2"
    AcceleratorState._reset_state(reset_partial_state=True)
    assert difference(train(world, tmp_path / "again", **flags), whole) == 0
    with Image.open(masked / "mask_0.png") as mask:
        Image.new("L", mask.size, 255).save(masked / "mask_0.png")
    with pytest.raises(SystemExit, match="other prompts or pictures"):
        train(world, tmp_path / "other", **flags)


def test_masks_that_cannot_be_used(world, tmp_path, masked, capsys):
    def refusal(**flags) -> str:
        with pytest.raises(SystemExit) as stop:
            train(world, tmp_path / "output", preservation="mask", **flags)
        message = str(stop.value)
        assert "\n" not in message
        return message

    assert "line 1" in (line := refusal()) and "no column 'mask_file_name'" in line
    Image.new("L", (7, 5), 255).save(masked / "mask_2.png")
    assert "mask_2.png has 7x5 pixels" in (line := refusal(train_data_dir=masked)) and "line 3" in line
    with Image.open(masked / ROWS[2]["file_name"]) as image:
        Image.new("L", image.size).save(masked / "mask_2.png")
    assert "mask_2.png is black" in refusal(train_data_dir=masked)
    (masked / "mask_2.png").write_bytes(b"no picture")
    assert "mask_2.png" in refusal(train_data_dir=masked)
    (masked / "mask_2.png").unlink()
    assert "mask_2.png" in refusal(train_data_dir=masked)


# ------------------------------------------------------------------------------------------------- maps of one's own


def test_saved_maps_can_be_given_back(world, tmp_path, trained, monkeypatch):
    output = trained(save_alignment=True, alignment_source="both")
    count = 3 + len(ROWS)
    names = {f"{i:05d}.png" for i in range(count)}
    assert {path.name for path in (output / "alignment").glob("*.png")} == names
    assert {path.name for path in (output / "alignment" / "sfcm").glob("*.png")} == names
    alignments = watch(monkeypatch, script, "prepare_alignment")
    maps = output / "alignment" / "sfcm"
    train(world, tmp_path / "again", sfcm_dir=maps, alignment_source="both")
    for i, sfcm in enumerate(alignments[0].sfcm):
        with Image.open(maps / f"{i:05d}.png") as picture:
            size = tuple(reversed(alignments[0].latents[i].shape[-2:]))
            expected = np.asarray(picture.resize(size, Image.Resampling.BOX), dtype=np.float32) / 255
        np.testing.assert_allclose(sfcm[0].numpy(), expected, atol=0.01)


@pytest.mark.parametrize("objective", ["composed", "paper"])
@pytest.mark.parametrize("mode", ["averaged_target", "paper"])
def test_a_given_map_rules_whatever_the_mode(world, tmp_path, monkeypatch, objective, mode):
    folder = tmp_path / "maps"
    folder.mkdir()
    for i in range(3):
        Image.new("L", (16, 16), 51 * i).save(folder / f"{i:05d}.png")
    used, aligned = watch(monkeypatch, MapMaker, "of_batch"), watch(monkeypatch, BatchDrawer, "aligned")
    flags = {"stage1_steps": 1, "stage2_objective": objective, "enhancement_loss": "none"}
    train(world, tmp_path / "output", sfcm_dir=folder, sfcm_mode=mode, **flags)
    assert len(aligned) == len(used) == 2
    for batch, sfcm in zip(aligned, used, strict=True):
        expected = batch.index * 0.2 * (batch.kinds == FULL)
        torch.testing.assert_close(sfcm, expected[:, None, None, None].expand_as(sfcm).float())


def test_maps_that_are_missing_are_named(world, tmp_path):
    folder = tmp_path / "maps"
    with pytest.raises(SystemExit, match="--sfcm_dir .*maps.*00000.png does not exist"):
        train(world, tmp_path / "output", sfcm_dir=folder)
    folder.mkdir()
    Image.new("L", (16, 16), 51).save(folder / "00000.png")
    (folder / "00001.png").write_bytes(json.dumps({}).encode())
    with pytest.raises(SystemExit, match="00001.png"):
        train(world, tmp_path / "output", sfcm_dir=folder)
    assert not (tmp_path / "output").exists()


# ------------------------------------------------------------------------------------------------------- ablations


def test_the_enhancement_without_its_weights(world, tmp_path, monkeypatch):
    runs, batches, terms = watch_runs(monkeypatch), watch(monkeypatch, BatchDrawer, "training"), []
    difference_loss = loss_module.ENHANCEMENT_LOSSES["difference"]

    def watched(*args):
        terms.append(difference_loss(*args))
        return terms[-1]

    monkeypatch.setitem(loss_module.ENHANCEMENT_LOSSES, "difference", watched)
    losses = steps_of(monkeypatch)
    train(world, tmp_path / "output", stage2_objective="paper", stage1_steps=0, enhancement_weighting="none")
    steps = list(zip(terms[::2], terms[1::2], strict=True))  # of two rows each
    assert [step["enhancement"] for step in losses] == pytest.approx([torch.cat(two).mean().item() for two in steps])
    weights = runs[0].models.noise.signal(batches[0].timesteps)
    assert losses[0]["enhancement"] != pytest.approx((weights * torch.cat(steps[0])).mean().item())


def test_aligned_layers_of_one_resolution(world, tmp_path, monkeypatch):
    seen, loss = [], paper.fine_grained_loss
    monkeypatch.setattr(paper, "fine_grained_loss", lambda *args: seen.append(set(args[2])) or loss(*args))
    flags = {"stage2_objective": "paper", "enhancement_loss": "none", "stage1_steps": 0, "stage2_steps": 1}
    for layers in ("all", "phrase_map"):
        train(world, tmp_path / layers, **flags, alignment_layers=layers)
        AcceleratorState._reset_state(reset_partial_state=True)
    assert len(seen[0]) > 1 and len(seen[1]) == 1 and seen[1] < seen[0]
