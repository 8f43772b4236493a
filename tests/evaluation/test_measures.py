"""The evaluation's measures against numbers worked out by hand, and its intervals."""

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.judges import Judges
from evaluation.measures import (
    MEASURES,
    Compared,
    Estimate,
    Measure,
    Portraits,
    cosine,
    direction_similarity,
    estimate_mean,
    interval,
    label_agreement,
    mean_of,
    measure,
    nearer_to,
    only_inside,
    pixel_change,
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


# ---------------------------------------------------------------------------------------------------- what is measured


class Judge:
    """A mean color, and how often it was asked for one."""

    asked = 0

    def images(self, pictures):
        self.asked += len(pictures)
        return pictures.mean((1, 2))


def test_a_measure_is_one_entry_and_a_judge_is_asked_once(monkeypatch):
    pictures = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    before, after = Portraits(pictures[:2], pictures[:2]), Portraits(pictures[1:3], pictures[2:])
    part = Compared(before, after, np.ones((2, 8, 8)), [None] * 2)
    judges = Judges(dino=Judge(), frechet=lambda first, second: len(first))
    brightness = [pictures[2:].mean((1, 2, 3)), pictures[:2].mean((1, 2, 3))]
    brighter = Measure("brighter", "response", "higher", "", lambda p: (p.after * 1.0 - p.before).mean((1, 2, 3)))
    monkeypatch.setitem(MEASURES, "brighter", brighter)
    values, whole = measure([part, part], judges)
    assert values["brighter"] == pytest.approx(np.tile(brightness[0] - brightness[1], 2))
    assert whole == {"fd_dino": 4} and judges.dino.asked == 8
    assert set(values) == {"change", "change_outside", "base_change", "ssim", "dino", "brighter"}
