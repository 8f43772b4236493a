"""Tests of the proxies: rank correlations by hand, on made-up LoRAs, and one run over portraits that were drawn."""

import json
import shutil

import numpy as np
import pytest

from benchmarks import preservation, proxies
from benchmarks.parts.drawing import Originals
from benchmarks.parts.tables import OVERALL
from benchmarks.proxies import (
    TRUTHS,
    Measured,
    correlate,
    correlate_all,
    means_of,
    rank_correlations,
    sfcm_region,
    sign_of,
    write_tables,
)
from toy_portraits.recipe import LORA


def test_rank_correlations_by_hand():
    first = np.array([[1.0, 1.0, 3.0], [2.0, 2.0, 3.0], [3.0, 2.0, 3.0], [4.0, 5.0, 3.0]])
    second = np.array([[1.0, 4.0, 1.0], [3.0, 3.0, 2.0], [2.0, 2.0, 3.0], [4.0, 1.0, 4.0]])
    rho, tau = rank_correlations(first, second)
    assert rho[0] == pytest.approx(1 - 6 * 2 / (4 * 15)) and tau[0] == pytest.approx((5 - 1) / 6)
    # of a tie both get the mean rank
    assert rho[1] == pytest.approx(np.corrcoef([1, 2.5, 2.5, 4], [4, 3, 2, 1])[0, 1])
    assert tau[1] == pytest.approx(-5 / np.sqrt(5 * 6))
    assert np.isnan(rho[2]) and np.isnan(tau[2])


def test_a_proxy_counts_only_the_loras_that_have_it():
    proxy, truth = np.array([[1.0, 1.0], [2.0, 2.0], [np.nan, np.nan], [3.0, 3.0]]), np.array([[3.0], [2], [9], [1]])
    both = [np.repeat(values[:, :1], 3, axis=1) for values in (proxy, truth)]
    found = correlate(*both, -1)
    assert found.loras == 3 and found.values.tolist() == [[1.0] * 3] * 2


def test_the_sign_says_whether_better_is_better():
    assert sign_of("ssim", "kept") == sign_of("change", "head_shift") == 1
    assert sign_of("ssim", "change_outside") == sign_of("pollution", "kept") == -1


def made_up(seed: int, offset: float) -> Measured:
    """SSIM orders the LoRAs as the truth does, pixel change with much noise."""
    rng = np.random.default_rng(seed)
    goodness = np.linspace(0, 1, 8)[:, None] + rng.normal(0, 0.02, (8, 30))
    truths = {name: goodness if direction == "higher" else -goodness for name, (_, direction) in TRUTHS.items()}
    return Measured({"ssim": goodness + offset, "change": -goodness + rng.normal(0, 20, (8, 30))}, truths)


def test_the_mean_over_targets_comes_first():
    found = correlate_all({"red_hat": made_up(0, 0.0), "blonde_hair": made_up(1, 5.0)})
    assert list(found) == [OVERALL, "red_hat", "blonde_hair"]
    sure = found[OVERALL]["ssim", "kept"]
    assert [own.value for own in sure.estimates()] == [1, 1] and sure.estimates()[0].low > 0.9 and sure.loras == 16
    each = [found[name]["change", "kept"].values for name in ("red_hat", "blonde_hair")]
    assert found[OVERALL]["change", "kept"].values == pytest.approx(sum(each) / 2)
    unsure = found["red_hat"]["change", "kept"].estimates()[0]
    assert unsure.high - unsure.low > 0.5


def test_a_mean_leaves_out_prompts_without_the_measure():
    found = means_of(np.array([[1.0, np.nan, 3.0]]), np.array([[0, 0, 1], [1, 1, 1]]))
    assert found[0, :2].tolist() == [2.0, 1.0] and np.isnan(found[0, 2])


def test_the_region_is_the_mean_map_at_the_portraits_size():
    region = sfcm_region([np.zeros((2, 4, 4)), np.ones((2, 4, 4))], 16)
    assert region.shape == (2, 16, 16) and np.allclose(region, 0.5)


def test_tables_are_written_with_what_could_not_be_computed(tmp_path):
    args = preservation.parse_args(["--output_dir", str(tmp_path), "--targets", "red_hat"])
    write_tables(args, correlate_all({"red_hat": made_up(0, 0.0)}), {"lpips": "no weights.", "leak": "x"})
    text = (tmp_path / "proxies" / "table.md").read_text(encoding="utf-8")
    assert "- LPIPS: no weights.\n" in text and "leak" not in text and text.count("| SSIM | 8 | +1.00 [") == 2
    lines = json.loads((tmp_path / "proxies" / "results.json").read_text(encoding="utf-8"))["correlations"]
    assert len(lines) == 2 * len(TRUTHS) and lines[0]["spearman"]["value"] == 1


def test_without_guided_rows_there_is_no_region(tmp_path):
    args = preservation.parse_args(["--output_dir", str(tmp_path), "--runs", "no_text"])
    with pytest.raises(ValueError, match="--runs no_text: no way to train for red_hat"):
        proxies.measure_target(args, Originals("red_hat", [], None, None), {})


@pytest.mark.slow
def test_a_short_run_measures_what_was_drawn(tmp_path):
    shutil.copytree(LORA, tmp_path / "runs" / "blonde_hair" / "plain-seed5")
    flags = ["--output_dir", str(tmp_path), "--targets", "blonde_hair", "--runs", "plain", "--seeds", "5"]
    flags += ["--num_prompts", "8", "--num_inference_steps", "2", "--workers", "1"]
    proxies.main(flags)
    found = json.loads((tmp_path / "proxies" / "results.json").read_text(encoding="utf-8"))["correlations"]
    lines = {(line["proxy"], line["truth"]): line for line in found}
    assert lines["change_outside", "change_outside"]["loras"] == 6  # four strengths, guidance, and late
    assert lines["pollution", "change_outside"]["loras"] == 4
    assert lines["change_outside", "change_outside"]["spearman"]["value"] > 0.8
