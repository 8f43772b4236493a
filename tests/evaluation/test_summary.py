"""The pollution index, the flags and the knee against numbers worked out by hand, and what the report says of them."""

import numpy as np
import pytest

from evaluation.measures import Estimate, resample_prompts
from evaluation.summary import (
    Changes,
    Judged,
    can_be_reference,
    correlate,
    estimate_pollution,
    flags_of,
    knee,
    pollution_samples,
    summarise,
)


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


# -------------------------------------------------------------------------------------------------------- the document


def judged(name, role, outside, base, response, **values):
    """A model whose three prompts and two seeds are all alike but for a little."""
    wobble = np.array([[0.0, 0.02], [-0.01, 0.01], [0.0, -0.02]])
    own = {"change": outside, "change_outside": outside, "base_change": base, "clip_t_inside": response, **values}
    return Judged(name, f"/loras/{name}", role, {key: value + wobble for key, value in own.items()}, {})


ORIGINAL = judged("original model", "original", 1, 0, 0.2)
PLAIN = judged("plain", "reference", 9, 8, 0.8)


def test_the_summary_is_in_units_of_the_reference():
    good = judged("good", "lora", 5, 3, 0.8)
    document = summarise([ORIGINAL, PLAIN, good], {"dino": "no network"}, 200, 0)
    by_name = {lora["name"]: lora for lora in document["loras"]}
    values = [lora["measures"]["pollution"]["value"] for lora in document["loras"]]
    assert values == pytest.approx([0, 1, 7 / 16])
    pollution = by_name["good"]["measures"]["pollution"]
    assert pollution["low"] <= pollution["value"] <= pollution["high"] and pollution["high"] - pollution["low"] < 0.05
    assert document["pollution_unit"] == "1 is plain" and document["not_computed"] == {"dino": "no network"}
    assert document["verdict"] == "plain: pollution 1.00, response 0.80; good: pollution 0.44, response 0.80."
    assert document["keep"] is None and document["rank_correlations"] is None
    # Rows are in the order of the report, and what is missing has one, too.
    assert list(document["measures"]) == [
        "change", "change_outside", "dino", "clip_t_inside", "pollution", "base_change",
    ]  # fmt: skip


def test_without_a_reference_that_pollutes_the_unit_is_grey_levels():
    alone = summarise([ORIGINAL, judged("lora", "lora", 5, 3, 0.8)], {}, 100, 0)
    assert alone["loras"][1]["measures"]["pollution"]["value"] == pytest.approx(7)
    assert "no --reference_lora" in alone["pollution_note"]
    clean = judged("clean", "reference", 1, 0, 0.8)
    found = summarise([ORIGINAL, clean, judged("lora", "lora", 5, 3, 0.8)], {}, 100, 0)
    assert found["loras"][2]["measures"]["pollution"]["value"] == pytest.approx(7)
    assert "clean moves no more than the original model" in found["pollution_note"]


def test_an_over_aligned_lora_is_flagged_in_verdict_and_entry():
    document = summarise([ORIGINAL, PLAIN, judged("timid", "lora", 1.1, 0.1, 0.2)], {}, 100, 0)
    assert document["loras"][2]["flags"] == ["over-aligned"] and document["loras"][0]["flags"] == []
    assert document["verdict"].endswith("timid: pollution 0.01, response 0.20, over-aligned.")


def test_the_checkpoint_to_keep_is_named_with_how_sure_that_is():
    run = [
        judged("checkpoint-10", "checkpoint", 1.5, 0.5, 0.3),
        judged("checkpoint-20", "checkpoint", 3, 1, 0.75),
        judged("checkpoint-30", "checkpoint", 9, 7, 0.8),
    ]
    document = summarise([ORIGINAL, PLAIN, *run], {}, 100, 0)
    assert document["keep"] == "checkpoint-20"
    assert document["verdict"].startswith("Keep checkpoint-20: the most response for its pollution")
    assert "100% of the resamples choose it too" in document["verdict"]
    flat = summarise([ORIGINAL, judged("checkpoint-10", "checkpoint", 3, 1, 0.2)], {}, 100, 0)
    assert flat["keep"] is None and flat["verdict"].startswith("No checkpoint stands out")
    for own in (ORIGINAL, run[0]):
        own = Judged(own.name, own.source, own.role, dict(own.values), {})
        own.values.pop("clip_t_inside")
        run.append(own)
    blind = summarise(run[-2:], {}, 100, 0)
    assert blind["keep"] is None and "without CLIP" in blind["verdict"] and blind["response_measure"] is None


def test_ranks_are_correlated_with_the_truth_over_three_loras():
    pytest.importorskip("torchmetrics")
    truth = [("a", 0.9, 1, 0.5), ("b", 0.8, 4, 0.5), ("c", 0.6, 3, 0.5)]
    entries = [
        {"measures": {n: {"value": v} for n, v in (("truth_kept", k), ("change_outside", c), ("dino", d))}}
        for _, k, c, d in truth
    ]
    found = {row["proxy"]: row for row in correlate(entries)}
    # Ranks 3 2 1 against 1 3 2: 1 - 6 * (4 + 1 + 1) / (3 * 8).
    assert found["change_outside"]["spearman"] == pytest.approx(-0.5, abs=1e-6)
    assert found["change_outside"]["loras"] == 3
    assert np.isnan(found["dino"]["spearman"])
    assert correlate(entries[:2]) is None
