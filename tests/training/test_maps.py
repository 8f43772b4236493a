"""Tests of the maps of alignment portraits: every mode, and the bank of them."""

from dataclasses import replace

import pytest
import torch
from test_train import CARD, RUN_FILE, WEIGHTS, difference, files, train, watch

from sfcm import SFCM_MODES
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


def test_no_picture_of_the_maps_where_each_step_makes_its_own(world, tmp_path):
    flags = {"sfcm_mode": "paper", "stage1_steps": 1, "stage2_steps": 1}
    output = train(world, tmp_path / "output", num_validation_images=1, **flags)
    assert "validation/alignment.png" not in files(output)
