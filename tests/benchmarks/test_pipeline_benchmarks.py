"""Tests of the benchmark of guidance with the map."""

import json
import shutil

import numpy as np
import pytest

from benchmarks import sfcm_guidance
from benchmarks.parts.tables import ORIGINAL, Row
from benchmarks.sfcm_guidance import SWEEPS, parse_args, plot_of, table_of
from loras import LORA_WEIGHTS
from toy_portraits.recipe import LORA


def made_up_rows():
    rows = [Row(ORIGINAL, "original", 0.0, {name: np.full((1, 4), 0.1) for name in sfcm_guidance.MEASURES})]
    for sweep in ("plain", "composed"):
        for strength in (0.0, 1.0):
            measures = {name: np.full((2, 4), 0.5 - strength / 4) for name in sfcm_guidance.MEASURES}
            rows.append(Row(f"{SWEEPS[sweep].label}, s = {strength:g}", sweep, strength, measures))
    return rows


def test_table_and_plot_have_a_row_and_a_point_for_each_strength():
    table = table_of("red_hat", made_up_rows())
    assert '"a red hat"' in table and table.count("| plain LoRA, s = ") == table.count("| SPF-Portrait, s = ") == 2
    assert "| plain LoRA, s = 1 | 0.25 ± 0.00 |" in table
    series = plot_of(made_up_rows(), ["plain", "composed"])
    assert [len(line.points) for line in series] == [1, 2, 2]
    assert [(point.response, point.pollution) for point in series[1].points] == [(0.5, 0.5), (0.25, 0.25)]
    assert series[0].points[0].response_ends is not None and series[1].points[0].response_ends is None


def test_a_lora_that_is_missing_is_named_before_anything_is_drawn(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"blonde_hair/plain-seed9.* does not exist.*Train it.*--seeds 9"):
        sfcm_guidance.main(["--runs_dir", str(tmp_path), "--targets", "blonde_hair", "--seeds", "9"])


@pytest.mark.parametrize("flags", [["--sfcm_guidance", "1.5"], ["--num_prompts", "0"]])
def test_flags_that_cannot_be(flags, capsys):
    with pytest.raises(SystemExit):
        parse_args(flags)
    assert flags[0] in capsys.readouterr().err


@pytest.mark.slow
def test_a_short_run_draws_judges_and_is_not_drawn_again(tmp_path):
    for run in ("plain", "composed"):
        folder = tmp_path / "runs" / "blonde_hair" / f"{run}-seed5"
        folder.mkdir(parents=True)
        shutil.copy(LORA / LORA_WEIGHTS, folder)
    output_dir = tmp_path / "out"
    flags = ["--runs_dir", str(tmp_path / "runs"), "--output_dir", str(output_dir), "--targets", "blonde_hair"]
    flags += ["--seeds", "5", "--num_prompts", "3", "--num_inference_steps", "2", "--sfcm_guidance", "0", "1"]
    sfcm_guidance.main([*flags, "--workers", "1", "--sweeps", "plain", "plain_quiet"])
    document = json.loads((output_dir / "results.json").read_text(encoding="utf-8"))
    rows = {row["label"]: row["measures"]["change_outside"]["mean"] for row in document["targets"]["blonde_hair"]}
    assert len(rows) == 1 + 2 * 2 and len(set(rows.values())) == 5
    assert rows["plain LoRA, s = 1"] < rows["plain LoRA, s = 0"]
    assert "| plain LoRA, s = 1 |" in (output_dir / "table.md").read_text(encoding="utf-8")
    assert (output_dir / "sfcm_guidance.png").is_file()
    times = {path: path.stat().st_mtime_ns for path in (output_dir / "cache").iterdir()}
    sfcm_guidance.main([*flags, "--workers", "1", "--sweeps", "plain", "plain_quiet"])
    assert {path: path.stat().st_mtime_ns for path in (output_dir / "cache").iterdir()} == times
