"""Tests of the first seconds: flags are read before any library is imported, and help shows the defaults."""

import subprocess
import sys

import pytest
from accelerate.utils import LoggerType
from diffusers.optimization import SchedulerType
from test_house import ROOT

import sfcm
from training import flag_rules, flags, losses


PROGRAMS = ("train_spf_portrait_lora.py", "evaluate_spf_portrait.py", "export_spf_portrait_lora.py", "app.py")
# What no program imports to read its flags; transformers alone, whose parser makes flags of dataclasses, is light.
HEAVY = ("torch", "diffusers", "accelerate", "peft", "datasets", "gradio")
# Runs a program as Python would, and says which libraries it had imported when it ended.
WATCHED = """
import runpy, sys
script, sys.argv = sys.argv[1], sys.argv[1:]
sys.path.insert(0, script.rpartition("/")[0])
try:
    runpy.run_path(script, run_name="__main__")
finally:
    print("imported:", *(name for name in {heavy} if name in sys.modules))
"""


def run(program: str, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", WATCHED.format(heavy=HEAVY), str(ROOT / program), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_and_a_wrong_flag_import_nothing(program):
    shown, refused = run(program, "--help"), run(program, "--no_such_flag")
    assert shown.returncode == 0 and refused.returncode == 2
    assert shown.stdout.splitlines()[-1] == refused.stdout.splitlines()[-1] == "imported:"
    assert "usage: " in shown.stdout and "error: " in refused.stderr


def test_help_shows_defaults_and_none_where_there_is_none():
    words = " ".join(run(PROGRAMS[0], "--help").stdout.split())
    assert "Rank of the LoRA. (default: 16)" in words and "is averaged over. (default: 4)" in words
    assert "anew every so many steps of stage 2; 0 is never. (default: 0)" in words
    assert "the rank if not given. --lora_target" in words and "Less memory, more time. --allow_tf32" in words


def test_the_flags_name_what_modules_and_libraries_have():
    assert flags.ENHANCEMENT_LOSSES == tuple(losses.ENHANCEMENT_LOSSES)
    assert flag_rules.SFCM_MODES == list(sfcm.SFCM_MODES)
    assert set(flags.TRACKERS) == {tracker.value for tracker in LoggerType}
    assert {*flags.SCHEDULERS, "piecewise_constant"} == {kind.value for kind in SchedulerType}
