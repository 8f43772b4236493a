"""What tests of several benchmarks share."""

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from benchmarks import sfcm_modes
from benchmarks.parts import runs
from loras import LORA_WEIGHTS
from pipeline_spf_portrait import SPFPortraitPipeline
from sfcm import SFCM_MODES
from toy_portraits.judge import PortraitJudge
from toy_portraits.recipe import BASE_MODEL
from training import flag_rules


@pytest.fixture(scope="session")
def judge():
    return PortraitJudge.from_pretrained()


@pytest.fixture(scope="session")
def write_lora():
    """A function that writes a random LoRA on the embedded model, strong enough to be seen."""
    unet = UNet2DConditionModel.from_pretrained(BASE_MODEL / "unet")

    def write(folder: Path, seed: int = 0) -> Path:
        torch.manual_seed(seed)
        modules = ["attn2.to_v", "attn2.to_out.0"]
        unet.add_adapter(LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=modules))
        SPFPortraitPipeline.save_lora_weights(
            folder,
            unet_lora_layers=get_peft_model_state_dict(unet),
            unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
        )
        unet.unload_lora()
        return folder

    return write


@pytest.fixture
def started(monkeypatch):
    """The command lines of trainings, by target and run; nothing is trained but each leaves weights of its own."""
    return _replace_training(monkeypatch, lambda folder, _: (folder / LORA_WEIGHTS).write_bytes(str(folder).encode()))


@pytest.fixture
def trained(monkeypatch, write_lora):
    """As `started`, with random LoRAs."""
    return _replace_training(monkeypatch, write_lora)


def _replace_training(monkeypatch, write):
    commands = {}

    def train(command, **options):
        folder = Path(command[command.index("--output_dir") + 1])
        commands[f"{folder.parent.name}/{folder.name}"] = command
        write(folder, len(commands))
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
