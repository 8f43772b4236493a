"""Composed targets that several steps learn from, and what a step asks of its models."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from test_resume import WEIGHTS, copy_checkpoint, one_thread  # noqa: F401  (fixture)
from test_train import difference, train, watch

import train_spf_portrait_lora as script
from training.objectives import composed
from training.objectives.composed import Composed
from training.training_set import revisited_batch


KEPT = 2
REUSED = {"composed_target_reuse": 2, "stage2_steps": 6}


@pytest.fixture
def two_kept(monkeypatch):
    """Cycles of two batches, so that a few steps are more than one."""
    monkeypatch.setattr(composed, "KEPT_TARGETS", KEPT)


def watch_numbers(monkeypatch) -> list[int]:
    """The batches of composed alignment, by number."""
    return watch(monkeypatch, Composed, "number_of")


# ------------------------------------------------------------------------------------------------------ the order


@pytest.mark.parametrize(("kept", "visits"), [(1, 1), (4, 1), (1, 3), (4, 3), (16, 2)])
def test_each_batch_of_a_cycle_comes_equally_often(kept, visits):
    for cycle in range(3):
        steps = range(cycle * kept * visits, (cycle + 1) * kept * visits)
        batches = [revisited_batch(step, kept, visits, 0) for step in steps]
        members = list(range(cycle * kept, (cycle + 1) * kept))
        assert batches[:kept] == members
        for visit in range(visits):
            assert sorted(batches[visit * kept : (visit + 1) * kept]) == members


def test_with_one_visit_batches_are_steps():
    assert [revisited_batch(step, 4, 1, 0) for step in range(50)] == list(range(50))


def test_later_visits_are_shuffled_by_seed_cycle_and_visit():
    def order(start, seed=0):
        return [revisited_batch(start + i, 16, 3, seed) % 16 for i in range(16)]

    orders = [order(16), order(32), order(48 + 16), order(16, seed=1)]
    assert all(orders.count(own) == 1 and own != sorted(own) for own in orders)
    assert order(16) == orders[0]


# ------------------------------------------------------------------------------------------------------ the targets


@pytest.mark.parametrize(
    "flags",
    [
        {},
        pytest.param({"dual_path": "single_pass", "lora_dropout": 0.3}, marks=pytest.mark.slow),
        pytest.param({"sfcm_mode": "paper", "stage2_objective": "both"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_kept_targets_are_those_that_would_be_made_anew(world, tmp_path, monkeypatch, two_kept, flags):
    """And they are made once a batch."""
    numbers, made = watch_numbers(monkeypatch), watch(monkeypatch, Composed, "predictions")
    kept = train(world, tmp_path / "kept", **REUSED, **flags)
    assert len(numbers) == 6 and len(made) == 4
    assert [number - 2 for number in numbers[:2] + numbers[4:]] == [0, 1, 2, 3]
    assert sorted(numbers[2:4]) == numbers[:2]
    target, made_before = Composed.target, len(made)

    def forgetful(self, *args):
        self.maps_changed()
        return target(self, *args)

    monkeypatch.setattr(Composed, "target", forgetful)
    anew = train(world, tmp_path / "anew", **REUSED, **flags)
    assert len(made) - made_before == 6
    assert difference(kept, anew) == 0
    assert difference(kept, kept / "stage1") > 1e-3


def test_one_visit_is_the_training_without_reuse(world, tmp_path, monkeypatch, two_kept):
    numbers, objectives = watch_numbers(monkeypatch), watch(monkeypatch, script, "make_objectives")
    train(world, tmp_path / "output", composed_target_reuse=1, stage2_steps=3)
    assert numbers == [2, 3, 4] and objectives[-1][0]._targets == {}


def test_no_more_targets_are_kept_than_a_cycle_has(world, tmp_path, monkeypatch, two_kept):
    """Those of the cycle that is over are let go, also where it had been entered in its middle."""
    counts, last, step = [], [], script.train_step

    def train_step(engine, models, objectives):
        losses = step(engine, models, objectives)
        last.append(objectives[0])
        counts.append(sorted(getattr(objectives[0], "_targets", {})))
        return losses

    monkeypatch.setattr(script, "train_step", train_step)
    train(world, tmp_path / "output", composed_target_reuse=2, stage2_steps=5)
    cycles = [[], [], [2], [2, 3], [2, 3], [2, 3], [4]]
    assert counts == cycles
    own = last[-1]
    latents = own.alignment.latents[0].shape
    assert {(tuple(t.shape), t.dtype) for t in own._targets.values()} == {((2, *latents), torch.float32)}


def test_accumulated_batches_are_revisited_too(world, tmp_path, monkeypatch, two_kept):
    numbers, made = watch_numbers(monkeypatch), watch(monkeypatch, Composed, "predictions")
    train(world, tmp_path / "output", composed_target_reuse=2, stage2_steps=2, gradient_accumulation_steps=2)
    assert numbers[:2] == [4, 5] == sorted(numbers[2:]) and len(made) == 2


def test_new_maps_make_new_targets(world, tmp_path, monkeypatch, two_kept):
    """After the second step the maps are others, and so are the targets of the same two batches."""
    numbers, targets = watch_numbers(monkeypatch), watch(monkeypatch, Composed, "target")
    # Both batches of the cycle ask for the target in every row, and the LoRA has moved by then.
    flags = {"composed_target_reuse": 2, "stage2_steps": 4, "base_prompt_share": 0, "learning_rate": 0.1}
    train(world, tmp_path / "output", sfcm_refresh_steps=2, **flags)
    assert sorted(numbers[2:]) == numbers[:2]
    for number, target in zip(numbers[2:], targets[2:], strict=True):
        assert not torch.equal(target, targets[numbers.index(number)])


@pytest.mark.slow
@pytest.mark.parametrize("flags", [{}, {"sfcm_refresh_steps": 3}], ids=str)
def test_a_resumed_run_makes_the_targets_that_it_needs(world, tmp_path, two_kept, flags):
    """From the middle of each visit, and with maps made anew in a cycle, to the same bits."""
    flags = {**REUSED, "checkpointing_steps": 1, **flags}
    whole = train(world, tmp_path / "whole", **flags)
    for step in range(3, 8):
        resumed(world, whole, step, tmp_path / f"again{step}", **flags)


def test_a_run_resumed_in_a_second_visit_ends_the_same(world, tmp_path, two_kept):
    """It makes the target of its first step again, which the whole run had kept."""
    flags = {"composed_target_reuse": 2, "stage2_steps": 4, "checkpointing_steps": 5}
    resumed(world, train(world, tmp_path / "whole", **flags), 5, tmp_path / "again", **flags)


def resumed(world, whole, step, output_dir, **flags):
    AcceleratorState._reset_state(reset_partial_state=True)
    copy_checkpoint(whole, step, output_dir)
    again = train(world, output_dir, **flags, resume_from_checkpoint="latest")
    assert (again / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()


def test_another_reuse_is_another_run(world, tmp_path, two_kept):
    flags = {"composed_target_reuse": 2, "stage1_steps": 1, "stage2_steps": 1, "checkpointing_steps": 2}
    output = train(world, tmp_path / "output", **flags)
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(SystemExit, match="composed_target_reuse"):
        train(world, output, **{**flags, "composed_target_reuse": 3, "resume_from_checkpoint": "latest"})


# --------------------------------------------------------------------------------------------------------- the step


@pytest.mark.parametrize("objective", ["composed", "both"])
def test_losses_and_norm_are_read_once_a_step(world, tmp_path, monkeypatch, objective):
    """A GPU is waited for whenever Python asks for a number; what lies on the CPU anyway does not count."""
    step, readings = script.train_step, []
    reads = {name: getattr(torch.Tensor, name) for name in ("item", "tolist", "__bool__", "__float__", "__int__")}

    def train_step(engine, *args):
        global_step, optimizer = engine.global_step, engine.optimizer
        with pytest.MonkeyPatch.context() as patch:
            # The optimizer asks its own counters, which lie on the CPU.
            idle = SimpleNamespace(step=lambda: None, zero_grad=optimizer.zero_grad, step_was_skipped=False)
            patch.setattr(engine, "optimizer", idle)
            for name, read in reads.items():

                def reading(self, *args, read=read, name=name):
                    if self.is_floating_point():
                        readings.append((global_step, name, self.numel()))
                    return read(self, *args)

                patch.setattr(torch.Tensor, name, reading)
            return step(engine, *args)

    monkeypatch.setattr(script, "train_step", train_step)
    flags = {"stage2_objective": objective, "gradient_accumulation_steps": 2, "stage1_steps": 1, "stage2_steps": 1}
    train(world, tmp_path / "output", **flags)
    assert readings == [(0, "tolist", 2), (1, "tolist", {"composed": 2, "both": 7}[objective])]


def test_without_a_weight_the_teacher_is_not_asked_for_the_base_prompt(world, tmp_path, monkeypatch):
    batches, step = [], script.train_step

    def train_step(engine, models, objectives):
        hook = models.denoiser.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
        try:
            return step(engine, models, objectives)
        finally:
            hook.remove()

    monkeypatch.setattr(script, "train_step", train_step)
    flags = {"train_batch_size": 5, "base_prompt_share": 0.6, "stage1_steps": 1, "stage2_steps": 1}
    for weight, rows in ((0.5, 4), (0, 2)):
        batches.clear()
        AcceleratorState._reset_state(reset_partial_state=True)
        train(world, tmp_path / str(weight), teacher_base_weight=weight, **flags)
        assert batches == [5, 5, rows, 5]
