"""Runs that stop and go on: from each checkpoint, after signals, full disks and kills, always to the same bits.

A run that was interrupted must end as if it had not been, so each test compares whole files with those of a run that
nothing disturbed.
"""

import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from filelock import FileLock
from forks import ROOT, SCRIPT, Run, environment
from PIL import Image
from test_checkpoints import flip_a_byte
from test_train import (  # noqa: F401  (fixtures)
    ROWS,
    WEIGHTS,
    files,
    fresh_accelerator,
    make_flags,
    train,
    world,
    write_data,
)

import train_spf_portrait_lora as script
from programs.writing import HIDDEN_PREFIX, find_checkpoints
from toy_portraits.recipe import training_flags
from training import models, resuming
from training.batches import Batch, BatchDrawer
from training.checkpoints import (
    MANIFEST,
    STATE_TENSORS,
    STATE_VALUES,
    check_checkpoint,
    read_state,
)
from training.run_file import RUN_FILE
from training.training_set import TrainingSet


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


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {name: (folder / name).read_bytes() for name in files(folder)}


def results(folder: Path) -> dict[str, bytes]:
    """The same without what a run was asked for, where the folder's name is."""
    return {name: content for name, content in contents(folder).items() if name != RUN_FILE}


def weights(folder: Path) -> bytes:
    return (folder / WEIGHTS).read_bytes()


def assert_same_ending(again: Path, whole: Path) -> None:
    """The LoRAs, and the last checkpoint with all that a run knows, are the same to the bit."""
    last = find_checkpoints(whole)[-1].name
    for name in (WEIGHTS, f"{last}/{WEIGHTS}", f"{last}/{STATE_TENSORS}", f"{last}/{STATE_VALUES}"):
        assert (again / name).read_bytes() == (whole / name).read_bytes(), f"{name} is another"
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
EVERY = {"composed", "refreshed maps"}
POINTS = [
    (name, step) for name in OPTIONS for step in (range(1, TOTAL + 1) if name in EVERY else (1, BORDER, BORDER + 1))
]
QUICK = {("composed", 1), ("composed", BORDER), ("composed", BORDER + 1), ("both", BORDER + 1)}


@pytest.mark.parametrize(
    "name, step",
    [
        pytest.param(*point, id=f"{point[0]}, step {point[1]}", marks=() if point in QUICK else pytest.mark.slow)
        for point in POINTS
    ],
)
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


@pytest.mark.parametrize("without", ["optimizer", "lr_scheduler", "alignment", "objectives", "LoRA"])
def test_each_part_of_a_checkpoint_is_needed(world, whole_run, tmp_path, monkeypatch, without):  # noqa: F811
    """Had the training no use for one of them, the comparisons above would not show that it is kept."""
    options = {"stage2_objective": "both", "lr_warmup_steps": 2}
    whole, step = whole_run(**options), BORDER + 1
    again = tmp_path / "output"
    folder = copy_checkpoint(whole, step, again)
    if without == "LoRA":
        # Of stage 1: the first step of a warm-up moves nothing.
        earlier = whole / f"checkpoint-{BORDER - 1}" / WEIGHTS
        load = models.load_adapter
        monkeypatch.setattr(models, "load_adapter", lambda family, pipeline, _: load(family, pipeline, earlier))
    else:
        state, other = read_state(folder), read_state(whole / f"checkpoint-{step - 1}")
        if without == "alignment":
            state["alignment"]["sfcm"] = [value * 0.5 for value in state["alignment"]["sfcm"]]
        elif without == "objectives":
            teacher = state["objectives"]["Composed"]
            teacher |= {key: value * 0.5 for key, value in teacher.items()}
        elif without == "optimizer":
            groups = state["optimizer"]["param_groups"]
            state["optimizer"] = {"state": {}, "param_groups": groups}
        else:
            state["lr_scheduler"] = {**other["lr_scheduler"], "last_epoch": 0, "_step_count": 1}
        monkeypatch.setattr(resuming, "read_state", lambda _: state)
    train(world, again, **{**STEPS, **options}, resume_from_checkpoint="latest")
    assert weights(again) != weights(whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["both", "accumulation", "pictures of each step", "buckets"])
def test_no_sample_comes_twice_and_none_is_left_out(world, tmp_path, monkeypatch, name):  # noqa: F811
    options = {**STEPS, **OPTIONS[name]}
    read, batch_pixels = [], TrainingSet.batch_pixels
    batches, noised = [], BatchDrawer._noised

    def watched_pixels(self, micro_step) -> torch.Tensor:
        read.append(micro_step)
        return batch_pixels(self, micro_step)

    def watched_batch(self, *args, **kwargs) -> Batch:
        batches.append(noised(self, *args, **kwargs))
        return batches[-1]

    monkeypatch.setattr(TrainingSet, "batch_pixels", watched_pixels)
    monkeypatch.setattr(BatchDrawer, "_noised", watched_batch)

    def drawn() -> list[tuple]:
        return [(batch.index.tolist(), batch.rows.tolist(), batch.noise.sum().item()) for batch in batches]

    whole = train(world, tmp_path / "whole", **options)
    expected, pictures = drawn(), list(read)
    accumulation = options.get("gradient_accumulation_steps", 1)
    in_stage2 = 1 if name == "buckets" else 3
    assert len(expected) == accumulation * (BORDER + (TOTAL - BORDER) * in_stage2)
    assert bool(pictures) == (name == "pictures of each step")
    for step in (1, BORDER, BORDER + 1):
        batches.clear(), read.clear()
        AcceleratorState._reset_state(reset_partial_state=True)
        copy_checkpoint(whole, step, tmp_path / f"{step}")
        train(world, tmp_path / f"{step}", **options, resume_from_checkpoint="latest")
        done = accumulation * (min(step, BORDER) + max(0, step - BORDER) * in_stage2)
        assert drawn() == expected[done:] and drawn()
        assert read == pictures[step * accumulation :]


# ------------------------------------------------------------------------------------------- what may be another


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, BORDER])
def test_more_steps_of_stage_2_can_be_asked_for(world, whole_run, tmp_path, step):  # noqa: F811
    whole = whole_run(stage2_steps=4)
    copy_checkpoint(whole_run(), step, tmp_path / "output")
    again = train(world, tmp_path / "output", **{**STEPS, "stage2_steps": 4}, resume_from_checkpoint="latest")
    assert_same_ending(again, whole)


@pytest.mark.slow
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
    flags = {
        **STEPS,
        "train_data_dir": tmp_path / "data",
        "cache_dir": tmp_path / "cache",
        "dataloader_num_workers": 1,
    }
    again = train(world, tmp_path / "output", **flags, resume_from_checkpoint="latest")
    assert weights(again) == weights(whole)


def test_latest_without_a_checkpoint_starts_anew(world, whole_run, tmp_path):  # noqa: F811
    again = train(world, tmp_path / "output", **STEPS, resume_from_checkpoint="latest")
    assert results(again) == results(whole_run())


def test_latest_after_the_end_writes_the_same_lora(world, whole_run, tmp_path):  # noqa: F811
    again = Path(shutil.copytree(whole_run(), tmp_path / "output"))
    (again / WEIGHTS).unlink()
    train(world, again, **STEPS, resume_from_checkpoint="latest")
    assert results(again) == results(whole_run())


@pytest.mark.parametrize("resume", [None, "latest"])
def test_a_finished_lora_is_not_written_over(world, tmp_path, resume):  # noqa: F811
    """Also where no checkpoint tells of the run that made it."""
    output = train(world, tmp_path / "output", stage1_steps=1, stage2_steps=0)
    before = contents(output)
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(SystemExit, match=f"--output_dir {output} holds the {WEIGHTS} of an earlier run"):
        train(world, output, stage1_steps=1, stage2_steps=0, seed=5, resume_from_checkpoint=resume)
    assert contents(output) == before


def test_a_finished_lora_is_not_written_over_for_damaged_checkpoints(world, whole_run, tmp_path):  # noqa: F811
    output = Path(shutil.copytree(whole_run(), tmp_path / "output"))
    for folder in find_checkpoints(output):
        flip_a_byte(folder / STATE_TENSORS)
    with pytest.raises(SystemExit, match=f"--output_dir {output} holds the {WEIGHTS} of an earlier run"):
        train(world, output, **STEPS, resume_from_checkpoint="latest")


@pytest.mark.parametrize("came", ["LoRA", "checkpoint"])
def test_what_another_run_wrote_before_the_lock_is_seen(world, whole_run, tmp_path, monkeypatch, came):  # noqa: F811
    """It ended after this one had looked, and before this one kept others out."""
    output, keep = tmp_path / "output", script.lock_folder

    def finish_and_keep(*args):
        if came == "LoRA":
            output.mkdir()
            shutil.copy(whole_run() / WEIGHTS, output)
        else:
            copy_checkpoint(whole_run(), 2, output)
        return keep(*args)

    whole_run()
    monkeypatch.setattr(script, "lock_folder", finish_and_keep)
    message = f"--output_dir {output} holds the {WEIGHTS}|another run has written checkpoints meanwhile"
    with pytest.raises(SystemExit, match=message):
        train(world, output, **STEPS)


def test_two_runs_are_kept_out_of_one_folder(world, tmp_path, monkeypatch, forks):  # noqa: F811
    output, step, refused = tmp_path / "new" / "output", script.train_step, []

    def meanwhile(*args):
        refused.append(forks.start(make_flags(world, output)))
        assert refused[0].wait() == 1
        return step(*args)

    monkeypatch.setattr(script, "train_step", meanwhile)
    train(world, output, stage1_steps=1, stage2_steps=0)
    assert f"--output_dir {output}: another run is writing into it" in refused[0].last_line()
    assert not [name for name in files(output) if "lock" in name]


def test_a_run_that_ends_early_leaves_no_folder_that_it_made_for_nothing(world, tmp_path, monkeypatch):  # noqa: F811
    with pytest.raises(SystemExit, match="'diffusion' is"):
        train(world, tmp_path / "first" / "output", learning_rate=1e30, stage1_steps=4)
    assert files(tmp_path) == {f"first/output/{RUN_FILE}"}
    monkeypatch.setattr(script, "prepare", lambda *_: (tmp_path / "missing").stat())
    with pytest.raises(SystemExit, match="No such file"):
        train(world, tmp_path / "second" / "output")
    assert not (tmp_path / "second").exists()


def test_a_damaged_checkpoint_costs_its_steps_alone(world, whole_run, tmp_path, caplog):  # noqa: F811
    again = Path(shutil.copytree(whole_run(), tmp_path / "output"))
    for step in (4, 5):
        flip_a_byte(again / f"checkpoint-{step}" / STATE_TENSORS)
    train(world, again, **STEPS, resume_from_checkpoint="latest")
    assert "checkpoint-5 is damaged" in caplog.text and "checkpoint-4 is damaged" in caplog.text
    assert results(again) == results(whole_run()), "the damaged ones were not replaced"


def test_a_checkpoint_can_be_named(world, whole_run, tmp_path):  # noqa: F811
    """By its name in the output folder, or by its path, wherever the new run writes."""
    whole = whole_run()
    again = Path(shutil.copytree(whole, tmp_path / "first" / "output"))
    train(world, again, **STEPS, resume_from_checkpoint="checkpoint-3")
    assert results(again) == results(whole)
    AcceleratorState._reset_state(reset_partial_state=True)
    other = train(world, tmp_path / "second", **STEPS, resume_from_checkpoint=whole / "checkpoint-3")
    assert_same_ending(other, whole)
    assert [path.name for path in find_checkpoints(other)] == ["checkpoint-4", "checkpoint-5"]


@pytest.mark.parametrize("limit, kept", [(1, [5]), pytest.param(2, [4, 5], marks=pytest.mark.slow)])
def test_the_limit_of_checkpoints(world, whole_run, tmp_path, limit, kept):  # noqa: F811
    output = train(world, tmp_path / "output", **STEPS, checkpoints_total_limit=limit)
    assert [path.name for path in find_checkpoints(output)] == [f"checkpoint-{step}" for step in kept]
    assert_same_ending(output, whole_run())


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["composed", "both"])
def test_pictures_and_checkpoints_do_not_touch_the_training(world, whole_run, tmp_path, objective):  # noqa: F811
    options = {"stage2_objective": objective, "lora_dropout": 0.3}
    expected = weights(whole_run(**options))
    for name, changes in {
        "none": {"checkpointing_steps": 0},
        "pictures": {"num_validation_images": 1, "validation_steps": 1},
        "seldom": {"checkpointing_steps": 3},
    }.items():
        AcceleratorState._reset_state(reset_partial_state=True)
        output = train(world, tmp_path / name, **{**STEPS, **options, **changes})
        assert weights(output) == expected, name
        steps = [int(path.name.removeprefix("checkpoint-")) for path in find_checkpoints(output)]
        assert steps == {"pictures": [1, 2, 3, 4, 5], "seldom": [3]}.get(name, [])


def test_no_file_is_a_pickle(world, tmp_path):  # noqa: F811
    flags = {**STEPS, "num_validation_images": 1, "report_to": "tensorboard", "output_kohya_format": True}
    output = train(world, tmp_path / "output", **flags, cache_dir=tmp_path / "output" / "cache")
    assert {Path(name).suffix for name in files(output)} >= {".safetensors", ".json", ".png", ".md"}
    for name in files(output):
        # TensorBoard's own files among them.
        known = Path(name).suffix in (".safetensors", ".json", ".png", ".md", ".yml", ".yaml") or "tfevents" in name
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
        ("sfcm_timesteps", (500, 900), "None"),
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
    assert all(part in message for part in ("--resume_from_checkpoint", "checkpoint-3", "prompts or pictures")), (
        message
    )


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


# ------------------------------------------------------------------------------------- processes of their own


class Process:
    """The script in a process of its own, with one thread, and what it has written so far."""

    def __init__(self, flags: list[str], *launcher: str, **variables: str):
        self.popen = subprocess.Popen(
            [sys.executable, *launcher, str(SCRIPT), *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment(**variables),
            cwd=ROOT,
            start_new_session=True,
        )
        self.written = bytearray()
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self) -> None:
        # A pipe and no file: one would be limited with the files of the program.
        while block := os.read(self.popen.stdout.fileno(), 1 << 16):
            self.written += block

    @property
    def text(self) -> str:
        return self.written.decode(errors="replace")

    def wait_for(self, condition: Callable[[], bool], timeout: float = 240) -> None:
        """Until it is so, and fail if the program ends before."""
        end = time.monotonic() + timeout
        while not condition():
            assert self.popen.poll() is None and time.monotonic() < end, self.text
            time.sleep(0.002)

    def wait(self, timeout: float = 240) -> int:
        """Its exit status; a program that does not end is ended."""
        try:
            status = self.popen.wait(timeout)
            self.reader.join(timeout)
            return status
        finally:
            if self.popen.poll() is None:
                os.killpg(self.popen.pid, signal.SIGKILL)
                self.popen.wait()

    def last_line(self) -> str:
        return self.text.strip().splitlines()[-1]


LONG = {"stage1_steps": 40, "stage2_steps": 40, "checkpointing_steps": 1, "checkpoints_total_limit": 1}
# Where a signal finds the run: flags, when that is so, and the steps that may be done when it has stopped.
PLACES = {
    "first picture": (
        {**STEPS, "num_validation_images": 1, "validation_inference_steps": 200},
        lambda run, output: "steps of stage 1" in run.stderr,
        range(0, 1),
    ),
    "stage 1": (LONG, lambda run, output: (output / "checkpoint-2").is_dir(), range(2, 40)),
    "alignment portraits": (
        {**STEPS, "alignment_inference_steps": 200, "checkpointing_steps": 0},
        lambda run, output: "preparing generated alignment portraits" in run.stderr,
        range(BORDER, BORDER + 1),
    ),
    "stage 2": (LONG, lambda run, output: (output / "checkpoint-42").is_dir(), range(42, 80)),
    "validation picture": (
        {**STEPS, "num_validation_images": 1, "validation_inference_steps": 40, "validation_steps": 4},
        lambda run, output: (output / "checkpoint-4").is_dir(),
        range(4, 5),
    ),
}
# Each place with one of the signals, which are caught alike.
SIGNALS = dict(zip(PLACES, (signal.SIGTERM, signal.SIGINT) * 3, strict=False))


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
@pytest.mark.parametrize(
    "place", [pytest.param(place, marks=() if place == "validation picture" else pytest.mark.slow) for place in PLACES]
)
def test_a_signal_leaves_a_whole_checkpoint(world, whole_run, forks, tmp_path, place):  # noqa: F811
    (flags, arrived, steps), number = PLACES[place], SIGNALS[place]
    output = tmp_path / "output"
    run = forks.start(make_flags(world, output, **flags))
    run.wait_for(lambda: arrived(run, output))
    time.sleep(random.random() * 0.3 if place not in ("stage 1", "stage 2") else 0)
    os.kill(run.pids[0], number)
    assert run.wait() == 128 + number, run.stderr
    assert "Traceback" not in run.stderr

    checkpoints = find_checkpoints(output)
    step = int(checkpoints[-1].name.removeprefix("checkpoint-")) if checkpoints else 0
    total = flags["stage1_steps"] + flags["stage2_steps"]
    assert step in steps and f"{number.name} after step {step} of {total}: " in run.last_line()
    if step:
        assert f"--resume_from_checkpoint latest ({output})" in run.last_line()
        check_checkpoint(checkpoints[-1])
        stage = read_state(checkpoints[-1])["stage"]
        assert stage == (2 if step > flags["stage1_steps"] else 1)
    else:
        assert "start again" in run.last_line()
    if "picture" in place:
        assert not (output / "validation" / f"step_{step:06d}.png").exists(), "the signal came too late"
    assert not [name for name in files(output) if name.startswith(".") or "/." in name]
    assert not (output / WEIGHTS).exists()

    # Pictures are no matter for the weights, and take long here.
    without = ("num_validation_images", "validation_steps", "validation_inference_steps", "checkpointing_steps")
    flags = {**STEPS, **{name: value for name, value in flags.items() if name not in without}}
    train(world, output, **flags, resume_from_checkpoint="latest")
    assert_same_ending(output, whole_run(**flags))


def test_the_advice_names_a_checkpoint_that_is_there(world, whole_run, tmp_path, monkeypatch, caplog):  # noqa: F811
    """A run that came from elsewhere and was stopped before its first step has none in its own folder."""
    folder = whole_run() / f"checkpoint-{BORDER}"
    monkeypatch.setattr(script, "prepare_alignment", lambda *_: signal.raise_signal(signal.SIGTERM))
    with caplog.at_level(logging.WARNING), pytest.raises(SystemExit) as caught:
        train(world, tmp_path / "output", **STEPS, resume_from_checkpoint=folder)
    assert caught.value.code == 128 + signal.SIGTERM
    assert f"SIGTERM after step {BORDER} of {TOTAL}" in caplog.text
    assert f"--resume_from_checkpoint {folder} " in caplog.text and "latest" not in caplog.text


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
@pytest.mark.slow
def test_the_workers_that_read_pictures_do_not_take_the_run_down(world, whole_run, tmp_path):  # noqa: F811
    """A cluster, or Ctrl-C in a terminal, signals every process of the group."""
    flags = {**LONG, **PIXELS, "dataloader_num_workers": 2}
    output = tmp_path / "output"
    process = Process(make_flags(world, output, **flags))
    process.wait_for((output / "checkpoint-2").is_dir)
    os.killpg(process.popen.pid, signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM, process.text
    assert "Traceback" not in process.text and "after step" in process.last_line()
    check_checkpoint(find_checkpoints(output)[-1])


LAUNCHER = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")
TWO = {**LONG, "train_batch_size": 1}


@pytest.fixture(scope="module")
def whole_of_two(world, forks, tmp_path_factory) -> Path:  # noqa: F811
    """The undisturbed run of two processes."""
    output = tmp_path_factory.mktemp("two") / "output"
    run = forks.start(make_flags(world, output, **TWO), processes=2)
    assert run.wait() == 0, run.stderr
    return output


def assert_stopped_together(output: Path, text: str) -> None:
    """One message, one whole checkpoint of the step in it, and no process that missed another."""
    (message,) = [line for line in text.splitlines() if "after step" in line]
    (checkpoint,) = find_checkpoints(output)
    check_checkpoint(checkpoint)
    step = checkpoint.name.removeprefix("checkpoint-")
    assert f"SIGTERM after step {step} of 80" in message
    # A traceback of the launcher, which reports that its processes did not end with 0, has no line of the script.
    assert f'File "{SCRIPT}"' not in text, text
    assert "RuntimeError" not in text and "Connection" not in text, text
    assert not [name for name in files(output) if name.startswith(".") or "/." in name]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.slow
@pytest.mark.parametrize("to, stage", [("both", 2), ("first", 2), ("second", 1)])
def test_two_processes_stop_after_the_same_step(world, whole_of_two, forks, tmp_path, to, stage):  # noqa: F811
    """Whoever gets the signal; one that went on alone would fail in its next exchange with the other."""
    output = tmp_path / "output"
    run = forks.start(make_flags(world, output, **TWO), processes=2)
    run.wait_for((output / f"checkpoint-{2 if stage == 1 else 42}").is_dir)
    for pid in {"both": run.pids, "first": run.pids[:1], "second": run.pids[1:]}[to]:
        os.kill(pid, signal.SIGTERM)
    assert run.wait() == 128 + signal.SIGTERM, run.stderr
    assert_stopped_together(output, run.stderr)
    again = forks.start(make_flags(world, output, **TWO, resume_from_checkpoint="latest"), processes=2)
    assert again.wait() == 0, again.stderr
    assert_same_ending(output, whole_of_two)


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
@pytest.mark.slow
def test_two_processes_stop_with_their_launcher(world, tmp_path):  # noqa: F811
    output = tmp_path / "output"
    process = Process(make_flags(world, output, **TWO), *LAUNCHER, ACCELERATE_USE_CPU="true")
    process.wait_for((output / "checkpoint-2").is_dir)
    process.popen.send_signal(signal.SIGTERM)
    assert process.wait() != 0
    assert_stopped_together(output, process.text)


# --------------------------------------------------------------------------------------------------- full disks


ONLY_LORA = {"checkpointing_steps": 0}
# What cannot be written, with which flags, and whether a checkpoint is there by then.
FULL = {
    "checkpoint": ({"checkpointing_steps": 3}, 8000, 2),
    "first checkpoint": ({}, 8000, 0),
    "LoRA of stage 1": (ONLY_LORA, 8000, 0),
    "LoRA of stage 1, checkpoint": (ONLY_LORA, 8000, 2),
    "LoRA": ({"stage2_steps": 0, **ONLY_LORA}, 8000, 0),
    "LoRA, checkpoint": ({"stage2_steps": 0, **ONLY_LORA}, 8000, 2),
    "first picture": ({"num_validation_images": 1}, 8000, 0),
    "last picture": ({"stage2_steps": 0, "num_validation_images": 1, **ONLY_LORA}, 20_000, 2),
    "latents": ({"cache_dir": "cache"}, 100, 0),
    "what was asked for": ({}, 100, 0),
}


@pytest.mark.skipif(sys.platform == "win32", reason="no such limits")
@pytest.mark.parametrize(
    "what", [pytest.param(name, marks=() if name == "checkpoint" else pytest.mark.slow) for name in FULL]
)
def test_a_full_disk_ends_the_program_with_one_line(world, whole_run, forks, tmp_path, what):  # noqa: F811
    changes, size, step = FULL[what]
    if "cache_dir" in changes:
        changes = {"cache_dir": tmp_path / "cache"}
    output, flags = tmp_path / "output", {**STEPS, **changes}
    if step:
        copy_checkpoint(whole_run(), step, output)
        flags["resume_from_checkpoint"] = "latest"
    run = forks.start(make_flags(world, output, **flags), largest_file=size)
    assert run.wait() == 1, run.stderr
    line = run.last_line()
    assert "Traceback" not in run.stderr and line.startswith("train_spf_portrait_lora.py: error: "), run.stderr
    assert "File too large" in line
    if what == "last picture":
        assert line.endswith(f"; {output / WEIGHTS} is whole")
        assert weights(output) == weights(whole_run(stage2_steps=0))
    elif step:
        assert line.endswith(f"; {output / f'checkpoint-{step}'} is whole, and the run can go on from it")
    else:
        assert line.endswith("; there is no earlier checkpoint") and ("--cache_dir" in line) == (what == "latents")
    for checkpoint in find_checkpoints(output):
        check_checkpoint(checkpoint)
    assert [path.name for path in find_checkpoints(output)] == ([f"checkpoint-{step}"] if step else [])
    assert not [name for name in files(tmp_path) if name.startswith(".") or "/." in name]

    flags = {**STEPS, **changes, "num_validation_images": 0, "checkpointing_steps": 1}
    train(world, output, **flags, resume_from_checkpoint="latest")
    assert_same_ending(output, whole_run(**({"stage2_steps": 0} if "stage2_steps" in changes else {})))


# -------------------------------------------------------------------------------------------------------- kills


class KillRuns(NamedTuple):
    """How many runs are killed, on which toy base, in which precision, with portraits how large."""

    count: int
    base: str
    precision: str
    resolution: int


# In bf16, which most CPUs are slow at, few of small portraits.
KILL_RUNS = {
    "float32": KillRuns(20, "sd", "no", 64),
    "bf16": KillRuns(4, "sd", "bf16", 32),
    "SD3": KillRuns(6, "sd3", "no", 64),
}
# The first of them, whose kills wait for a checkpoint, or a LoRA, that is being written.
AIMED = {number: "checkpoint" for number in range(8)} | {number: "LoRA" for number in (8, 9)}
TOY_STEPS = 6  # of each stage


def toy_flags(output: Path, kind: str) -> list[str]:
    """The toy's default, with few and small steps."""
    _, base, precision, resolution = KILL_RUNS[kind]
    small = {
        "mixed_precision": precision,
        "resolution": resolution,
        "stage1_steps": TOY_STEPS,
        "stage2_steps": TOY_STEPS,
        "checkpointing_steps": 1,
        "checkpoints_total_limit": 2,
        "train_batch_size": 2,
        "max_train_samples": 8,
        "num_alignment_images": 4,
        "alignment_inference_steps": 2,
        "sfcm_noise_samples": 1,
        "num_validation_images": 0,
        "report_to": "none",
        "output_dir": output,
        "resume_from_checkpoint": "latest",
    }
    return [*training_flags("red_hat", base), *(f"--{name}={value}" for name, value in small.items())]


@pytest.fixture(scope="module")
def undisturbed(forks, tmp_path_factory, worker_id) -> Callable[[str], SimpleNamespace]:
    """The run of a kind that nobody kills, and how long it took; one for all processes of tests."""

    def own(kind: str) -> SimpleNamespace:
        base = tmp_path_factory.getbasetemp()
        shared = (base if worker_id == "master" else base.parent) / f"kills-{kind}"
        shared.mkdir(exist_ok=True)
        with FileLock(shared / "lock"):
            if not (shared / "seconds").exists():
                started = time.monotonic()
                run = forks.start(toy_flags(shared / "output", kind))
                assert run.wait() == 0, run.stderr
                (shared / "seconds").write_text(str(time.monotonic() - started))
        seconds = float((shared / "seconds").read_text())
        return SimpleNamespace(shared=shared, output=shared / "output", seconds=seconds)

    return own


def unfinished(output: Path, what: str) -> list[str]:
    """Hidden folders of a checkpoint that is being written or deleted, or of a LoRA that is no checkpoint's."""
    found = []
    for folder in (output,) if what == "checkpoint" else (output, output / "stage1"):
        try:
            found += os.listdir(folder)
        except FileNotFoundError:
            continue
    start = HIDDEN_PREFIX + (WEIGHTS if what == "LoRA" else "checkpoint-")
    return [name for name in found if name.startswith(start)]


def wait_for_a_write(run: Run, output: Path, what: str, skip: int, delay: float) -> None:
    """Until one is being written or deleted for the `skip + 1`-th time, and a moment more."""
    seen, present = 0, False
    while not run.ended():
        now = bool(unfinished(output, what))
        if now and not present:
            seen += 1
            if seen > skip:
                time.sleep(delay)
                return
        present = now


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, number", [(kind, number) for kind, runs in KILL_RUNS.items() for number in range(runs.count)]
)
def test_a_killed_run_ends_as_if_it_had_not_been(undisturbed, forks, tmp_path, kind, number):
    """SIGKILL at any time, up to three times, and again with the same command each time."""
    reference = undisturbed(kind)
    chance, output = random.Random(number), tmp_path / "output"
    aim = AIMED.get(number) if kind == "float32" else None
    facts = {"kills": 0, "in a checkpoint": 0, "in a LoRA": 0, "anew": 0, "stage 1": 0, "border": 0, "stage 2": 0}
    wanted = chance.randint(1, 3)

    def missed(facts: dict[str, int]) -> bool:
        return aim is not None and facts[f"in a {aim}"] == 0

    for attempt in range(30):
        run = forks.start(toy_flags(output, kind))
        # Also after the kills that were wanted, if no run was hit as it should be.
        kill = facts["kills"] < wanted or missed(facts)
        if kill and aim is not None:
            # Of a dozen checkpoints at first, and of what may be left later on.
            skip = chance.randint(0, 1 if aim == "LoRA" else 10 if attempt == 0 else 2)
            wait_for_a_write(run, output, aim, skip, chance.random() * (0.003 if aim == "checkpoint" else 0.001))
        elif kill:
            # Most of them when there may be a checkpoint: a third of a run goes by until there is one.
            first, last = (0.35, 0.95) if attempt == 0 else (0.3, 0.6)
            place = chance.uniform(0.0 if chance.random() < 0.25 else first, last)
            end = time.monotonic() + place * reference.seconds
            while time.monotonic() < end and not run.ended():
                time.sleep(0.001)
        if kill and not run.ended():
            os.kill(run.pids[0], signal.SIGKILL)
        status = run.wait()
        found = re.search(r"Going on from .*checkpoint-(\d+)", run.stderr)
        if attempt:
            step = int(found[1]) if found else 0
            place = "anew" if step == 0 else "border" if step == TOY_STEPS else f"stage {1 + (step > TOY_STEPS)}"
            facts[place] += 1
        if status == -signal.SIGKILL:
            facts["kills"] += 1
            facts["in a checkpoint"] += bool(unfinished(output, "checkpoint"))
            facts["in a LoRA"] += bool(unfinished(output, "LoRA"))
            continue
        assert status == 0, run.stderr
        if facts["kills"] == 0 or missed(facts):
            shutil.rmtree(output)  # it was faster than the kill
            continue
        break
    assert facts["kills"] and not missed(facts), facts
    assert results(output) == results(reference.output)
    record(reference.shared / "runs.json", number, facts, KILL_RUNS[kind].count)


def record(path: Path, number: int, facts: dict[str, int], wanted: int) -> None:
    """Print what became of a run, and the sums when all are there."""
    with FileLock(f"{path}.lock"):
        runs = json.loads(path.read_text()) if path.exists() else {}
        runs[str(number)] = facts
        path.write_text(json.dumps(runs))
    print(f"\nrun {number}: {facts}")
    if len(runs) == wanted:
        total = {name: sum(run[name] for run in runs.values()) for name in facts}
        print(f"{len(runs)} of {wanted} runs ended alike: {total}")
