"""The benchmark of a step: its tables, a short run of every row, and the counted memory."""

import pytest

from benchmarks import cache_cost, step_cost


def test_the_benchmark_prints_what_it_measured(monkeypatch, capsys):
    """Times that are given, so that every figure can be recomputed."""
    times = {
        step_cost.PLAIN: [0.1, 0.2, 0.3],
        step_cost.MADE: [0.5, 0.4, 0.3],
        step_cost.FOUND: [0.2, 0.2, 0.26],
    }
    step_cost.print_table(times, {step_cost.PLAIN: 100, step_cost.MADE: 104})
    step_cost.print_reuses(times)
    lines = capsys.readouterr().out.splitlines()
    assert "| plain LoRA | 200 | 150 to 250 | 1.00 | 1.00 |" in lines
    assert "| composed, targets made | 400 | 350 to 450 | 2.00 | 1.04 |" in lines
    assert "| composed, targets found | 200 | 200 to 230 | 1.00 | - |" in lines
    assert [line for line in lines if line.startswith("| 2 |")] == ["| 2 | 1.50 |"]


@pytest.mark.slow
def test_the_benchmark_runs_every_row(capsys):
    step_cost.main(["--steps", "1", "--share_steps", "1", "--no-counted"])
    printed = capsys.readouterr().out
    for name in step_cost.ROWS:
        assert f"| {name} | " in printed
    assert "nan" not in printed
    assert "composed, targets found: drawing the batch" in printed and "enhancement loss, forward" in printed


@pytest.mark.slow
def test_counted_memory_of_the_steps():
    kinds = (step_cost.PLAIN, step_cost.MADE, step_cost.FOUND)
    peaks = step_cost.count_stable_diffusion(4, kinds)
    for name in kinds[1:]:
        assert all(peak <= 1.1 * plain for peak, plain in zip(peaks[name], peaks[step_cost.PLAIN], strict=True))
    assert all(checkpointed < without for without, checkpointed in peaks.values())


@pytest.mark.slow
def test_caches_change_no_loss(capsys):
    cache_cost.main(["--steps", "1", "--stage2_objective", "composed"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:]
    assert [row[0].strip("| ") for row in rows] == list(cache_cost.CACHES)
    assert all(float(row[3].strip("| ")) < 1e-3 for row in rows)
