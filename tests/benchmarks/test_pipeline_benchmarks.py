"""Tests of the benchmark of guidance with the map."""

import json

import numpy as np
import pytest

from benchmarks import sfcm_guidance
from benchmarks.parts.tables import ORIGINAL, Row
from benchmarks.sfcm_guidance import SWEEPS, plot_of


def made_up_rows():
    rows = [Row(ORIGINAL, "original", 0.0, {name: np.full((1, 4), 0.1) for name in sfcm_guidance.MEASURES})]
    for sweep in ("plain", "composed"):
        for strength in (0.0, 1.0):
            measures = {name: np.full((2, 4), 0.5 - strength / 4) for name in sfcm_guidance.MEASURES}
            rows.append(Row(f"{SWEEPS[sweep].label}, s = {strength:g}", sweep, strength, measures))
    return rows


def test_the_plot_has_a_point_for_each_strength():
    series = plot_of(made_up_rows())
    assert [len(line.points) for line in series] == [1, 2, 2]
    assert [point.place for point in series[1].points] == [(0.5, 0.5), (0.25, 0.25)]
    assert series[1].curve and not series[0].curve and series[0].points[0].response.low is not None


@pytest.mark.slow
def test_a_short_run_draws_judges_and_is_not_drawn_again(tmp_path, trained):
    flags = ["--output_dir", str(tmp_path), "--targets", "blonde_hair", "--workers", "1"]
    flags += ["--seeds", "5", "--num_prompts", "3", "--num_inference_steps", "2", "--sweeps", "plain", "plain_quiet"]
    sfcm_guidance.main(flags)
    folder = tmp_path / "sfcm_guidance"
    document = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    rows = {label: row["change_outside"]["mean"] for label, row in document["targets"]["blonde_hair"].items()}
    assert len(rows) == 1 + 2 * 5 and len(set(rows.values())) == 11 and list(trained) == ["blonde_hair/plain-seed5"]
    assert rows["plain LoRA, s = 1"] < rows["plain LoRA, s = 0"]
    table = (folder / "table.md").read_text(encoding="utf-8")
    assert '"blonde hair"' in table and "| plain LoRA, s = 1 |" in table
    assert (folder / "sfcm_guidance.png").is_file()
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    sfcm_guidance.main(flags)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()} == times
