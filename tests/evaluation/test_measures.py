"""The evaluation's measures against numbers worked out by hand, its intervals, the index, the flags and the knee."""

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.measures import (
    Changes,
    Estimate,
    can_be_reference,
    cosine,
    direction_similarity,
    estimate_mean,
    estimate_pollution,
    flags_of,
    interval,
    knee,
    label_agreement,
    mean_of,
    nearer_to,
    only_inside,
    pixel_change,
    pollution_samples,
    resample_prompts,
    resampled_means,
    ssim,
)


@pytest.fixture
def pictures():
    """Black pictures of 2x2 pixels, and the same with one pixel of (30, 60, 90), whose channels' mean is 60."""
    original = np.zeros((1, 2, 2, 3), dtype=np.uint8)
    adapted = original.copy()
    adapted[0, 0, 1] = (30, 60, 90)
    return original, adapted


def test_pixel_change_is_a_mean_over_pixels_and_channels(pictures):
    assert pixel_change(*pictures) == pytest.approx([15])
    assert pixel_change(*pictures[::-1]) == pytest.approx([15])


def test_pixel_change_counts_pixels_by_their_weight(pictures):
    weight = np.array([[[1, 0.5], [1, 1]]])
    assert pixel_change(*pictures, weight) == pytest.approx([60 * 0.5 / 3.5])
    assert pixel_change(*pictures, np.array([[[0, 1], [0, 0]]])) == pytest.approx([60])
    assert np.isnan(pixel_change(*pictures, np.zeros((1, 2, 2)))).all()


def test_only_inside_takes_each_pixel_from_where_the_region_says(pictures):
    original, adapted = pictures
    region = np.zeros((1, 2, 2))
    assert (only_inside(original, adapted, region) == original).all()
    assert (only_inside(original, adapted, 1 - region) == adapted).all()
    region[0, 0, 1] = 0.5
    assert only_inside(original, adapted, region)[0, 0, 1].tolist() == [15, 30, 45]
    # Brighter to darker is a difference below 0.
    assert only_inside(adapted, original, region)[0, 0, 1].tolist() == [15, 30, 45]


def test_cosine_is_of_any_length_and_nan_for_nothing():
    found = cosine(np.array([[2.0, 0], [0, 1], [0, 0]]), np.array([[3.0, 3], [0, -5], [1, 0]]))
    assert found[:2] == pytest.approx([0.5**0.5, -1]) and np.isnan(found[2])


def test_direction_similarity_compares_changes_of_unit_vectors():
    right, up, left = (np.array([v], dtype=float) for v in ((2, 0), (0, 3), (-1, 0)))
    assert direction_similarity(right, up, right * 5, up) == pytest.approx([1])
    assert direction_similarity(right, up, up, right) == pytest.approx([-1])
    # (-1, 1) against (-2, 0)
    assert direction_similarity(right, up, right, left) == pytest.approx([0.5**0.5])
    assert np.isnan(direction_similarity(right, right * 2, right, up)).all()


def test_label_agreement_is_a_share_of_pixels():
    first = np.array([[[0, 1], [2, 2]], [[0, 0], [0, 0]]])
    assert label_agreement(first, np.array([[[0, 1], [2, 3]], [[1, 1], [1, 0]]])).tolist() == [0.75, 0.25]


def test_nearer_to_the_target_is_a_matter_of_angles():
    images = np.array([[1.0, 0.2], [0.2, 1.0]])
    target, neutral = np.array([[9.0, 0]] * 2), np.array([[0, 1.0]] * 2)
    assert nearer_to(images, target, neutral).tolist() == [1.0, 0.0]


def test_resampled_means_leave_nan_out():
    values = np.array([[1.0, 3.0], [np.nan, 8.0], [np.nan, np.nan]])
    found = resampled_means(values, np.array([[0, 1, 2], [0, 0, 1], [2, 2, 2]]))
    assert found[:2] == pytest.approx([12 / 3, 16 / 5]) and np.isnan(found[2])
    assert mean_of(values) == 4 and np.isnan(mean_of(values[2]))


def test_a_single_prompt_has_no_interval():
    assert estimate_mean(np.array([[1.0, 2.0, 6.0]]), resample_prompts(1, 1000, 0)) == Estimate(3.0, None, None)
    assert interval(np.array([np.nan, 1.0])) == (None, None)


def test_an_interval_is_as_wide_as_theory_says():
    values = np.random.default_rng(0).normal(5, 2, (400, 1))
    found = estimate_mean(values, resample_prompts(400, 2000, 1))
    half = 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert found.high - found.value == pytest.approx(half, rel=0.1)
    assert found.value - found.low == pytest.approx(half, rel=0.1)


def test_seeds_that_repeat_one_another_make_an_interval_no_narrower():
    values = np.random.default_rng(0).normal(0, 1, (100, 1))
    resamples = resample_prompts(100, 2000, 1)
    repeated, once = (estimate_mean(np.repeat(values, n, axis=1), resamples) for n in (4, 1))
    assert (repeated.low, repeated.high) == pytest.approx((once.low, once.high), rel=1e-12)


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng, resamples, covered = np.random.default_rng(3), resample_prompts(40, 400, 4), 0
    for _ in range(300):
        # Prompts differ from one another, and seeds within a prompt.
        found = estimate_mean(rng.normal(0, 1, (40, 1)) + rng.normal(0, 1, (40, 3)), resamples)
        covered += found.low <= 0 <= found.high
    assert 0.90 <= covered / 300 <= 0.98


def changes(outside, base):
    return Changes(np.full((3, 2), float(outside)), np.full((3, 2), float(base)))


def test_pollution_is_0_for_the_original_model_and_1_for_the_reference():
    original, reference, resamples = changes(1, 0), changes(9, 8), resample_prompts(3, 50, 0)
    assert estimate_pollution(original, original, reference, resamples).value == 0
    assert estimate_pollution(reference, original, reference, resamples) == Estimate(1.0, 1.0, 1.0)
    lora = estimate_pollution(changes(5, 3), original, reference, resamples)
    assert lora == Estimate(7 / 16, 7 / 16, 7 / 16)
    assert estimate_pollution(changes(5, 3), original, None, resamples).value == 7  # grey levels


def test_pollution_of_less_than_the_original_models_own_change_is_negative():
    assert estimate_pollution(changes(0.5, 0), changes(1, 0), changes(9, 8), resample_prompts(3, 5, 0)).value < 0


def test_pollution_is_resampled_with_its_reference():
    rng, resamples = np.random.default_rng(0), resample_prompts(30, 500, 0)
    outside = rng.uniform(2, 20, (30, 1))
    original, reference = Changes(np.zeros((30, 1)), np.zeros((30, 1))), Changes(outside, outside)
    # Half the reference's in every portrait: what the prompts' luck does to one it does to the other.
    value, samples = pollution_samples(Changes(outside / 2, outside / 2), original, reference, resamples)
    assert value == pytest.approx(0.5) and samples == pytest.approx(np.full(500, 0.5))


def test_a_lora_that_moves_nothing_is_no_reference():
    resamples = resample_prompts(3, 50, 0)
    assert can_be_reference(changes(9, 8), changes(1, 0), resamples)
    assert not can_be_reference(changes(1, 0), changes(1, 0), resamples)
    one = (Changes(np.ones((1, 2)), np.ones((1, 2))), Changes(np.ones((1, 2)), np.zeros((1, 2))))
    assert can_be_reference(*one, resample_prompts(1, 50, 0))


@pytest.mark.parametrize(
    ("pollution", "normalised", "gain", "flags"),
    [
        (0.05, True, 0.0, ["over-aligned"]),
        (0.05, True, 0.3, []),
        (0.5, True, 0.0, ["no response"]),
        (0.5, True, 0.3, []),
        (0.5, False, 0.0, ["over-aligned"]),  # half a grey level
        (5.0, False, 0.0, ["no response"]),
        (-0.2, True, -0.1, ["over-aligned"]),
    ],
)
def test_a_lora_that_keeps_everything_for_want_of_the_target_is_flagged(pollution, normalised, gain, flags):
    rng = np.random.default_rng(0)
    original = rng.uniform(0.2, 0.3, (20, 2))
    response = original + gain + rng.normal(0, 0.02, (20, 2))
    estimate = Estimate(pollution, None, None)
    assert flags_of(estimate, normalised, response, original, resample_prompts(20, 500, 0)) == flags


def test_a_gain_that_chance_explains_is_no_response():
    rng = np.random.default_rng(1)
    original, noise = np.zeros((8, 1)), rng.normal(0, 1, (8, 1))
    noise += 0.2 - noise.mean()  # above 0, and by far less than its error of about 0.35
    resamples = resample_prompts(8, 500, 0)
    assert flags_of(Estimate(0.0, None, None), True, noise, original, resamples) == ["over-aligned"]
    # One prompt has no interval, so its difference itself counts.
    one = resample_prompts(1, 500, 0)
    assert flags_of(Estimate(0.0, None, None), True, original[:1] + 0.2, original[:1], one) == []


def test_the_knee_is_where_response_exceeds_pollution_most():
    pollution, response = [0.1, 0.2, 0.6, 1.0], [0.5, 0.9, 0.95, 1.0]
    assert knee(pollution, response, (0, 0)) == 1
    # In other units it is the same one.
    assert knee([12 * p for p in pollution], [0.2 + 0.1 * r for r in response], (0, 0.2)) == 1
    # Order does not matter: a run may pollute less later on.
    assert knee(pollution[::-1], response[::-1], (0, 0)) == 2


def test_the_knee_of_equals_is_the_first_and_that_of_a_line_is_none():
    assert knee([0.2, 0.4, 1.0], [0.6, 0.8, 1.0], (0, 0)) == 0
    assert knee([0.25, 0.5, 1.0], [0.25, 0.5, 1.0], (0, 0)) is None
    assert knee([0.5, 0.8, 1.0], [0.1, 0.3, 1.0], (0, 0)) is None


def test_the_knee_of_checkpoints_that_do_not_pollute_is_the_one_that_responds_most():
    assert knee([0, 0, 0], [0.3, 0.9, 0.5], (0, 0)) == 1
    assert knee([0.1, 0.5], [0.2, 0.2], (0, 0.2)) is None


# ---------------------------------------------------------------------------------------------------------------- SSIM


def test_ssim_of_flat_pictures_is_that_of_their_luminance():
    # No variance, so only luminance counts: (2 a b + c) / (a^2 + b^2 + c) with c = (0.01 * 255)^2.
    dark, light = (np.full((1, 16, 16, 3), value, dtype=np.uint8) for value in (50, 100))
    constant = (0.01 * 255) ** 2
    assert ssim(dark, light) == pytest.approx([(2 * 5000 + constant) / (2500 + 10000 + constant)], rel=1e-9)
    assert ssim(dark, dark) == pytest.approx([1], abs=1e-12)


@pytest.mark.parametrize("size", [(6, 6), (64, 48)])
def test_ssim_is_that_of_torchmetrics_for_the_whole_set(size):
    functional = pytest.importorskip("torchmetrics.functional.image")
    rng = np.random.default_rng(0)
    first = rng.integers(0, 256, (5, *size, 3), dtype=np.uint8)
    # Alike, unlike, smooth, inverted and black.
    second = first.copy()
    second[1] = rng.integers(0, 256, (*size, 3))
    second[2] = np.asarray(Image.fromarray(first[2]).reduce(2).resize(size[::-1]))
    second[3], second[4] = 255 - first[3], 0
    pictures = (torch.from_numpy(part).permute(0, 3, 1, 2).double() for part in (second, first))
    expected = functional.structural_similarity_index_measure(*pictures, data_range=255.0, reduction="none")
    assert np.abs(ssim(first, second) - expected.numpy()).max() < 1e-12
