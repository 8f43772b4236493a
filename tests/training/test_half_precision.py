"""Tests of half precision and gradient scaling: a GPU's arithmetic on the CPU, with a real GradScaler and in bf16."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from test_resume import BORDER, STEPS, assert_same_ending, copy_checkpoint, one_thread  # noqa: F401
from test_train import (  # noqa: F401  (fixtures)
    ROOT,
    SMOOTH,
    WEIGHTS,
    adapter_state,
    difference,
    fresh_accelerator,
    make_flags,
    train,
    world,
)

import train_spf_portrait_lora as script
from loras import KOHYA_WEIGHTS
from loras.writing import save_kohya_lora
from training import models
from training.objectives import diffusion
from training.objectives.composed import Composed


@pytest.fixture
def in_float32(monkeypatch):
    """The models of a run in float32 whatever its precision, so that the scaler is all that differs."""
    load = models.load_base_model

    def load_in_float32(inputs, flags, weight_dtype):
        return load(inputs, flags, torch.float32)

    def no_autocast(*_):
        return torch.autocast("cpu", enabled=False)

    monkeypatch.setattr(models, "load_base_model", load_in_float32)
    monkeypatch.setattr("accelerate.accelerator.get_mixed_precision_context_manager", no_autocast)


@pytest.fixture
def scaled(monkeypatch, in_float32):
    """A gradient scaler as accelerate has it with fp16 on a GPU, around float32 on the CPU; a list of those made.

    accelerate refuses fp16 on a CPU: what it would set for a GPU is set here.
    """
    make, scalers = script.make_accelerator, []

    def make_with_scaler(*args):
        accelerator = make(*args)
        accelerator.state._mixed_precision = "fp16"
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        scalers.append(accelerator.scaler)
        return accelerator

    monkeypatch.setattr(script, "make_accelerator", make_with_scaler)
    return scalers


def update_of_stage2(output) -> dict[str, torch.Tensor]:
    before, after = (load_file(folder / WEIGHTS) for folder in (output / "stage1", output))
    return {name: after[name] - before[name] for name in after}


def norm(state: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(value.square().sum().item() for value in state.values()))


@pytest.mark.parametrize("objective", ["composed", pytest.param("paper", marks=pytest.mark.slow)])
def test_stage_2_learns_as_much_under_a_gradient_scaler(world, tmp_path, scaled, monkeypatch, objective):  # noqa: F811
    flags = {"stage2_objective": objective, "composed_init": "stage1", "stage2_steps": 3, **SMOOTH}
    under_scaler = update_of_stage2(train(world, tmp_path / "scaled", **flags))
    monkeypatch.undo()
    AcceleratorState._reset_state(reset_partial_state=True)
    plain = update_of_stage2(train(world, tmp_path / "plain", **flags))
    error = norm({name: under_scaler[name] - plain[name] for name in plain})
    print(f"\n{objective}: update {norm(under_scaler):.3g} under the scaler, {norm(plain):.3g} without")
    assert error < 0.05 * norm(plain)


# -------------------------------------------------------------------------------------------------------------- bf16


RESUMED = {
    "composed": {},
    "both": {"stage2_objective": "both"},
    "DoRA": {"use_dora": True},
    "a convolution's DoRA": {"use_dora": True, "lora_layers": "attn2.to_k,resnets.0.conv1"},
}


@pytest.fixture(scope="module")
def whole_bf16_run(world, tmp_path_factory):  # noqa: F811
    """An undisturbed run in bf16 with a checkpoint after each step, once per set of flags."""
    folders = {}

    def run(name: str):
        if name not in folders:
            flags = {**STEPS, **RESUMED[name], "mixed_precision": "bf16"}
            folders[name] = train(world, tmp_path_factory.mktemp("whole") / "output", **flags)
            AcceleratorState._reset_state(reset_partial_state=True)
        return folders[name]

    return run


@pytest.mark.parametrize(
    "name, step",
    [
        pytest.param(name, step, marks=() if (name, step) == ("composed", BORDER + 1) else pytest.mark.slow)
        for name in RESUMED
        for step in (1, BORDER, BORDER + 1)
    ],
)
def test_a_bf16_run_goes_on_to_the_same_bits(world, whole_bf16_run, tmp_path, name, step):  # noqa: F811
    whole = whole_bf16_run(name)
    copy_checkpoint(whole, step, tmp_path / "output")
    flags = {**STEPS, **RESUMED[name], "mixed_precision": "bf16"}
    again = train(world, tmp_path / "output", **flags, resume_from_checkpoint="latest")
    print(f"\n{name}, step {step}: difference {difference(again, whole):.3g}")
    assert_same_ending(again, whole)


@pytest.mark.parametrize(
    "kohya",
    [pytest.param(False, id="diffusers' format"), pytest.param(True, id="kohya's format", marks=pytest.mark.slow)],
)
def test_an_earlier_lora_is_not_rounded(world, whole_bf16_run, tmp_path, monkeypatch, kohya):  # noqa: F811
    """Neither as the one in training nor as the teacher."""
    earlier, states, step = whole_bf16_run("composed") / WEIGHTS, [], script.train_step
    given = earlier
    if kohya:
        given = tmp_path / "kohya.safetensors"
        save_kohya_lora(earlier, given)

    def copy_and_step(engine, own, objectives):
        states.append({name: adapter_state(own.denoiser, name) for name in ("default", models.STAGE1_ADAPTER)})
        return step(engine, own, objectives)

    monkeypatch.setattr(script, "train_step", copy_and_step)
    flags = {"stage1_steps": 0, "stage2_steps": 1, "composed_init": "stage1", "mixed_precision": "bf16"}
    train(world, tmp_path / "output", stage1_lora_path=given, **flags)
    for state in states[0].values():
        assert {value.dtype for value in state.values()} == {torch.float32}
        assert difference(state, earlier) == 0


def test_a_convolutions_dora_starts_stage_2_as_the_original_model(world, tmp_path, monkeypatch):  # noqa: F811
    differences, prepare = [], Composed.prepare

    @torch.no_grad()
    def compare(self, state=None):
        prepare(self, state)
        unet, preds = self.models.denoiser, []
        latents, embeds = torch.randn(1, 4, 4, 4), torch.randn(1, 77, unet.config.cross_attention_dim)
        for name in ("default", None):
            with self.models.adapters.only(name):
                preds.append(unet(latents, torch.tensor([500]), embeds).sample)
        differences.append((preds[0] - preds[1]).abs().max().item())

    monkeypatch.setattr(Composed, "prepare", compare)
    train(world, tmp_path / "output", use_dora=True, lora_layers="attn2.to_k,resnets.0.conv1")
    assert len(differences) == 1 and differences[0] < 1e-5


def test_a_run_that_goes_on_holds_no_file_of_its_checkpoint(world, whole_bf16_run, tmp_path, monkeypatch):  # noqa: F811
    """Windows could not prune it; in float32 nothing is converted, and so nothing copied, by itself."""
    copy_checkpoint(whole_bf16_run("composed"), 1, tmp_path / "output")
    maps, step = [], script.train_step

    def watched(*args):
        maps.append(Path("/proc/self/maps").read_text())
        return step(*args)

    monkeypatch.setattr(script, "train_step", watched)
    flags = {**STEPS, "mixed_precision": "bf16", "resume_from_checkpoint": "latest"}
    train(world, tmp_path / "output", **flags)
    assert maps and not any("checkpoint-1" in text for text in maps)


# --------------------------------------------------------------------------------------------- losses under a scaler


def test_a_scaler_leaves_out_what_is_not_finite_and_goes_on(world, tmp_path, scaled, monkeypatch):  # noqa: F811
    loss, step, schedules, engines = diffusion.diffusion_loss, script.train_step, [], []

    def explode_once(model_pred, target):
        factor = math.inf if len(schedules) == 1 else 1.0
        return loss(model_pred, target) * factor

    def watched(engine, own, objectives):
        engines.append(engine)
        schedules.append(engine.lr_scheduler.last_epoch)
        before = adapter_state(own.denoiser, "default")
        losses = step(engine, own, objectives)
        moved = difference(adapter_state(own.denoiser, "default"), before) > 0
        assert moved == math.isfinite(losses["diffusion"])
        return losses

    monkeypatch.setattr(diffusion, "diffusion_loss", explode_once)
    monkeypatch.setattr(script, "train_step", watched)
    train(world, tmp_path / "output", stage1_steps=3, stage2_steps=0)
    assert schedules == [0, 0, 1], "a step that was left out moved the learning rate on"
    assert (engines[0].skipped_updates, engines[0]._skipped_in_a_row) == (1, 0)
    assert scaled[0].get_scale() == 2.0**15


@pytest.mark.parametrize("steps", [(BORDER,), pytest.param((1, BORDER + 1), marks=pytest.mark.slow)], ids=str)
def test_the_scaler_goes_on_as_it_was(world, tmp_path, scaled, monkeypatch, steps):  # noqa: F811
    """Also from the end of stage 1, whose checkpoint is of another stage than the next step."""
    loss, calls = diffusion.diffusion_loss, []

    def explode_at_first(model_pred, target):
        calls.append(1)
        return loss(model_pred, target) * (math.inf if len(calls) == 1 else 1.0)

    monkeypatch.setattr(diffusion, "diffusion_loss", explode_at_first)
    whole = train(world, tmp_path / "whole", **STEPS)
    for step in steps:
        AcceleratorState._reset_state(reset_partial_state=True)
        again = tmp_path / f"{step}"
        copy_checkpoint(whole, step, again)
        train(world, again, **STEPS, resume_from_checkpoint="latest")
        assert_same_ending(again, whole)
    assert [scaler.get_scale() for scaler in scaled] == [2.0**15] * (1 + len(steps))


def test_a_scaler_that_skips_for_ever_is_an_error(world, tmp_path, scaled, monkeypatch):  # noqa: F811
    loss = diffusion.diffusion_loss
    monkeypatch.setattr(diffusion, "diffusion_loss", lambda pred, target: loss(pred, target) * math.nan)
    with pytest.raises(SystemExit, match="not finite in 16 steps in a row, up to step 15.*diffusion nan"):
        train(world, tmp_path / "output", stage1_steps=20, stage2_steps=0)
    assert not (tmp_path / "output" / WEIGHTS).exists()


def test_a_loss_that_the_gradient_does_not_show_is_an_error_under_a_scaler(world, tmp_path, scaled, monkeypatch):  # noqa: F811
    loss = diffusion.diffusion_loss
    monkeypatch.setattr(diffusion, "diffusion_loss", lambda pred, target: loss(pred, target) + math.nan)
    with pytest.raises(SystemExit, match="'diffusion' is nan at step 0"):
        train(world, tmp_path / "output")


# ------------------------------------------------------------------------------------------------------- equal files


@pytest.mark.slow
def test_equal_runs_write_equal_files_in_different_processes(world, tmp_path):  # noqa: F811
    files = []
    for seed in ("1", "2"):  # of the hashes of texts, which decide the order of a set
        output = tmp_path / seed
        flags = make_flags(world, output, stage1_steps=1, stage2_steps=1, output_kohya_format=True)
        environment = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
        script_path = ROOT / "train_spf_portrait_lora.py"
        subprocess.run([sys.executable, script_path, *flags], check=True, env=environment)
        files.append({path.name: path.read_bytes() for path in output.rglob("*.safetensors")})
    assert set(files[0]) == {WEIGHTS, KOHYA_WEIGHTS}
    assert files[0] == files[1]
