"""Tests of the engine: schedules, optimizers, seeds, accumulation, and losses that explode."""

from contextlib import contextmanager
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from safetensors.torch import load_file, save_file
from test_train import (
    DUAL_PATHS,
    LOSSES,
    RUN_FILE,
    SMOOTH,
    WEIGHTS,
    difference,
    files,
    make_flags,
    train,
    watch,
    watch_runs,
)

import train_spf_portrait_lora as script
from training.arguments import parse_args
from training.batches import BatchDrawer
from training.engine import Engine
from training.flags import SCHEDULERS
from training.objectives import diffusion


@pytest.fixture
def make_engine(world, tmp_path):
    """An engine of one weight, as flags ask for it."""

    def make(**changes) -> Engine:
        flags = parse_args(make_flags(world, tmp_path / "output", **changes))
        weight = torch.nn.Parameter(torch.ones(3))
        return Engine(Accelerator(), [weight], flags.optimizer, flags.loop, None)

    return make


def step(engine: Engine) -> float:
    """An update; returns the learning rate it was made with."""
    rate = engine.optimizer.param_groups[0]["lr"]
    loss = engine.parameters[0].square().sum()
    engine.backward(loss)
    assert engine.update({"loss": loss.detach()}) == {"loss": pytest.approx(loss.item())}
    return rate


# ------------------------------------------------------------------------------------------ schedules and optimizers


@pytest.mark.parametrize(
    "flags, rates",
    [
        ({"lr_scheduler": "cosine_with_restarts", "lr_num_cycles": 2}, [0.01, 0.005, 0.01, 0.005]),
        ({"lr_scheduler": "polynomial", "lr_power": 2.0}, [0.01, 0.01 * 0.75**2, 0.01 * 0.5**2, 0.01 * 0.25**2]),
        ({"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 2}, [0, 0.005, 0.01, 0.01]),
    ],
    ids=["cycles", "power", "warm-up"],
)
def test_schedules(make_engine, flags, rates):
    engine = make_engine(**flags)
    engine.start_stage(1, 4)
    assert [step(engine) for _ in range(4)] == pytest.approx(rates, rel=1e-3, abs=1e-6)


def test_the_second_stage_has_a_schedule_and_an_optimizer_state_of_its_own(make_engine):
    engine, rates = make_engine(lr_scheduler="linear", stage2_lr_scheduler="cosine"), []
    for stage in (1, 2):
        engine.start_stage(stage, 2)
        assert engine.stage == stage and not engine.optimizer.state_dict()["state"]
        rates += [step(engine) for _ in range(2)]
    assert rates == pytest.approx([0.01, 0.005, 0.01, 0.005])
    assert engine.global_step == 4


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_schedule_works_without_a_stage_1(make_engine, scheduler):
    engine = make_engine(lr_scheduler=scheduler, stage2_lr_scheduler=scheduler)
    engine.start_stage(2, 1)
    assert step(engine) == pytest.approx(0.01)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_learning_rate_is_scaled(make_engine, accumulation):
    engine = make_engine(scale_lr=True, gradient_accumulation_steps=accumulation)
    engine.start_stage(1, 1)
    assert engine.optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * 2 * accumulation)


@pytest.mark.parametrize("flags", [{"optimizer": "prodigy", "learning_rate": 1.0}, {"use_8bit_adam": True}], ids=str)
def test_other_optimizers(make_engine, flags):
    pytest.importorskip("bitsandbytes" if "use_8bit_adam" in flags else "prodigyopt")
    engine = make_engine(**flags)
    for stage in (1, 2):
        engine.start_stage(stage, 1)
        before = engine.parameters[0].detach().clone()
        step(engine)
        assert (engine.parameters[0] - before).abs().max() > 1e-7
    assert type(engine.optimizer.optimizer).__name__ == ("AdamW8bit" if "use_8bit_adam" in flags else "Prodigy")


@pytest.mark.parametrize(("rate", "warned"), [(1e-4, True), (1.0, False)])
def test_prodigy_with_a_rate_for_adam_is_warned_about(make_engine, caplog, rate, warned):
    pytest.importorskip("prodigyopt")
    with caplog.at_level("WARNING"):
        make_engine(optimizer="prodigy", learning_rate=rate)
    assert ("--learning_rate" in caplog.text) == warned


# ------------------------------------------------------------------------------------------ what weights depend on


def test_equal_seeds_give_equal_weights(world, trained, tmp_path):
    again = train(world, tmp_path / "again", stage2_objective="both")
    assert difference(again, trained(stage2_objective="both")) == 0


def test_another_seed_gives_other_weights(trained):
    assert difference(trained(seed=1), trained()) > 0.005


def test_one_pass_and_two_give_the_same_weights(trained):
    flags = {"stage2_objective": "both", "sfcm_mode": "paper", **SMOOTH}
    runs = [trained(dual_path=mode, **flags) for mode in DUAL_PATHS]
    assert difference(*runs) < 1e-4 < difference(runs[0], runs[0] / "stage1") / 10


@pytest.mark.parametrize("dual_path", ["two_pass", pytest.param("single_pass", marks=pytest.mark.slow)])
def test_gradient_checkpointing_gives_the_same_weights(world, trained, tmp_path, dual_path):
    flags = {"stage2_objective": "both", "dual_path": dual_path, "sfcm_mode": "paper", **SMOOTH}
    output = train(world, tmp_path / "output", gradient_checkpointing=True, **flags)
    assert difference(output, trained(**flags)) < 1e-4


def test_accumulation_draws_anew_reduces_once_and_logs_the_mean(world, tmp_path, monkeypatch):
    events, micro_steps, losses = [], [], []
    no_sync, backward = Accelerator.no_sync, Accelerator.backward
    generator, make = BatchDrawer.generator, script.make_objectives

    @contextmanager
    def watched(micro_step, forward):
        with forward(micro_step) as parts:
            losses.append({name: value.item() for name, value in parts.items()})
            yield parts

    def make_watched(*args):
        objectives = make(*args)
        for objective in objectives:
            objective.losses = partial(watched, forward=objective.losses)
        return objectives

    monkeypatch.setattr(Accelerator, "no_sync", lambda self, model: events.append("no_sync") or no_sync(self, model))
    monkeypatch.setattr(Accelerator, "backward", lambda self, loss: events.append("backward") or backward(self, loss))
    monkeypatch.setattr(
        BatchDrawer,
        "generator",
        lambda self, micro_step, stream: micro_steps.append(micro_step) or generator(self, micro_step, stream),
    )
    monkeypatch.setattr(script, "make_objectives", make_watched)
    means = watch(monkeypatch, script, "train_step")
    flags = {"stage1_steps": 1, "stage2_steps": 1, "stage2_objective": "both", "gradient_accumulation_steps": 2}
    train(world, tmp_path / "output", **flags)
    assert micro_steps == [0, 1] + [2] * 3 + [3] * 3
    assert events == ["no_sync", "backward", "backward"] + ["no_sync", "backward"] * 5 + ["backward"]
    assert means[0] == {"diffusion": pytest.approx((losses[0]["diffusion"] + losses[1]["diffusion"]) / 2)}
    assert means[1].keys() == LOSSES["both"]
    for name in LOSSES["both"]:
        values = [parts[name] for parts in losses[2:] if name in parts]
        assert len(values) == 2 and means[1][name] == pytest.approx(sum(values) / 2, rel=1e-5, abs=1e-9)


# ---------------------------------------------------------------------------------------------- losses that explode


def test_a_loss_that_explodes_stops_the_training(world, tmp_path):
    with pytest.raises(SystemExit, match="'diffusion' is .* at step [1-4].*there is no earlier checkpoint"):
        train(world, tmp_path / "output", learning_rate=1e20, stage1_steps=5)
    assert not (tmp_path / "output" / WEIGHTS).exists()


def test_a_gradient_that_explodes_is_not_taken(world, tmp_path, monkeypatch):
    """Also in the last step, whose loss was still finite."""
    loss, runs = diffusion.diffusion_loss, watch_runs(monkeypatch)

    def explode(model_pred, target):
        model_pred.register_hook(lambda gradient: gradient * float("inf"))
        return loss(model_pred, target)

    monkeypatch.setattr(diffusion, "diffusion_loss", explode)
    with pytest.raises(SystemExit, match="'gradient' is (nan|inf) at step 0"):
        train(world, tmp_path / "output", stage1_steps=1, stage2_steps=0)
    assert files(tmp_path / "output") == {RUN_FILE}
    assert all(torch.isfinite(parameter).all() for parameter in runs[0].models.denoiser.parameters())


@pytest.mark.parametrize("objective, name", [("composed", "composed"), ("paper", "text_consistent")])
def test_what_stage_1_saved_is_whole_when_stage_2_explodes(world, trained, tmp_path, monkeypatch, objective, name):
    whole, step = trained() / "stage1", script.train_step

    def train_step(engine, models, objectives):
        if engine.global_step == 3:
            with torch.no_grad():
                for parameter in engine.parameters:
                    parameter.fill_(float("nan"))
        return step(engine, models, objectives)

    monkeypatch.setattr(script, "train_step", train_step)
    with pytest.raises(SystemExit, match=f"'{name}' is nan at step 3"):
        train(world, tmp_path / "output", stage2_objective=objective)
    assert files(tmp_path / "output") == {RUN_FILE, f"stage1/{WEIGHTS}"}
    assert difference(tmp_path / "output" / "stage1", whole) == 0


def test_an_earlier_lora_of_nan_is_refused(world, trained, tmp_path):
    state = {name: torch.full_like(value, float("nan")) for name, value in load_file(trained() / WEIGHTS).items()}
    save_file(state, tmp_path / WEIGHTS)
    with pytest.raises(SystemExit, match=rf"{WEIGHTS}: its weights are not numbers \(NaN\) in layer unet\."):
        train(world, tmp_path / "output", stage1_steps=0, stage1_lora_path=tmp_path / WEIGHTS)
    assert not (tmp_path / "output").exists()


# -------------------------------------------------------------------------------------------- what it does not run on


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_engines_that_shard_are_refused(world, tmp_path, monkeypatch, engine):
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(SystemExit, match=f"error: accelerate is set to {engine}"):
        train(world, tmp_path / "output")
    assert not (tmp_path / "output").exists()


def test_fp16_needs_a_gpu(world, tmp_path):
    with pytest.raises(SystemExit, match="error: --mixed_precision fp16 needs a GPU"):
        train(world, tmp_path / "output", mixed_precision="fp16")
    assert not (tmp_path / "output").exists()


def test_a_tracker_without_its_package(world, tmp_path, capsys):
    if "wandb" in {tracker.value for tracker in get_available_trackers()}:
        pytest.skip("wandb is installed")
    with pytest.raises(SystemExit):
        train(world, tmp_path / "output", report_to="wandb")
    assert "--report_to wandb" in capsys.readouterr().err and not (tmp_path / "output").exists()
