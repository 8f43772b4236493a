"""Tests of how much of the target portraits show, and of the strength that a LoRA gets by it."""

import json
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_resume import copy_checkpoint
from test_train import difference, prepared, train, watch

import train_spf_portrait_lora as script
from loras import LORA_WEIGHTS
from training import checkpoints
from training import presence as module
from training.checkpoints import STATE_VALUES
from training.presence import LEAST_DIFFERENCE, STRENGTHS, Presence, bring_to_presence, find_strength


SEEN = {"original": 0.1, "stage1": 0.3}


@pytest.fixture(autouse=True)
def few_probes(monkeypatch):
    monkeypatch.setattr(module, "PROBES", 6)
    monkeypatch.setattr(module, "PROBE_STEPS", 2)


@pytest.mark.parametrize(
    ("wanted", "strength", "tried"),
    [
        (0.6, 1.2, 2),  # 0.5 at 1 and 0.7 at 1.4
        (0.4, 0.8, 2),
        (0.5, 1.0, 2),
        (0.9, 1.8, 3),
        (1.5, 2.0, 3),  # not reached, by the last one least
        (0.1, 0.5, 3),  # passed by all
    ],
)
def test_the_least_strength_that_has_a_presence(wanted, strength, tried):
    asked = []
    found = find_strength(lambda own: asked.append(own) or own / 2, wanted)
    assert found.strength == pytest.approx(strength)
    assert found.tried == {own: own / 2 for own in asked} and len(asked) == tried == len(set(asked))
    assert set(asked) <= set(STRENGTHS)


def test_a_presence_that_falls_back_is_found_where_it_was_reached():
    seen = {0.5: 0.1, 0.7: 0.6, 1.0: 0.5, 1.4: 0.8, 2.0: 0.9}
    assert find_strength(seen.get, 0.55).strength == pytest.approx(1.0 + 0.4 * 0.05 / 0.3)


def test_a_presence_that_is_never_reached_is_come_nearest_to():
    """Beyond some strength a LoRA ruins the portrait, and with it the target."""
    seen = {1.0: 0.9, 1.4: 1.05, 2.0: 0.7}
    found = find_strength(seen.get, 1.1)
    assert found.strength == 1.4 and found.tried == seen


@pytest.fixture
def run(world):
    """A run before its first step, whose LoRA does something."""
    own = prepared(world, target_presence=1)
    with torch.no_grad():
        for layer in own.parts.models.adapters.layers:
            torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.5)
    return own


def presence_of(run) -> Presence:
    own = Presence(run.flags, run.inputs, run.parts.models, run.accelerator)
    own.measure_stage1()
    return own


def test_presence_is_nought_for_the_original_model_and_one_for_stage_1(run):
    presence = presence_of(run)
    assert presence.original != presence.stage1
    assert presence.at(1.0) == pytest.approx(1, abs=1e-4)
    assert presence.at(2.0) != pytest.approx(1, abs=1e-3)
    # With base prompts and the LoRA off it draws the very portraits that are 0.
    presence._pairs = [pair.__class__(**{**vars(pair), "full_prompt": pair.base_prompt}) for pair in presence._pairs]
    assert presence.at(0.0) == pytest.approx(0, abs=1e-4)


def test_presence_leaves_the_models_as_they_were(run):
    models = run.parts.models
    before = {name: value.clone() for name, value in models.lora().items()}
    scaling = [dict(layer.scaling) for layer in models.adapters.layers]
    presence_of(run).at(2.0)
    assert all(torch.equal(value, before[name]) for name, value in models.lora().items())
    assert [dict(layer.scaling) for layer in models.adapters.layers] == scaling


def test_a_lora_as_strong_as_it_was_tried(run):
    """Scaled weights draw what the strength of the adapter drew."""
    presence = presence_of(run)
    tried = presence.at(1.4)
    run.parts.models.scale_lora(1.4)
    assert presence.at(1.0) == pytest.approx(tried, abs=1e-3)


def test_stage_1_is_measured_before_it_is_left(world, tmp_path, monkeypatch):
    """The LoRA that is 1 is the one that stage 1 ended with, and a run that goes on knows what it was."""
    measured, told = [], {}
    measure, bring = Presence.measure_stage1, module.bring_to_presence

    def measure_and_note(self):
        measured.append({name: value.clone() for name, value in self._models.lora().items()})
        measure(self)

    def note(models, presence, wanted):
        told[len(told)] = presence.state()
        return bring(models, presence, wanted)

    monkeypatch.setattr(module, "LEAST_DIFFERENCE", -9)  # random models tell nothing
    monkeypatch.setattr(Presence, "measure_stage1", measure_and_note)
    monkeypatch.setattr(script, "bring_to_presence", note)
    flags = {"target_presence": 1.0, "checkpointing_steps": 3}
    whole = train(world, tmp_path / "whole", **flags)
    stage1 = load_file(whole / "stage1" / LORA_WEIGHTS)
    assert len(measured) == 1
    assert all(torch.equal(measured[0][name.removeprefix("unet.")], stage1[name]) for name in stage1)
    copy_checkpoint(whole, 3, tmp_path / "again")
    again = train(world, tmp_path / "again", **flags, resume_from_checkpoint="latest")
    assert len(measured) == 1 and told[0] == told[1] and told[0]["stage1"] != told[0]["original"]
    assert difference(whole, again) == 0 < difference(whole, whole / "checkpoint-3")


def test_the_training_ends_with_the_strength_that_was_found(world, tmp_path, monkeypatch, caplog):
    without = load_file(train(world, tmp_path / "without") / LORA_WEIGHTS)
    monkeypatch.setattr(Presence, "at", lambda self, strength: strength / 2)
    monkeypatch.setattr(Presence, "can_tell", True)
    with caplog.at_level("INFO"):
        folder = train(world, tmp_path / "output", target_presence=0.6)
    for name, weights in load_file(folder / LORA_WEIGHTS).items():
        factor = 1.2 if "lora_B" in name else 1.0
        torch.testing.assert_close(weights, factor * without[name])
    assert "the LoRA is now 1.20 times as strong, seen were 0.50 at 1, 0.70 at 1.4" in caplog.text
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "`--target_presence` | `0.6, by 1.20 times the weights`" in card


def test_the_last_checkpoint_goes_on_to_another_presence(world, tmp_path, monkeypatch):
    monkeypatch.setattr(Presence, "at", lambda self, strength: strength / 2)
    monkeypatch.setattr(Presence, "can_tell", True)
    flags = {"checkpointing_steps": 4}
    first = load_file(train(world, tmp_path / "output", **flags, target_presence=0.6) / LORA_WEIGHTS)
    (tmp_path / "output" / LORA_WEIGHTS).unlink()
    again = train(world, tmp_path / "output", **flags, target_presence=0.9, resume_from_checkpoint="latest")
    for name, weights in load_file(again / LORA_WEIGHTS).items():
        torch.testing.assert_close(weights, first[name] * (1.8 / 1.2 if "lora_B" in name else 1.0))


def test_a_checkpoint_without_a_measure_is_refused(world, tmp_path, refusal):
    train(world, tmp_path / "output", checkpointing_steps=3)
    line = refusal(target_presence=1.0, resume_from_checkpoint=tmp_path / "output" / "checkpoint-3")
    assert "what --target_presence needs was not measured before stage 2" in line
    values = tmp_path / "output" / "checkpoint-3" / STATE_VALUES
    assert '"presence"' in values.read_text()
    state = json.loads(values.read_text().replace('"presence"', '"unknown"'))  # as one of an earlier version
    values.write_text(json.dumps(state))
    (values.parent / checkpoints.MANIFEST).unlink()
    checkpoints._write_manifest(values.parent, 3)
    assert refusal(target_presence=1.0, resume_from_checkpoint=values.parent) == line


def test_what_was_measured_outlives_a_run_that_does_not_ask(world, tmp_path, monkeypatch):
    """And from a checkpoint of stage 1 it is measured."""
    measured = []
    monkeypatch.setattr(Presence, "measure_stage1", lambda self: measured.append(self) or self.restore(SEEN))
    monkeypatch.setattr(Presence, "at", lambda self, strength: strength / 2)
    flags = {"checkpointing_steps": 1, "stage2_steps": 3}
    whole = train(world, tmp_path / "whole", target_presence=0.6, **flags)
    for step, asked in ((1, 2), (3, 2)):
        copy_checkpoint(whole, step, tmp_path / f"from{step}")
        if step > 2:  # goes on without it, and then with it
            train(world, tmp_path / f"from{step}", resume_from_checkpoint="latest", **flags)
            for name in ("checkpoint-5", LORA_WEIGHTS):
                path = tmp_path / f"from{step}" / name
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        again = train(world, tmp_path / f"from{step}", target_presence=0.6, resume_from_checkpoint="latest", **flags)
        assert difference(whole, again) == 0 and len(measured) == asked


def test_a_lora_that_takes_stage_1s_place_is_what_1_is(world, tmp_path, trained, monkeypatch):
    measured = watch(monkeypatch, Presence, "measure_stage1")
    flags = {"stage1_steps": 0, "stage1_lora_path": trained(stage2_steps=0)}
    train(world, tmp_path / "output", target_presence=1, **flags)
    assert len(measured) == 1


def test_the_card_says_what_was_not_reached(run):
    presence = presence_of(run)
    presence.at = {1.0: 0.5, 1.4: 0.8, 2.0: 0.7}.get
    presence.restore(SEEN)
    assert bring_to_presence(run.parts.models, presence, 0.9) == "not reached: 0.80 by 1.40 times the weights"


def test_clip_leaves_the_device_again(run):
    """As every model that no step uses."""
    presence, places = presence_of(run), []
    move = presence._clip.to
    presence._clip.to = lambda place: places.append(str(place)) or move(place)
    presence.at(1.0)
    assert places == [str(run.parts.models.device), "cpu"]


def test_what_clip_does_not_see_leaves_the_lora_as_it_is(run, monkeypatch, caplog):
    monkeypatch.setattr(module, "LEAST_DIFFERENCE", 3.0)
    before = {name: value.clone() for name, value in run.parts.models.lora().items()}
    models = run.parts.models
    assert bring_to_presence(models, presence_of(run), 0.9) == "not set, as CLIP does not tell the target"
    assert all(torch.equal(value, before[name]) for name, value in models.lora().items())
    assert "CLIP hardly tells stage 1's portraits" in caplog.text and LEAST_DIFFERENCE < 0.1


def test_no_clip_model_is_refused_before_anything_is_loaded(refusal, tmp_path):
    line = refusal(target_presence=0.9, clip_model_name_or_path=tmp_path / "none")
    assert "--clip_model_name_or_path" in line
    assert "--target_presence must be 0 or more, got -1.0" in refusal(target_presence=-1)


@pytest.mark.parametrize(
    "flags", [{"stage2_steps": 0}, {"preservation": "dop"}, {"stage1_steps": 0, "stage2_objective": "paper"}], ids=str
)
def test_a_presence_without_two_stages_is_refused(refusal, flags):
    assert "--target_presence is measured beside stage 1" in refusal(target_presence=1, **flags)


def test_damaged_clip_weights_end_the_run_before_its_first_step(world, tmp_path, monkeypatch):
    clip = shutil.copytree(world.clip, tmp_path / "clip")
    (clip / "model.safetensors").write_bytes(b"damaged")
    steps = watch(monkeypatch, script, "train_step")
    with pytest.raises(SystemExit, match="--clip_model_name_or_path"):
        train(world, tmp_path / "output", target_presence=0.9, clip_model_name_or_path=clip)
    assert not steps


def test_processes_share_what_is_drawn(run):
    """Each sees its own portraits; added up they are the mean of one process that sees all."""
    whole, shares = presence_of(run), []

    def one_of_three(rank: int) -> SimpleNamespace:
        return SimpleNamespace(
            process_index=rank, num_processes=3, device=run.accelerator.device, is_local_main_process=rank == 0,
            autocast=nullcontext, reduce=lambda total, how: shares.append(float(total)) or total,
        )  # fmt: skip

    for rank in range(3):
        run.accelerator = one_of_three(rank)
        presence_of(run)
    original, stage1 = sum(shares[::2]) / module.PROBES, sum(shares[1::2]) / module.PROBES
    assert original == pytest.approx(whole.original, abs=1e-4) and stage1 == pytest.approx(whole.stage1, abs=1e-4)
