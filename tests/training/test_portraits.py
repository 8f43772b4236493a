"""Tests of portraits: the training portraits as steps take them, and those that both paths are aligned on."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline
from PIL import Image
from test_train import SMOOTH, difference, prepared, train, watch, watch_runs, write_data

import train_spf_portrait_lora as script
from programs.picture_files import load_picture
from training.alignment import prepare_alignment
from training.batches import BatchDrawer
from training.portraits import Portraits, draw_portraits
from training.training_set import Sample, derive_seed


def process(index: int = 0, count: int = 1, shares: list | None = None) -> SimpleNamespace:
    """What is asked of accelerate, in one of several processes; its shares are kept, and none are added to them."""
    return SimpleNamespace(
        num_processes=count,
        process_index=index,
        is_main_process=False,
        is_local_main_process=False,
        device=torch.device("cpu"),
        gather=lambda latents: latents if shares is None else shares.append(latents) or latents,
    )


def draw_share(run: SimpleNamespace, accelerator: SimpleNamespace) -> Portraits:
    """What one process makes of a run's alignment portraits."""
    return draw_portraits(run.flags, run.inputs, run.parts.models, run.parts.table, accelerator)


@pytest.mark.parametrize("source, counts", [("generated", (3, 0)), ("data", (0, 6)), ("both", (3, 6))])
def test_alignment_sources(run, source, counts):
    flags = run.flags._replace(alignment=replace(run.flags.alignment, alignment_source=source))
    alignment = prepare_alignment(flags, run.inputs, run.parts, process())
    drawn, taken = counts
    assert len(alignment.latents) == len(alignment.pair_index) == len(alignment.sfcm) == drawn + taken
    latents, sfcm = torch.stack(alignment.latents), torch.stack(alignment.sfcm)
    training = run.parts.training.latents[:taken]
    assert all(torch.equal(own, same) for own, same in zip(latents[drawn:], training, strict=True))
    assert alignment.pair_index[drawn:].tolist() == list(range(taken))
    assert len(set(alignment.pair_index[:drawn].tolist())) == drawn
    assert latents.std(dim=(1, 2, 3)).min() > 0.01
    assert sfcm.min() >= 0 and sfcm.max() <= 1 and sfcm.std() > 0.1


def test_alignment_portraits_are_the_original_models_own(world, run):
    """Drawn after stage 1, and yet without its LoRA; the batch size is no matter."""
    pipeline = StableDiffusionPipeline.from_pretrained(world.model, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    for i, pair_index in enumerate(run.alignment.pair_index.tolist()):
        expected = pipeline(
            run.inputs.pairs[pair_index].base_prompt,
            height=16,
            width=16,
            num_inference_steps=2,
            guidance_scale=5.0,
            generator=torch.Generator().manual_seed(derive_seed(0, f"alignment portrait {i}")),
            output_type="latent",
        ).images[0]
        torch.testing.assert_close(run.alignment.latents[i], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_processes_share_the_alignment_portraits(run, processes):
    """Any number of them: three portraits are two shares of two, or three of one and two idle ones."""
    shares = []
    for index in range(processes):
        draw_share(run, process(index, processes, shares))
    assert len({share.shape for share in shares}) == 1
    torch.testing.assert_close(torch.cat(shares)[:3], torch.stack(run.alignment.latents), rtol=1e-4, atol=1e-4)


def test_neighbouring_seeds_share_no_noise(world, tmp_path, monkeypatch):
    """Of the portraits that are drawn for the alignment, and of their maps."""
    generators, seeds = [], torch.Generator.manual_seed

    class Watched(torch.Generator):
        def manual_seed(self, seed):
            generators.append(seed)
            return seeds(self, seed)

    used = []
    for seed in (101, 102):
        AcceleratorState._reset_state(reset_partial_state=True)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "Generator", Watched)
            train(world, tmp_path / str(seed), seed=seed, stage1_steps=1, stage2_steps=2, num_alignment_images=4)
        used.append(set(generators))
        generators.clear()
    assert all(len(own) >= 4 + 4 + 3 for own in used)
    assert not used[0] & used[1]


def test_drawn_portraits_of_several_sizes_are_shared(world, tmp_path, striped, monkeypatch):
    parts, inputs = watch(monkeypatch, script, "prepare"), watch(monkeypatch, script, "check_inputs")
    flags, alignments = watch(monkeypatch, script, "parse_args"), watch(monkeypatch, script, "prepare_alignment")
    steps = {"num_alignment_images": 6, "stage1_steps": 1, "stage2_steps": 1}
    train(world, tmp_path / "output", train_data_dir=striped, **BUCKETS, **steps)
    run, shares = SimpleNamespace(parts=parts[0], inputs=inputs[0], flags=flags[0]), ([], [])
    for index in range(2):
        draw_share(run, process(index, 2, shares[index]))
    counts, start = Counter(alignments[0].buckets), 0
    for place, bucket in enumerate(sorted(counts)):
        drawn = torch.cat([shares[0][place], shares[1][place]])[: counts[bucket]]
        expected = torch.stack(alignments[0].latents[start : start + counts[bucket]])
        torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=1e-4)
        start += counts[bucket]


# ------------------------------------------------------------------------------------------------- training portraits


@pytest.fixture
def striped(tmp_path):
    """Six pictures of three shapes: two wide, three tall, one square."""
    folder = write_data(tmp_path / "striped")
    for i, size in enumerate([(32, 16), (30, 16), (16, 32), (18, 32), (16, 30), (20, 20)]):
        pixels = np.random.default_rng(i).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


BUCKETS = {"aspect_ratio_buckets": "16,32;32,16;16,16"}


@pytest.mark.parametrize(
    "objective, source",
    [
        ("composed", "generated"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("both", "data"), ("composed", "both"))),
    ],
)
def test_buckets(world, tmp_path, striped, monkeypatch, objective, source):
    runs, taught = watch_runs(monkeypatch), watch(monkeypatch, BatchDrawer, "training")
    aligned, alignments = watch(monkeypatch, BatchDrawer, "aligned"), watch(monkeypatch, script, "prepare_alignment")
    flags = {"stage2_objective": objective, "alignment_source": source, "num_alignment_images": 6, "stage2_steps": 4}
    output = train(
        world, tmp_path / "output", train_data_dir=striped, num_validation_images=2, stage1_steps=6, **BUCKETS, **flags
    )
    sizes = [tuple(latents.shape[-2:]) for latents in runs[0].training.latents]
    assert sizes == [(8, 16), (8, 16), (16, 8), (16, 8), (16, 8), (8, 8)]
    seen = Counter(i for batch in taught[:6] for i in batch.index.tolist())
    assert seen == dict.fromkeys(range(6), 2), "in six batches of two each portrait comes twice"
    assert aligned
    for batch in taught + aligned:
        assert batch.noise.shape == batch.latents.shape == batch.noisy_latents.shape
    alignment = alignments[0]
    assert len(alignment.latents) == len(alignment.sfcm) == {"generated": 6, "data": 6, "both": 12}[source]
    for latents, sfcm, bucket in zip(alignment.latents, alignment.sfcm, alignment.buckets, strict=True):
        assert tuple(latents.shape[-2:]) == tuple(sfcm.shape[-2:]) == [(8, 16), (16, 8), (8, 8)][bucket]
    if source == "generated":
        assert sorted(alignment.buckets) == [0, 0, 1, 1, 1, 2]
    with Image.open(output / "validation" / "step_000010.png") as picture:
        assert picture.size == (4 * (192 + 6) + 6, 2 * (96 + 6) + 6 + 18), "the first portrait is wide"


def test_one_bucket_is_the_resolution(world, tmp_path, trained):
    output = train(world, tmp_path / "output", aspect_ratio_buckets="16,16", resolution=512)
    assert difference(output, trained()) == 0


def test_mirrored_pictures(world):
    parts = prepared(world, random_flip=True, stage1_steps=12, stage2_objective="paper").parts
    training = parts.training
    batches = [parts.batches.training(training, i) for i in range(12)]
    assert len(training.latents) == len(parts.enhancement._image_embeds) == 12
    index = torch.cat([batch.index for batch in batches])
    assert 4 < (index >= 6).sum() < 20 and torch.bincount(index % 6).tolist() == [4] * 6
    mirrored = training.training_set.pixels(Sample(2, flip=True))
    assert torch.equal(mirrored, training.training_set.pixels(Sample(2)).flip(-1))
    torch.testing.assert_close(training.latents[6 + 2], parts.models.to_latents(mirrored[None])[0])
    assert torch.equal(torch.cat([batch.pairs for batch in batches]), index % 6)


def test_crops_anywhere(world):
    flags = {"no-center_crop": True, "no-cache_latents": True}
    parts = prepared(world, **flags).parts
    training_set = parts.training.training_set
    parts.training.start_reading(range(4))
    pixels = torch.cat([parts.batches.training(parts.training, i).pixels for i in range(4)])
    samples = [sample for i in range(4) for sample in training_set.samples(i)]
    centres = {sample.centering for sample in samples}
    assert len(centres) == 8 and all(0 <= part <= 1 for centre in centres for part in centre)
    assert torch.equal(pixels, torch.stack([training_set.pixels(sample) for sample in samples]))


def test_workers_read_the_same_pictures(world, tmp_path, trained):
    steps = {"stage2_steps": 0, **SMOOTH}
    output = train(world, tmp_path / "output", **steps, **{"no-cache_latents": True, "dataloader_num_workers": 2})
    assert difference(output, trained(**steps)) < 1e-5


def test_repeats(world):
    """An epoch holds each portrait as often, in an order that may repeat one before all were there."""
    parts = prepared(world, repeats=3).parts
    index = torch.cat([parts.batches.training(parts.training, i).index for i in range(9)])
    assert torch.bincount(index).tolist() == [3] * 6
    assert torch.bincount(index[:6], minlength=6).tolist() != [1] * 6


def test_the_interpolation_mode(world):
    training_set = prepared(world, image_interpolation_mode="nearest").parts.training.training_set
    pixels = (training_set.pixels(Sample(5)) + 1) * 127.5
    whole = np.asarray(load_picture(training_set.rows[5].image, "")).reshape(-1, 3)
    colors = {tuple(color) for color in whole.tolist()}
    assert {tuple(color) for color in pixels.flatten(1).T.round().int().tolist()} <= colors
