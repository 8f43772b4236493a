"""Tests of `sfcm.py` against values worked out by hand."""

import pytest
import torch

from region_guidance import blur, guidance_map, percentile_normalize
from sfcm import (
    SFCM_MODES,
    free_regions,
    min_max_normalize,
    phrase_attention_maps,
    relative_distances,
    sfcm_averaged,
    sfcm_paper,
    taken_by_phrases,
)


def make_inputs(batch: int = 3, phrases: int = 4, height: int = 8, width: int = 12) -> tuple[torch.Tensor, ...]:
    """Difference, phrase maps, distances, mask; the last sample has one phrase, and its padding has wild distances."""
    generator = torch.Generator().manual_seed(0)
    difference = torch.rand(batch, 1, height, width, generator=generator)
    maps = min_max_normalize(torch.rand(batch, phrases, height, width, generator=generator))
    distances = 0.1 + 0.2 * torch.rand(batch, phrases, generator=generator)
    mask = torch.ones(batch, phrases, dtype=torch.bool)
    mask[-1, 1:] = False
    maps[-1, 1:] = 0
    distances[-1, 1:] = 2
    return difference, maps, distances, mask


# -------------------------------------------------------------------------------------------------- normalisation


def test_min_max_is_per_map():
    maps = torch.tensor([[[1.0, 2.0], [3.0, 5.0]], [[-4.0, 0.0], [-2.0, -3.0]]])
    expected = torch.tensor([[[0, 0.25], [0.5, 1]], [[0, 1], [0.5, 0.25]]])
    torch.testing.assert_close(min_max_normalize(maps), expected)


@pytest.mark.parametrize("normalize", [min_max_normalize, percentile_normalize])
@pytest.mark.parametrize("value", [0.0, 1 / 77, -3.0])
def test_a_flat_map_is_zero_beside_one_that_is_not(normalize, value):
    maps = torch.stack([torch.full((4, 5), value), torch.arange(20.0).view(4, 5)])
    normalized = normalize(maps)
    assert (normalized[0] == 0).all()
    assert normalized[1].min() == 0 and normalized[1].max() == 1


@pytest.mark.parametrize("normalize", [min_max_normalize, percentile_normalize])
def test_rounding_errors_are_not_stretched_to_a_map(normalize):
    flat = torch.full((1, 8, 8), 1 / 77)
    flat += torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0)) * 5e-9
    assert flat.unique().numel() > 1
    assert (normalize(flat) == 0).all()


def test_a_faint_map_is_still_a_map():
    faint = 1e-12 * torch.arange(4.0).view(1, 2, 2)
    torch.testing.assert_close(min_max_normalize(faint), torch.arange(4.0).view(1, 2, 2) / 3)


# ------------------------------------------------------------------------------------------------- its ingredients


def test_phrase_map_of_one_token_is_its_column():
    probs = torch.rand(1, 6, 5, generator=torch.Generator().manual_seed(0))
    weights = torch.zeros(1, 2, 5)
    weights[0, 0, 3] = 1
    weights[0, 1, [1, 2]] = 0.5
    maps = phrase_attention_maps([probs], [(2, 3)], weights, (2, 3))
    torch.testing.assert_close(maps[0, 0], min_max_normalize(probs[0, :, 3].view(2, 3)))
    torch.testing.assert_close(maps[0, 1], min_max_normalize(probs[0, :, 1:3].mean(1).view(2, 3)))


def test_phrase_maps_average_layers_before_they_are_normalised():
    strong, weak = torch.tensor([0.0, 0.4, 0.0, 0.0]), torch.tensor([0.1, 0.0, 0.0, 0.0])
    maps = phrase_attention_maps(
        [strong.view(1, 4, 1), weak.view(1, 4, 1)], [(2, 2), (2, 2)], torch.ones(1, 1, 1), (2, 2)
    )
    torch.testing.assert_close(maps[0, 0], torch.tensor([[0.25, 1.0], [0.0, 0.0]]))


def test_phrase_maps_of_layers_that_are_not_square():
    probs = torch.zeros(1, 8, 1)
    probs[0, 5] = 1  # row 1, column 1 of (2, 4)
    maps = phrase_attention_maps([probs], [(2, 4)], torch.ones(1, 1, 1), (4, 8))
    assert maps.shape == (1, 1, 4, 8)
    rows, columns = torch.nonzero(maps[0, 0] == 1, as_tuple=True)
    assert rows.tolist() == [3, 3] and columns.tolist() == [2, 3]


def test_a_padded_phrase_has_no_map():
    probs = torch.rand(1, 4, 3, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([[[1.0, 0, 0], [0, 0, 0]]])
    maps = phrase_attention_maps([probs], [(2, 2)], weights, (4, 4))
    assert maps[0, 0].max() == 1
    assert (maps[0, 1] == 0).all()


@pytest.mark.parametrize(("side", "size"), [(8, 64), (16, 64), (16, 20), (5, 12)])
def test_even_attention_has_no_map(side, size):
    """Interpolating equal values leaves rounding errors, which must not become a map of their own."""
    even = torch.full((1, side * side, 7), 1 / 77)
    maps = phrase_attention_maps([even] * 3, [(side, side)] * 3, torch.eye(7)[None, :2], (size, size))
    assert (maps == 0).all()


def test_relative_distances_ignore_padding():
    distances = torch.tensor([[0.7, 0.9, 1.1, 5.0], [0.8, 0.8, 0.8, 0.8], [0.5, 0.1, 0.2, 0.3], [1.0, 2.0, 3.0, 4.0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    expected = torch.tensor([[0, 0.5, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(relative_distances(distances, mask), expected)


# -------------------------------------------------------------------------------------------------------- the maps


def test_paper_map_by_hand():
    difference = torch.tensor([[[[2.0, 4.0], [6.0, 10.0]]]])  # normalised 0, .25, .5, 1
    maps = torch.tensor([[[[0.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [1.0, 1.0]]]])
    distances = torch.tensor([[0.25, 0.5, 9.0]])
    mask = torch.tensor([[True, True, False]])
    # Left over: max(0 - .5, 0) = 0, .25, .5 - .25 = .25, 1 - .5 = .5; stretched to 0, .5, .5, 1.
    expected = torch.tensor([[[[0.0, 0.5], [0.5, 1.0]]]])
    torch.testing.assert_close(sfcm_paper(difference, maps, distances, mask), expected)


def test_paper_map_is_wiped_out_by_large_distances():
    difference, _, _, mask = make_inputs()
    sfcm = sfcm_paper(difference, torch.ones(3, 4, 8, 12), torch.full((3, 4), 1.0), mask)
    assert (sfcm == 0).all()


def test_averaged_map_takes_the_mean_over_the_phrases_there_are():
    difference = torch.arange(20.0).view(1, 1, 1, 20).expand(2, 1, 20, 20).contiguous()
    maps = torch.zeros(2, 3, 20, 20)
    maps[:, 0, :10] = 1
    distances = torch.tensor([[1.0, 0.5, 0.7], [1.0, 0.5, 9.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    start = percentile_normalize(blur(difference))
    # The first phrase is the farthest of its prompt: a third, and a half, of its map goes.
    left = torch.stack([start[0] - maps[0, :1] / 3, start[1] - maps[1, :1] / 2]).clamp(min=0)
    torch.testing.assert_close(sfcm_averaged(difference, maps, distances, mask), percentile_normalize(left))


def test_a_map_of_two_differences_is_their_geometric_mean():
    first, maps, distances, mask = make_inputs()
    second = first.flip(-1) ** 2
    start = (percentile_normalize(blur(first)) * percentile_normalize(blur(second))).sqrt()
    both = torch.cat([first, 3 * second], 1)  # each on its own scale
    torch.testing.assert_close(guidance_map(both), start)
    left = (start - taken_by_phrases(maps, distances, mask)).clamp(min=0)
    torch.testing.assert_close(sfcm_averaged(both, maps, distances, mask), percentile_normalize(left))
    assert torch.equal(guidance_map(first), percentile_normalize(blur(first)))
    torch.testing.assert_close(guidance_map(torch.cat([first, first], 1)), guidance_map(first))
    flat = torch.cat([first, torch.full_like(first, 0.1)], 1)
    assert (sfcm_averaged(flat, maps, distances, mask) == 0).all()


@pytest.mark.parametrize("name", SFCM_MODES)
def test_every_mode_gives_a_map(name):
    difference, maps, distances, mask = make_inputs()
    sfcm = SFCM_MODES[name].compute(difference, maps, distances, mask)
    assert sfcm.shape == difference.shape and sfcm.dtype == torch.float32
    assert sfcm.min() >= 0 and sfcm.max() <= 1
    peaks = torch.zeros(3) if name == "none" else torch.ones(3)
    torch.testing.assert_close(sfcm.flatten(1).amax(1), peaks)


@pytest.mark.parametrize("name", SFCM_MODES)
def test_every_mode_is_per_sample(name):
    difference, maps, distances, mask = make_inputs()
    compute = SFCM_MODES[name].compute
    together = compute(difference, maps, distances, mask)
    for i in range(3):
        one = slice(i, i + 1)
        torch.testing.assert_close(together[one], compute(difference[one], maps[one], distances[one], mask[one]))


@pytest.mark.parametrize("name", SFCM_MODES)
def test_every_mode_ignores_what_pads_the_phrases(name):
    difference, maps, distances, mask = make_inputs()
    compute = SFCM_MODES[name].compute
    short = compute(difference[-1:], maps[-1:, :1], distances[-1:, :1], mask[-1:, :1])
    torch.testing.assert_close(compute(difference, maps, distances, mask)[-1:], short)


@pytest.mark.parametrize("name", SFCM_MODES)
@pytest.mark.parametrize("value", [0.0, 0.1])
def test_no_difference_gives_no_map(name, value):
    _, maps, distances, mask = make_inputs()
    assert (SFCM_MODES[name].compute(torch.full((3, 1, 8, 12), value), maps, distances, mask) == 0).all()


def test_which_modes_average_over_noise():
    averaged = {name: mode.differences for name, mode in SFCM_MODES.items() if mode.averaged}
    assert averaged == {
        "averaged_target": ("words",), "averaged": ("paths",), "averaged_both": ("paths", "words"),
    }  # fmt: skip
    assert SFCM_MODES["paper"].differences == SFCM_MODES["none"].differences == ("paths",)


# ------------------------------------------------------------------------------------------------------ free phrases


def test_a_free_phrase_opens_the_map_and_no_other_does():
    sfcm = torch.tensor([[[[0.2, 0.9]]], [[[0.0, 0.5]]]])
    maps = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]], [[[0.6, 0.4]], [[1.0, 0.7]]]])
    free = torch.tensor([[True, False], [True, True]])
    torch.testing.assert_close(free_regions(sfcm, maps, free), torch.tensor([[[[1.0, 0.9]]], [[[1.0, 0.7]]]]))


def test_without_free_phrases_the_map_stays():
    _, maps, _, mask = make_inputs()
    sfcm = torch.rand(3, 1, 8, 12)
    assert torch.equal(free_regions(sfcm, maps, torch.zeros_like(mask)), sfcm)
