"""The rows of the benchmarks' tables: means, errors, the strength curve, and what is derived from several rows."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.parts.tables import (
    Row,
    curve_change_at,
    distance_below_curve,
    estimate,
    overall_rows,
    paired_difference,
    resampled,
    resamples_of,
    share_of,
    summarise,
    with_interval,
    with_worst,
)
from evaluation.measures import Estimate


PROMPTS = 40


def test_standard_errors_count_prompts_and_not_seeds_times_prompts():
    once = np.random.default_rng(0).normal(size=(1, 50))
    row = Row("", "", 1.0, {"response": np.repeat(once, 3, axis=0)})
    summary = summarise(row.measures)["response"]
    assert summary["standard_error"] == pytest.approx(once[0].std(ddof=1) / np.sqrt(50))
    assert summary["seed_spread"] == 0
    summary = summarise({"response": np.array([[0.0, 0.0], [1.0, 1.0]])})["response"]
    assert summary["mean"] == 0.5 and summary["standard_error"] == 0
    assert summary["seed_spread"] == pytest.approx(np.sqrt(0.5))
    assert np.isnan(summarise({"response": once})["response"]["seed_spread"])


def test_what_is_not_there_does_not_count():
    nan = float("nan")
    found = summarise({"hit": np.array([[0.2, 0.6, nan, nan], [0.4, 0.8, 1.0, nan]])})["hit"]
    assert found["mean"] == pytest.approx((0.3 + 0.7 + 1) / 3) and found["prompts"] == 3
    assert np.isnan(summarise({"hit": np.full((2, 2), nan)})["hit"]["mean"])


def test_the_curve_gives_the_least_change_that_still_responds_as_asked():
    strengths = np.array([0, 0.5, 1.0])
    rising, changes = np.array([0.2, 0.4, 0.8]), np.array([2.0, 4.0, 12.0])
    assert curve_change_at(0.6, strengths, rising, changes) == pytest.approx(8)
    assert curve_change_at(0.1, strengths, rising, changes) == pytest.approx(2)
    # nothing responds as much: the change of what responds most
    assert curve_change_at(0.9, strengths, rising, changes) == pytest.approx(12)
    # a response that falls again at full strength is reached at the lower strength
    bent = np.array([0.2, 0.8, 0.6])
    assert curve_change_at(0.6, strengths, bent, changes) == pytest.approx(2 + 2 * 2 / 3, abs=0.05)


def test_run_and_curve_are_resampled_together():
    """Prompts that change a lot do so in every row, which must not count as uncertainty of the difference."""
    luck = np.random.default_rng(0).normal(0, 3, PROMPTS)
    response = np.tile([0.0, 1.0], PROMPTS // 2)[None]
    levels = ((0.0, 5.0), (1.0, 9.0))
    curve = [Row("", "", s, {"response": response, "change_outside": (luck + c)[None]}) for s, c in levels]
    row = Row("", "", 1.0, {"response": response, "change_outside": (luck + 4.0)[None]})
    found = distance_below_curve(row, curve)
    assert found["distance"] == pytest.approx(1) and found["standard_error"] < 1e-9


def test_a_share_is_told_by_seed_and_its_interval_counts_seeds():
    rng = np.random.default_rng(0)
    prompts = rng.uniform(1, 3, PROMPTS)
    plain = Row("", "plain", 1.0, {"excess": np.stack([2 * prompts, 2 * prompts, 4 * prompts])}, seeds=(1, 2, 3))
    row = Row("", "own", 1.0, {"excess": np.stack([prompts, prompts])}, seeds=(3, 1))
    found = share_of(row, plain, "excess")
    assert found.by_seed == {3: pytest.approx(0.25), 1: pytest.approx(0.5)}
    assert found.whole.value == pytest.approx(1 / 3) and found.worst == pytest.approx(0.5)
    # Prompts that change more do so in both, and do not count; one seed or the other may be the only one.
    assert (found.whole.low, found.whole.high) == (pytest.approx(0.25), pytest.approx(0.5))


def test_resamples_draw_seeds_and_prompts_and_keep_those_of_one_seed_together():
    seeds, prompts = np.array([[0.0], [1.0], [4.0]]), np.random.default_rng(0).normal(size=(1, PROMPTS))
    row = Row("", "", 1.0, {"response": np.broadcast_to(prompts, (3, PROMPTS))})
    resamples = resamples_of([row])
    found = resampled(seeds + prompts, resamples)
    # what seeds do and what prompts do, apart
    apart = resampled(np.broadcast_to(seeds, (3, PROMPTS)), resamples) + prompts[0][resamples].mean(axis=1)
    assert found == pytest.approx(apart) and found.shape == (1000,)
    # the mean of three of three seeds, with replacement
    assert np.std(apart - prompts[0][resamples].mean(axis=1)) == pytest.approx(seeds.std() / np.sqrt(3), rel=0.05)
    # a row of as many seeds has the same ones
    assert resampled(2 * (seeds + prompts), resamples) == pytest.approx(2 * found)
    once = estimate(row, "response", resamples)
    assert once.value == pytest.approx(prompts.mean()) and once.high - once.low < 1
    wide = estimate(Row("", "", 1.0, {"response": seeds + prompts}), "response", resamples)
    assert wide.low < 0.5 and wide.high > 3


def test_the_worst_seed_is_the_least_response_and_the_most_pollution():
    values = np.array([[0.5, 0.7], [0.1, 0.3], [0.9, 0.9]])
    row = Row("", "", 1.0, {"response": values, "excess": values, "base_change": values}, seeds=(1, 2, 3))
    assert [row.worst(name) for name in row.measures] == pytest.approx([0.2, 0.9, 0.9])
    # a single seed has no worst, and no row is changed by asking
    assert row.of_seeds([2]).worst("response") is None
    assert with_worst(Estimate(0.77, 0.7, 0.83), 0.71) == "0.77 [0.70, 0.83], worst 0.71"
    assert with_worst(Estimate(0.77, 0.7, 0.83), None) == "0.77 [0.70, 0.83]"


def test_rows_of_different_seeds_are_compared_at_those_they_share():
    def row(shift: float, *seeds: int) -> Row:
        values = np.array(seeds, dtype=float)[:, None] + shift + np.zeros((1, PROMPTS))
        return Row("", "", 1.0, {"response": values / 100, "change_outside": values}, seeds=seeds)

    five, three = row(0.0, 1, 2, 3, 14, 15), row(0.5, 1, 2, 3)
    for first, second, difference in ((three, five, 0.5), (five, three, -0.5)):
        found = paired_difference(first, second, "change_outside", resamples_of([first]))
        assert found.value == found.low == found.high == pytest.approx(difference)
    original = Row("", "original", 0.0, {name: np.zeros((1, PROMPTS)) for name in five.measures})
    found = distance_below_curve(three, [original, five])
    # of seeds 14 and 15 the curve would respond as much at a lower strength
    assert found["beyond_the_curve"] and found["distance"] == pytest.approx(-0.5) and len(found["per_seed"]) == 3
    # run and curve have the same seeds in every resample
    assert found["standard_error"] < 1e-9
    rows = [replace(five, run_name="plain"), three]
    both = overall_rows({"red_hat": rows, "blonde_hair": rows})
    assert [own.seeds for own in both] == [five.seeds, three.seeds]


def test_a_paired_difference_has_no_luck_of_the_prompts():
    luck = np.random.default_rng(0).normal(0, 3, (1, PROMPTS))
    first, second = (Row("", "", 1.0, {"response": luck + shift}, seeds=(1,)) for shift in (0.0, 0.5))
    found = paired_difference(second, first, "response", resamples_of([first]))
    assert found.value == pytest.approx(0.5) and found.low == pytest.approx(0.5) == found.high
    assert with_interval(Estimate(0.5, -0.25, 1), signed=True) == "+0.50 [-0.25, +1.00]"
    assert with_interval(Estimate(0.5, None, None)) == "0.50"
