"""What steps, calls and switches cost: the tables, and a short run of every row."""

import re

import pytest

from benchmarks import cost


def test_what_was_measured_is_printed(capsys):
    """Times that are given, so that every figure can be recomputed."""
    times = {cost.PLAIN: [0.1, 0.2, 0.3], cost.MADE: [0.5, 0.4, 0.3], cost.FOUND: [0.2, 0.1, 0.3]}
    cost.print_times(times, {cost.PLAIN: cost.PLAIN, cost.MADE: cost.PLAIN, cost.FOUND: cost.MADE})
    cost.print_averages(times, "`--composed_target_reuse`", cost.MADE, cost.FOUND)
    lines = capsys.readouterr().out.splitlines()
    assert "| plain LoRA | 200 | 150 to 250 | 1.00 |" in lines
    assert "| composed, targets made | 400 | 350 to 450 | 2.00 |" in lines
    assert "| composed, targets found | 200 | 150 to 250 | 0.50 |" in lines
    assert [line for line in lines if line.startswith("| 2 |")] == ["| 2 | 1.50 |"]


@pytest.mark.slow
def test_every_kind_of_step_is_timed(capsys):
    cost.main(["steps", "--rounds", "1"])
    printed = capsys.readouterr().out
    assert all(f"| {name} | " in printed for name in cost.STEPS) and "nan" not in printed


@pytest.mark.slow
def test_chosen_steps_are_timed_beside_what_they_are_compared_with(capsys):
    cost.main(["steps", "--rounds", "1", "--rows", "both, nothing", "--flags", "--resolution 32"])
    printed = capsys.readouterr().out
    assert re.findall(r"^\| ([a-z][^|]*) \|", printed, re.MULTILINE) == ["both", "both, nothing cached"]


@pytest.mark.slow
def test_a_call_is_timed_and_compare_equals_two_calls(capsys):
    cost.main(["calls", "--rounds", "1", "--num_images", "1", "--num_inference_steps", "2"])
    printed = capsys.readouterr().out
    largest, changed = map(float, re.search(r"at most (\S+) of.*portraits by (\S+)", printed).groups())
    assert largest < 1e-4 < 0.05 < changed
    assert len(re.findall(r"^\| .+? \| [\d.]+ \| [\d.]+ to [\d.]+ \| [\d.]+ \|$", printed, re.MULTILINE)) == 5


def test_switches_of_known_layers_are_cheaper(capsys):
    cost.main(["switches", "--rounds", "3"])
    rows = dict(re.findall(r"^\| (.+?) \| ([\d.e-]+) \|", capsys.readouterr().out, re.MULTILINE))
    assert len(rows) == 9 and float(rows["adapters off"]) < float(rows["found anew: adapters off"])


@pytest.mark.parametrize("flags", [["--rows", "compsed"], ["--rounds", "0"], ["--num_images", "0"]])
def test_flags_that_cannot_be(flags, capsys):
    with pytest.raises(SystemExit):
        cost.main(["steps", *flags])
    assert f"error: {flags[0]}" in capsys.readouterr().err
