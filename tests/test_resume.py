"""Runs that stop and go on: from each checkpoint, after signals, full disks and kills, always to the same bits.

A run that was interrupted must end as if it had not been, so each test compares whole files with those of a run that
nothing disturbed.
"""

import json
import logging
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from filelock import FileLock
from PIL import Image
from safetensors import safe_open
from test_checkpoints import bits, flip_a_byte
from test_train import (  # noqa: F401  (fixtures)
    ROOT,
    ROWS,
    WEIGHTS,
    files,
    fresh_accelerator,
    make_flags,
    train,
    watch,
    world,
    write_data,
)

import train_spf_portrait_lora as script
import training_inputs as inputs_module
from checkpoints import MANIFEST, STATE_TENSORS, STATE_VALUES, check_checkpoint, find_checkpoints, read_state
from interruption import Interrupted
from toy_portraits.recipe import training_flags


SCRIPT = ROOT / "train_spf_portrait_lora.py"
# Two steps of stage 1 and three of stage 2: a checkpoint in stage 1, one at the border, and three in stage 2.
STEPS = {"stage1_steps": 2, "stage2_steps": 3, "checkpointing_steps": 1}
BORDER, TOTAL = 2, 5


@pytest.fixture(autouse=True)
def one_thread():
    """As in the processes of their own: sums over several threads have other last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def contents(folder: Path) -> dict[str, object]:
    """Every file below a folder, hidden ones too, in a form in which equality is equality to the bit."""
    return {name: content(folder / name) for name in files(folder)}


def content(path: Path) -> object:
    """A file's bytes; safetensors as a mapping, for its header lists the metadata in an order of chance."""
    if path.suffix != ".safetensors":
        found = path.read_bytes()
        # Which holds the hashes of such files.
        return json.loads(found)["files"].keys() if path.name == MANIFEST else found
    with safe_open(path, framework="pt") as file:
        return sorted((file.metadata() or {}).keys()), bits({name: file.get_tensor(name) for name in file.keys()})


def weights(folder: Path) -> object:
    return content(folder / WEIGHTS)


def assert_same_ending(again: Path, whole: Path) -> None:
    """The LoRAs, and the last checkpoint with all that a run knows, are the same to the bit."""
    last = find_checkpoints(whole)[-1].name
    for name in (WEIGHTS, f"{last}/{WEIGHTS}", f"{last}/{STATE_TENSORS}", f"{last}/{STATE_VALUES}"):
        assert content(again / name) == content(whole / name), f"{name} is another"
    hidden = [name for name in files(again) if name.startswith(".") or "/." in name]
    assert not hidden, "something unfinished was left"


def copy_checkpoint(whole: Path, step: int, output_dir: Path) -> Path:
    """A run that has come so far."""
    return Path(shutil.copytree(whole / f"checkpoint-{step}", output_dir / f"checkpoint-{step}"))


@pytest.fixture(scope="session")
def whole_run(world, tmp_path_factory):  # noqa: F811
    """An undisturbed run with a checkpoint after each step, once per set of flags."""
    folders = {}

    def run(**changes) -> Path:
        flags = {**STEPS, **changes}
        key = repr(sorted(flags.items()))
        if key not in folders:
            AcceleratorState._reset_state(reset_partial_state=True)
            folders[key] = train(world, tmp_path_factory.mktemp("whole") / "output", **flags)
            AcceleratorState._reset_state(reset_partial_state=True)
        return folders[key]

    return run


# ------------------------------------------------------------------------------------------------ each checkpoint


PIXELS = {"cache_latents": None, "no-cache_latents": True}
OPTIONS = {
    "composed": {},
    "paper": {"stage2_objective": "paper"},
    "both": {"stage2_objective": "both"},
    "refreshed maps": {"stage2_objective": "both", "sfcm_refresh_steps": 2},
    "accumulation": {"stage2_objective": "both", "gradient_accumulation_steps": 2},
    "dropout": {"stage2_objective": "both", "lora_dropout": 0.3},
    "warm-up and cosine": {"lr_scheduler": "cosine", "lr_warmup_steps": 2},
    "restarts": {"lr_scheduler": "polynomial", "stage2_lr_scheduler": "cosine_with_restarts", "lr_num_cycles": 2},
    "DoRA": {"use_dora": True},
    "prodigy": {"optimizer": "prodigy", "learning_rate": 1.0},
    "8 bits": {"use_8bit_adam": True, "rank": 256, "lora_alpha": 256},
    "pictures of each step": {**PIXELS, "stage2_objective": "both", "no-center_crop": True, "random_flip": True},
    "mirrored": {"random_flip": True, "stage2_objective": "paper"},
    "prompts of each step": {"no-cache_text_embeddings": True},
    "buckets": {"aspect_ratio_buckets": "16,16;24,16", "resolution": None},
    "maps of each step": {"sfcm_mode": "paper", "stage2_objective": "both"},
    "own portraits": {"alignment_source": "both", "composed_init": "stage1"},
    "one pass": {"dual_path": "single_pass", "stage2_objective": "both"},
    "all layers": {"lora_target": "all", "gradient_checkpointing": True},
}
EVERY = {"composed", "paper", "both", "refreshed maps"}
POINTS = [
    (name, step) for name in OPTIONS for step in (range(1, TOTAL + 1) if name in EVERY else (1, BORDER, BORDER + 1))
]


@pytest.mark.parametrize("name, step", POINTS, ids=[f"{name}, step {step}" for name, step in POINTS])
def test_a_run_goes_on_to_the_same_bits(world, whole_run, tmp_path, name, step):  # noqa: F811
    package = {"prodigy": "prodigyopt", "8 bits": "bitsandbytes"}.get(name)
    if package is not None:
        pytest.importorskip(package)
    whole = whole_run(**OPTIONS[name])
    again = tmp_path / "output"
    copy_checkpoint(whole, step, again)
    train(world, again, **{**STEPS, **OPTIONS[name]}, resume_from_checkpoint="latest")
    assert_same_ending(again, whole)
    assert (again / "stage1").exists() == (step <= BORDER)


@pytest.mark.parametrize("without", ["optimizer", "lr_scheduler", "alignment", "teacher", "LoRA"])
def test_each_part_of_a_checkpoint_is_needed(world, whole_run, tmp_path, monkeypatch, without):  # noqa: F811
    """Had the training no use for one of them, the comparisons above would not show that it is kept."""
    options = {"stage2_objective": "both", "lr_warmup_steps": 2}
    whole, step = whole_run(**options), BORDER + 1
    again = tmp_path / "output"
    folder = copy_checkpoint(whole, step, again)
    if without == "LoRA":
        # Of stage 1: the first step of a warm-up moves nothing.
        earlier = whole / f"checkpoint-{BORDER - 1}" / WEIGHTS
        monkeypatch.setattr(script, "load_adapter", lambda unet, _, load=script.load_adapter: load(unet, earlier))
    else:
        state, other = read_state(folder), read_state(whole / f"checkpoint-{step - 1}")
        if without == "alignment":
            state["alignment"]["sfcm"] = [value * 0.5 for value in state["alignment"]["sfcm"]]
        elif without == "teacher":
            state["teacher"] = {key: value * 0.5 for key, value in state["teacher"].items()}
        elif without == "optimizer":
            groups = state["optimizer"]["param_groups"]
            state["optimizer"] = {"state": {}, "param_groups": groups}
        else:
            state["lr_scheduler"] = {**other["lr_scheduler"], "last_epoch": 0, "_step_count": 1}
        monkeypatch.setattr(inputs_module, "read_state", lambda _: state)
    train(world, again, **{**STEPS, **options}, resume_from_checkpoint="latest")
    assert weights(again) != weights(whole)


@pytest.mark.parametrize("step", [1, BORDER, BORDER + 1])
@pytest.mark.parametrize("name", ["both", "accumulation", "pictures of each step", "buckets"])
def test_no_sample_comes_twice_and_none_is_left_out(world, whole_run, tmp_path, monkeypatch, name, step):  # noqa: F811
    options = {**STEPS, **OPTIONS[name]}
    read, batch_pixels = [], inputs_module.TrainingSet.batch_pixels

    def watched(self, micro_step):
        read.append(micro_step)
        return batch_pixels(self, micro_step)

    monkeypatch.setattr(inputs_module.TrainingSet, "batch_pixels", watched)
    batches = watch(monkeypatch, "draw_batch")

    def drawn() -> list[tuple]:
        return [(batch.index.tolist(), batch.rows.tolist(), batch.noise.sum().item()) for batch in batches]

    train(world, tmp_path / "whole", **options)
    expected, pictures = drawn(), list(read)
    batches.clear(), read.clear()
    AcceleratorState._reset_state(reset_partial_state=True)
    copy_checkpoint(whole_run(**OPTIONS[name]), step, tmp_path / "again")
    batches.clear(), read.clear()
    train(world, tmp_path / "again", **options, resume_from_checkpoint="latest")
    accumulation = options.get("gradient_accumulation_steps", 1)
    in_stage1, in_stage2 = 1, {"composed": 1}.get(options.get("stage2_objective"), 3)
    skipped = accumulation * (min(step, BORDER) * in_stage1 + max(0, step - BORDER) * in_stage2)
    assert len(expected) == accumulation * (BORDER * in_stage1 + (TOTAL - BORDER) * in_stage2) or name == "buckets"
    if name == "buckets":
        skipped = step
    assert drawn() == expected[skipped:] and drawn()
    assert read == pictures[step * accumulation :]
    assert bool(pictures) == (name == "pictures of each step")


# ------------------------------------------------------------------------------------------- what may be another


@pytest.mark.parametrize("step", [1, BORDER])
def test_more_steps_of_stage_2_can_be_asked_for(world, whole_run, tmp_path, step):  # noqa: F811
    whole = whole_run(stage2_steps=4)
    copy_checkpoint(whole_run(), step, tmp_path / "output")
    again = train(world, tmp_path / "output", **{**STEPS, "stage2_steps": 4}, resume_from_checkpoint="latest")
    assert_same_ending(again, whole)


@pytest.mark.parametrize("step", [BORDER + 1, TOTAL])
def test_a_run_in_stage_2_or_at_its_end_goes_on_for_longer(world, whole_run, tmp_path, step):  # noqa: F811
    options = {"stage2_lr_scheduler": "constant"}
    copy_checkpoint(whole_run(**options), step, tmp_path / "output")
    longer = {**STEPS, **options, "stage2_steps": 5}
    again = train(world, tmp_path / "output", **longer, resume_from_checkpoint="latest")
    assert_same_ending(again, whole_run(**options, stage2_steps=5))


def test_a_plain_lora_becomes_a_portrait_lora(world, whole_run, tmp_path):  # noqa: F811
    """Stage 1 alone first, and stage 2 when one has seen what stage 1 moved."""
    train(world, tmp_path / "output", **{**STEPS, "stage2_steps": 0})
    AcceleratorState._reset_state(reset_partial_state=True)
    again = train(world, tmp_path / "output", **STEPS, resume_from_checkpoint="latest")
    assert_same_ending(again, whole_run())


def test_the_data_may_lie_elsewhere(world, whole_run, tmp_path):  # noqa: F811
    whole = whole_run()
    shutil.copytree(world.data, tmp_path / "data")
    copy_checkpoint(whole, 1, tmp_path / "output")
    flags = {**STEPS, "train_data_dir": tmp_path / "data", "cache_dir": tmp_path / "cache", "dataloader_num_workers": 1}
    again = train(world, tmp_path / "output", **flags, resume_from_checkpoint="latest")
    assert weights(again) == weights(whole)


def test_latest_without_a_checkpoint_starts_anew(world, whole_run, tmp_path):  # noqa: F811
    again = train(world, tmp_path / "output", **STEPS, resume_from_checkpoint="latest")
    assert contents(again) == contents(whole_run())


def test_latest_after_the_end_writes_the_same_lora(world, whole_run, tmp_path):  # noqa: F811
    again = Path(shutil.copytree(whole_run(), tmp_path / "output"))
    (again / WEIGHTS).unlink()
    train(world, again, **STEPS, resume_from_checkpoint="latest")
    assert contents(again) == contents(whole_run())


def test_a_damaged_checkpoint_costs_its_steps_alone(world, whole_run, tmp_path, caplog):  # noqa: F811
    again = Path(shutil.copytree(whole_run(), tmp_path / "output"))
    for step in (4, 5):
        flip_a_byte(again / f"checkpoint-{step}" / STATE_TENSORS)
    train(world, again, **STEPS, resume_from_checkpoint="latest")
    assert "checkpoint-5 is damaged" in caplog.text and "checkpoint-4 is damaged" in caplog.text
    assert contents(again) == contents(whole_run()), "the damaged ones were not replaced"


def test_a_checkpoint_can_be_named(world, whole_run, tmp_path):  # noqa: F811
    """By its name in the output folder, or by its path, wherever the new run writes."""
    whole = whole_run()
    again = Path(shutil.copytree(whole, tmp_path / "first" / "output"))
    train(world, again, **STEPS, resume_from_checkpoint="checkpoint-3")
    assert contents(again) == contents(whole)
    AcceleratorState._reset_state(reset_partial_state=True)
    other = train(world, tmp_path / "second", **STEPS, resume_from_checkpoint=whole / "checkpoint-3")
    assert_same_ending(other, whole)
    assert [path.name for path in find_checkpoints(other)] == ["checkpoint-4", "checkpoint-5"]


@pytest.mark.parametrize("limit, kept", [(1, [5]), (2, [4, 5])])
def test_the_limit_of_checkpoints(world, whole_run, tmp_path, limit, kept):  # noqa: F811
    output = train(world, tmp_path / "output", **STEPS, checkpoints_total_limit=limit)
    assert [path.name for path in find_checkpoints(output)] == [f"checkpoint-{step}" for step in kept]
    assert_same_ending(output, whole_run())


@pytest.mark.parametrize("objective", ["composed", "paper", "both"])
def test_pictures_and_checkpoints_do_not_touch_the_training(world, whole_run, tmp_path, objective):  # noqa: F811
    options = {"stage2_objective": objective, "lora_dropout": 0.3}
    expected = weights(whole_run(**options))
    pictures = {"num_validation_images": 1, "validation_steps": 1}
    for name, changes in {
        "none": {"checkpointing_steps": 0},
        "pictures": {"checkpointing_steps": 0, **pictures},
        "both": pictures,
        "seldom": {"checkpointing_steps": 3},
    }.items():
        AcceleratorState._reset_state(reset_partial_state=True)
        output = train(world, tmp_path / name, **{**STEPS, **options, **changes})
        assert weights(output) == expected, name
        steps = [int(path.name.removeprefix("checkpoint-")) for path in find_checkpoints(output)]
        assert steps == {"both": [1, 2, 3, 4, 5], "seldom": [3]}.get(name, [])


def test_no_file_is_a_pickle(world, tmp_path):  # noqa: F811
    flags = {**STEPS, "num_validation_images": 1, "report_to": "tensorboard", "output_kohya_format": True}
    output = train(world, tmp_path / "output", **flags, cache_dir=tmp_path / "output" / "cache")
    assert {Path(name).suffix for name in files(output)} >= {".safetensors", ".json", ".png", ".md"}
    for name in files(output):
        # TensorBoard's own files among them.
        known = Path(name).suffix in (".safetensors", ".json", ".png", ".md", ".yml") or "tfevents" in name
        # Pickles begin with the protocol, and torch's files are zip archives.
        start = (output / name).read_bytes()[:2]
        assert known and start[:1] != b"\x80" and start != b"PK", name


# --------------------------------------------------------------------------------------------------- wrong resumes


@pytest.fixture
def wrong_resume(world, whole_run, tmp_path, monkeypatch):  # noqa: F811
    """Trains on from a checkpoint in stage 2, and hands out the line that the program ends with."""
    whole, again = whole_run(), tmp_path / "output"
    monkeypatch.setattr(script, "train_step", None)  # calling it would be another error

    def run(prepare: Callable[[Path], object] = lambda folder: None, **changes) -> str:
        prepare(copy_checkpoint(whole, 3, again))
        before = contents(again)
        with pytest.raises(SystemExit) as caught:
            train(world, again, **{**STEPS, "resume_from_checkpoint": "latest", **changes})
        message = str(caught.value)
        assert message.startswith("train_spf_portrait_lora.py: error: ") and "\n" not in message
        assert contents(again) == before, "a refused run changed something"
        return message

    return run


@pytest.mark.parametrize(
    "flag, value, before",
    [
        ("learning_rate", 0.02, "0.01"),
        ("rank", 3, "2"),
        ("lora_alpha", 2.0, "4.0"),
        ("stage1_steps", 3, "2"),
        ("stage2_objective", "paper", "composed"),
        ("seed", 1, "0"),
        ("lora_dropout", 0.1, "0.0"),
        ("sfcm_timesteps", (500, 900), "[600, 950]"),
        ("gradient_accumulation_steps", 2, "1"),
        ("optimizer", "prodigy", "adamw"),
        ("max_grad_norm", 2.0, "1.0"),
        ("random_flip", True, "False"),
        ("stage2_lr_scheduler", "constant", "cosine"),
        ("num_alignment_images", 4, "3"),
    ],
)
def test_other_flags_are_refused(wrong_resume, flag, value, before):
    now = str(list(value)) if isinstance(value, tuple) else str(value)
    message = wrong_resume(**{flag: value})
    assert all(part in message for part in ("--resume_from_checkpoint", "checkpoint-3", flag, before, now)), message
    assert message.rindex(before, 0, message.rindex(now)) < message.rindex(now), message


def test_another_batch_is_refused(wrong_resume):
    message = wrong_resume(train_batch_size=3)
    assert "--resume_from_checkpoint" in message and "batch_size 2" in message and message.endswith(" 3")


def changed_prompt(folder: Path) -> None:
    shutil.rmtree(folder)
    write_data(folder, [{**ROWS[0], "base_prompt": "a woman, a white hat"}, *ROWS[1:]])


def changed_target(folder: Path) -> None:
    shutil.rmtree(folder)
    write_data(folder, [*ROWS[:5], {**ROWS[5], "target_prompt": "a crown"}])


def changed_order(folder: Path) -> None:
    shutil.rmtree(folder)
    write_data(folder, [ROWS[1], ROWS[0], *ROWS[2:]])


def changed_picture(folder: Path) -> None:
    with Image.open(folder / "5.png") as image:
        pixels = np.asarray(image).copy()
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(folder / "5.png")


@pytest.mark.parametrize("change", [changed_prompt, changed_target, changed_order, changed_picture])
def test_other_data_are_refused(wrong_resume, tmp_path, change):
    change(write_data(tmp_path / "data"))
    message = wrong_resume(train_data_dir=tmp_path / "data")
    assert all(part in message for part in ("--resume_from_checkpoint", "checkpoint-3", "prompts or pictures")), message


def test_fewer_pictures_are_refused(wrong_resume):
    assert "prompts or pictures" in wrong_resume(max_train_samples=5)


@pytest.mark.parametrize("named", ["checkpoint-3", "path"])
def test_a_damaged_checkpoint_that_is_named_is_refused(wrong_resume, tmp_path, named):
    path = tmp_path / "output" / "checkpoint-3"
    asked = path if named == "path" else named
    message = wrong_resume(lambda folder: flip_a_byte(folder / STATE_TENSORS), resume_from_checkpoint=asked)
    assert all(part in message for part in (f"--resume_from_checkpoint {asked}", str(path), STATE_TENSORS)), message


@pytest.mark.parametrize("asked", ["checkpoint-4", "elsewhere", "/nowhere/checkpoint-3"])
def test_a_checkpoint_that_is_not_there_is_refused(wrong_resume, asked):
    message = wrong_resume(resume_from_checkpoint=asked)
    assert f"--resume_from_checkpoint {asked}" in message and "no such folder" in message


def test_a_folder_that_is_no_checkpoint_is_refused(wrong_resume, world):  # noqa: F811
    message = wrong_resume(resume_from_checkpoint=world.data)
    assert f"--resume_from_checkpoint {world.data}" in message and MANIFEST in message


def test_a_new_run_does_not_mix_with_an_old_one(wrong_resume, tmp_path):
    message = wrong_resume(resume_from_checkpoint=None)
    parts = (f"--output_dir {tmp_path / 'output'}", "checkpoint-3", "--resume_from_checkpoint latest")
    assert all(part in message for part in parts), message
