"""The SFCMs that lost, by hand, and that the training script can be run with them."""

import pytest
import torch
from test_sfcm import make_inputs

from benchmarks import sfcm_modes
from benchmarks.sfcm_modes import LOST, sfcm_noise, sfcm_product
from region_guidance import blur, percentile_normalize
from sfcm import SFCM_MODES
from training import flag_rules


def test_they_are_known_once_they_are_registered(registered):
    sfcm_modes.register()
    assert flag_rules.SFCM_MODES == list(SFCM_MODES) and LOST.keys() < SFCM_MODES.keys()


def test_noise_map_looks_at_the_difference_alone():
    difference, maps, distances, mask = make_inputs()
    sfcm = sfcm_noise(difference, maps, distances, mask)
    torch.testing.assert_close(sfcm, percentile_normalize(blur(difference)))
    torch.testing.assert_close(sfcm, sfcm_noise(difference, 1 - maps, 2 * distances, ~mask))


def test_product_map_by_hand():
    difference = torch.arange(20.0).view(1, 1, 1, 20).expand(1, 1, 20, 20).contiguous()
    maps = torch.zeros(1, 3, 20, 20)
    maps[0, 0, :10], maps[0, 1], maps[0, 2] = 1, 1, 1
    distances, mask = torch.tensor([[1.0, 0.5, 9.0]]), torch.tensor([[True, True, False]])
    sfcm = sfcm_product(difference, maps, distances, mask)
    # Where the farthest phrase is, nothing is left; the nearest and the padded take nothing away.
    assert (sfcm[..., :10, :] == 0).all()
    taken = percentile_normalize(blur(difference))
    taken[..., :10, :] = 0
    torch.testing.assert_close(sfcm, percentile_normalize(taken))


def test_attention_alone_is_what_the_phrases_leave_by_hand():
    maps = torch.zeros(1, 2, 8, 8)
    maps[0, 0, :4], maps[0, 1, 4:] = 1, 1
    distances, mask = torch.tensor([[0.2, 0.8]]), torch.ones(1, 2, dtype=torch.bool)
    for difference in (torch.rand(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)):
        sfcm = LOST["attention"].compute(difference, maps, distances, mask)
        assert (sfcm[..., :4, :] == 1).all() and (sfcm[..., 4:, :] == 0).all()


def test_the_hard_map_is_the_soft_one_cut_at_a_half():
    given = make_inputs()
    soft, hard = (mode.compute(*given) for mode in (SFCM_MODES["averaged_target"], LOST["averaged_target_hard"]))
    assert set(hard.unique().tolist()) == {0.0, 1.0} and torch.equal(hard == 1, soft >= 0.5)


@pytest.mark.parametrize("name", LOST)
def test_each_is_a_map_of_each_sample_and_ignores_what_pads_its_phrases(name):
    difference, maps, distances, mask = make_inputs()
    compute = LOST[name].compute
    sfcm = compute(difference, maps, distances, mask)
    assert sfcm.shape == difference.shape and sfcm.dtype == torch.float32 and 0 <= sfcm.min() and sfcm.max() <= 1
    peaks = torch.ones(3)
    if name == "attention":  # the last prompt has one phrase, which is the nearest, and takes nothing
        peaks[2] = 0
    torch.testing.assert_close(sfcm.flatten(1).amax(1), peaks)
    for i in range(3):
        one = slice(i, i + 1)
        torch.testing.assert_close(sfcm[one], compute(difference[one], maps[one], distances[one], mask[one]))
    torch.testing.assert_close(sfcm[-1:], compute(difference[-1:], maps[-1:, :1], distances[-1:, :1], mask[-1:, :1]))
    if name != "attention":
        assert (compute(torch.full((3, 1, 8, 12), 0.1), maps, distances, mask) == 0).all()
