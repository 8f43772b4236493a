"""What tests of several benchmarks share."""

from pathlib import Path

import pytest
from toy_bases import write_random_lora

from benchmarks import sfcm_modes
from benchmarks.parts import runs
from loras import LORA_WEIGHTS
from sfcm import SFCM_MODES
from toy_portraits.judge import PortraitJudge
from toy_portraits.recipe import BASES
from training import flag_rules


@pytest.fixture(scope="session")
def judge():
    return PortraitJudge.from_pretrained()


@pytest.fixture
def started(monkeypatch):
    """The command lines of trainings, by target and run; nothing is trained but each leaves weights of its own."""
    return _replace_training(monkeypatch, lambda folder, *_: (folder / LORA_WEIGHTS).write_bytes(str(folder).encode()))


@pytest.fixture
def trained(monkeypatch):
    """As `started`, with random LoRAs on the base that the command names."""
    return _replace_training(monkeypatch, write_random_lora)


def _replace_training(monkeypatch, write):
    commands = {}

    def train(command, **options):
        folder = Path(command[command.index("--output_dir") + 1])
        commands[f"{folder.parent.name}/{folder.name}"] = command
        base = next(name for name, own in BASES.items() if str(own.folder) in command)
        write(folder, len(commands), base)
        return type("Done", (), {"returncode": 0})()

    monkeypatch.setattr(runs.subprocess, "run", train)
    return commands


@pytest.fixture
def registered():
    """The trainer knows the SFCMs that lost, in this test alone."""
    before = list(flag_rules.SFCM_MODES)
    sfcm_modes.register()
    yield
    flag_rules.SFCM_MODES[:] = before
    for name in sfcm_modes.LOST:
        del SFCM_MODES[name]
