"""Tests of the maps of alignment portraits: every mode, and the bank of them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from test_train import CARD, RUN_FILE, WEIGHTS, difference, files, train, watch

from region_guidance import guidance_map, percentile_normalize
from sfcm import SFCM_MODES
from toy_portraits.recipe import BASE_MODEL
from toy_portraits.world import TARGETS, render, sample_factors
from training import maps
from training.maps import MapMaker


@pytest.mark.parametrize("mode", SFCM_MODES)
def test_every_sfcm_mode_trains(trained, mode):
    output = trained(sfcm_mode=mode)
    assert files(output) == {WEIGHTS, CARD, RUN_FILE, f"stage1/{WEIGHTS}"}
    if mode != "none":
        # A gain of Adam's first steps: even a small change of the loss moves some weight.
        assert difference(output, trained(sfcm_mode="none")) > 1e-4


def test_the_bank_of_maps_does_not_depend_on_the_batch_size(run):
    """Else a run on two processes would be another one than a run on one with the double batch."""
    first, second = (torch.stack(run.parts.maps.fill_bank(run.alignment, size, False)) for size in (1, 3))
    assert (first - second).abs().max() < 1e-3 and first.std() > 0.1


def test_the_bank_is_refreshed_with_the_student(world, tmp_path, monkeypatch):
    banks = watch(monkeypatch, MapMaker, "fill_bank")
    train(world, tmp_path / "output", stage2_steps=5, sfcm_refresh_steps=2)
    banks = [torch.stack(bank) for bank in banks]
    assert len(banks) == 1 + 2
    assert (banks[0] - banks[1]).abs().max() > 1e-3


def test_a_map_of_the_target_alone_leaves_out_what_the_lora_does_to_any_prompt(run, monkeypatch):
    """Without a target in the full prompts its difference is zero, and that of the two paths is not."""
    table = replace(run.parts.table, response_rows=run.parts.table.reference_rows)
    differences = watch(monkeypatch, maps, "noise_difference")
    for mode in ("averaged_target", "averaged"):
        maker = MapMaker(run.parts.models, table, replace(run.flags.alignment, sfcm_mode=mode), 0)
        maker.fill_bank(run.alignment, 4, False)
    count = len(differences) // 2
    largest = torch.stack([difference.max() for difference in differences])
    assert count and largest[:count].max() < 1e-3 * largest[count:].min()


def test_the_map_of_both_differences_is_made_of_the_two_that_the_other_modes_take(run, monkeypatch):
    made, make = [], MapMaker._make

    def remember(maker, rows, difference, *attention):
        sfcm = make(maker, rows, difference, *attention)
        made.append((difference, sfcm))
        return sfcm

    monkeypatch.setattr(MapMaker, "_make", remember)
    for mode in ("averaged", "averaged_target", "averaged_both"):
        flags = replace(run.flags.alignment, sfcm_mode=mode)
        MapMaker(run.parts.models, run.parts.table, flags, 0).fill_bank(run.alignment, 2, False)
    count, table = len(made) // 3, run.parts.table
    monkeypatch.setattr(maps, "phrase_attention_maps", lambda probs, resolutions, weights, size: taken)
    for paths, words, both in zip(made[:count], made[count : 2 * count], made[2 * count :], strict=True):
        assert both[0].shape[1] == 2
        assert torch.equal(both[0], torch.cat([paths[0], words[0]], 1))
        assert (both[1] - paths[1]).abs().max() > 1e-2 and (both[1] - words[1]).abs().max() > 1e-2
        # Where no phrase takes anything it is the geometric mean.
        rows, size = torch.arange(len(both[0])), both[0].shape[-2:]
        taken = torch.zeros(len(rows), table.phrase_mask.shape[1], *size)
        maker = MapMaker(run.parts.models, table, replace(run.flags.alignment, sfcm_mode="averaged_both"), 0)
        mean = (guidance_map(paths[0]) * guidance_map(words[0])).sqrt()
        torch.testing.assert_close(make(maker, rows, both[0], [], []), percentile_normalize(mean))


def test_no_picture_of_the_maps_where_each_step_makes_its_own(world, tmp_path):
    flags = {"sfcm_mode": "paper", "stage1_steps": 1, "stage2_steps": 1}
    output = train(world, tmp_path / "output", num_validation_images=1, **flags)
    assert "validation/alignment.png" not in files(output)


# ---------------------------------------------------------------------------------------------------------- timesteps


@pytest.mark.parametrize(
    ("size", "expected"),
    [((64, 64), (600, 950)), ((16, 16), (600, 950)), ((48, 80), (600, 950)), ((128, 128), (776, 1000))],
)
def test_larger_latents_are_seen_through_more_noise(run, size, expected):
    noise = run.parts.models.noise
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    assert maps.timesteps_at(size, type(noise)("DDIMScheduler", config)) == expected


def test_a_range_of_the_flag_is_the_one_that_counts(run, monkeypatch):
    seen = []
    monkeypatch.setattr(maps, "timesteps_at", lambda *args: pytest.fail("the rule was asked"))
    noise = run.parts.models.noise
    monkeypatch.setattr(noise, "add_noise", lambda latents, noise, steps: seen.append(steps) or latents)
    flags = replace(run.flags.alignment, sfcm_timesteps=(100, 200))
    MapMaker(run.parts.models, run.parts.table, flags, 0).fill_bank(run.alignment, 3, False)
    assert all(100 <= step < 200 for steps in seen for step in steps.tolist()) and seen


@torch.no_grad()
def test_a_change_at_twice_the_side_is_seen_through_twice_the_noise():
    """The reason of the rule, on the toy world's VAE and all of its targets."""
    vae, factors = AutoencoderKL.from_pretrained(BASE_MODEL / "vae"), sample_factors(12, np.random.default_rng(0))
    ratios = []
    for target in TARGETS.values():
        changed = factors | {target.factor: np.full_like(factors[target.factor], target.value)}
        pictures = [torch.from_numpy(render(own)[0]).permute(0, 3, 1, 2) / 127.5 - 1 for own in (factors, changed)]
        energy = []
        for side in (64, 128):
            sized = [F.interpolate(own, (side, side), mode="bicubic").clamp(-1, 1) for own in pictures]
            before, after = (vae.encode(own).latent_dist.mean for own in sized)
            energy.append((after - before).square().sum())
        ratios.append((energy[1] / energy[0]).sqrt().item())
    assert 1.6 < min(ratios) and max(ratios) < 2.4 and 1.8 < sum(ratios) / 3 < 2.1
