"""Tests of `region_guidance.py` against values worked out by hand."""

import pytest
import torch

from region_guidance import (
    RunningMap,
    blur,
    guidance_map,
    keep_to_region,
    noise_difference,
    normalize_differences,
    percentile_normalize,
)


def test_percentiles_cut_a_lone_pixel():
    maps = torch.arange(101.0).view(1, 1, 101)
    maps[..., -1] = 1000
    normalized = percentile_normalize(maps)[0, 0]
    # The quantiles of 0..100 at .05 and .95 are 5 and 95.
    torch.testing.assert_close(normalized[[0, 5, 50, 95, 100]], torch.tensor([0, 0, 0.5, 1, 1]))
    torch.testing.assert_close(percentile_normalize(maps, 0.0, 0.5)[0, 0, 25], torch.tensor(0.5))


def test_blur_repeats_the_border():
    maps = torch.zeros(1, 1, 4, 4)
    maps[..., 0, 0] = 9
    expected = torch.zeros(4, 4)
    # The corner counts four times for itself: once as it is and three times as border.
    expected[0, 0], expected[0, 1], expected[1, 0], expected[1, 1] = 4, 2, 2, 1
    torch.testing.assert_close(blur(maps)[0, 0], expected)
    torch.testing.assert_close(blur(torch.full((2, 3, 5, 7), 0.3), 5), torch.full((2, 3, 5, 7), 0.3))


def test_noise_difference_by_hand():
    reference = torch.zeros(1, 2, 1, 2, dtype=torch.float16)
    response = torch.tensor([[[[1.0, -1.0]], [[-3.0, 0.0]]]], dtype=torch.float16)
    difference = noise_difference(response, reference)
    assert difference.dtype == torch.float32
    # The mean of absolute values, so a plus and a minus do not cancel.
    assert difference.tolist() == [[[[2.0, 0.5]]]]


def test_a_running_map_is_of_the_mean_of_what_was_stretched():
    first, second = torch.rand(2, 3, 1, 6, 8, generator=torch.Generator().manual_seed(0))
    running = RunningMap()
    assert torch.equal(running.add(first), guidance_map(normalize_differences(first)))
    # A call counts alike however large its differences are, as they are at another noise level.
    both = running.add(1000 * second)
    mean = (normalize_differences(first) + normalize_differences(second)) / 2
    torch.testing.assert_close(both, guidance_map(mean))
    assert torch.equal(running.map(), both) and running.calls == 2
    assert not torch.allclose(both, guidance_map(mean.flip(-1)))


def test_a_map_before_the_first_call_is_an_error():
    with pytest.raises(ZeroDivisionError):
        RunningMap().map()


@pytest.mark.parametrize(
    ("strength", "expected"), [(0.0, [3.0, 3.0, 3.0]), (0.5, [2.0, 2.5, 3.0]), (1.0, [1.0, 2.0, 3.0])]
)
def test_a_prediction_is_kept_to_the_region(strength, expected):
    response, reference = torch.full((1, 2, 1, 3), 3.0), torch.ones(1, 2, 1, 3)
    opened = torch.tensor([0.0, 0.5, 1.0]).view(1, 1, 1, 3)
    kept = keep_to_region(response, reference, opened, strength)
    assert kept.tolist() == [[[expected], [expected]]]


def test_what_is_kept_has_the_responses_dtype():
    response = torch.ones(1, 2, 3, 3, dtype=torch.bfloat16)
    assert keep_to_region(response, torch.zeros_like(response), torch.ones(1, 1, 3, 3), 1.0).dtype == torch.bfloat16
