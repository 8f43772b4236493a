"""Tests of `training/checkpoints.py`: states through files to the bit, and folders that are whole or not there."""

import json
import logging
import math
import os
import stat
import struct
import sys
from collections import OrderedDict, namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from programs.writing import find_checkpoints
from training import checkpoints
from training.checkpoints import (
    LOCK,
    MANIFEST,
    STATE_TENSORS,
    STATE_VALUES,
    CheckpointError,
    check_checkpoint,
    latest_checkpoint,
    lock_folder,
    pack_state,
    read_state,
    remove_leftovers,
    save_checkpoint,
    unpack_state,
    what_is_safe,
)


ROOT = Path(__file__).resolve().parents[2]
LORA = "lora.safetensors"


def write_lora(folder: Path) -> None:
    save_file({"weight": torch.arange(4.0)}, folder / LORA)


def save(output_dir: Path, step: int, **options) -> Path:
    """A small checkpoint whose state says which it is."""
    state = {"step": step, "weight": torch.full((3,), float(step))}
    return save_checkpoint(output_dir, step, state, write_lora, **options)


def names(folder: Path) -> list[str]:
    """All there is in a folder, hidden or not."""
    return sorted(path.name for path in folder.iterdir())


def bits(value) -> object:
    """A nested state in a form in which equality is equality of types and bits."""
    if isinstance(value, torch.Tensor):
        content = bytes(value.detach().contiguous().reshape(-1).view(torch.uint8).tolist())
        return ("tensor", str(value.dtype), tuple(value.shape), content)
    if isinstance(value, dict):
        return ("dict", [(bits(key), bits(item)) for key, item in value.items()])
    if isinstance(value, list | tuple):
        return (type(value).__name__, [bits(item) for item in value])
    if isinstance(value, float):
        return ("float", "nan" if math.isnan(value) else struct.pack("<d", value))
    return (type(value).__name__, value)


def through_files(state: dict, folder: Path) -> dict:
    return read_state(save_checkpoint(folder, 1, state, write_lora))


# -------------------------------------------------------------------------------------------------- nested states


BASE_TENSOR = torch.linspace(-1, 1, 12)
STATES = {
    "ints as keys": {0: 1, 10: {2: "two"}, -3: None},
    "keys of several types": {"0": 1, 0: 2, 1.5: 3, None: 4, "": 5},
    "truth values as keys": {True: 1, False: 0},
    "tuples as keys": {(1, "two"): 3, (): (4,)},
    "tuples": {"betas": (0.9, 0.999), "nested": ((), [(), [(1,)]]), "list": [1, 2]},
    "floats": [0.1, 1e-320, -0.0, 1.7976931348623157e308, math.inf, -math.inf, math.nan, 1 / 3],
    "numbers": [True, 1, 1.0, 2**70, -1],
    "texts": {"text": "é\n\0\u2028 \ud800", "": ""},
    "empty": [{}, [], (), ""],
    "words that the format uses": {"tensor": "state.tensor", "dict": [["a", 1]], "list": {"tuple": []}},
    "no dimension": torch.tensor(3.25),
    "no element": {"a": torch.zeros(0), "b": torch.zeros(2, 0, 3, dtype=torch.int64)},
    "not finite": torch.tensor([math.nan, math.inf, -math.inf, -0.0]),
    "bfloat16": torch.tensor([0.1, -3e38, math.nan], dtype=torch.bfloat16),
    "half": torch.tensor([[0.1], [6e-8]], dtype=torch.float16),
    "double": torch.tensor([0.1], dtype=torch.float64),
    "integers": [torch.tensor([2**40], dtype=torch.int64), torch.tensor([255], dtype=torch.uint8), torch.tensor(True)],
    "shared memory": {
        "all": BASE_TENSOR,
        "same": BASE_TENSOR,
        "part": BASE_TENSOR[3:7],
        "view": BASE_TENSOR.view(3, 4),
    },
    "not contiguous": [BASE_TENSOR.view(3, 4).t(), BASE_TENSOR[::2], torch.ones(1).expand(3, 3)],
    "parameter": torch.nn.Parameter(torch.ones(2)),
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_goes_through_files_to_the_bit(tmp_path, name):
    state = {"state": STATES[name]}
    assert bits(through_files(state, tmp_path)) == bits(state)


@pytest.mark.parametrize(
    "state",
    [
        {0: torch.tensor(0.0), "0": torch.tensor(1.0)},
        {"a": {"b": torch.tensor(0.0)}, "a.b": torch.tensor(1.0)},
        {"a": [torch.tensor(0.0)], "a.0": torch.tensor(1.0)},
        {"a": [torch.tensor(0.0)], "": [{"a.0": torch.tensor(1.0)}]},
    ],
)
def test_tensors_of_the_same_path_are_two_tensors(state):
    """A path alone does not tell a key with a dot from two keys, nor a number from its text."""
    tensors = {}
    packed = json.loads(json.dumps(pack_state(state, tensors)))
    assert bits(unpack_state(packed, tensors)) == bits(state)


def test_what_was_packed_is_a_copy():
    state, tensors = {"a": torch.zeros(2)}, {}
    packed = pack_state(state, tensors)
    state["a"] += 1
    assert unpack_state(packed, tensors)["a"].tolist() == [0, 0]


def test_ordered_and_named_kinds_come_back_as_plain_ones():
    Point = namedtuple("Point", "x y")
    state = {"dict": OrderedDict(b=1, a=2), "point": Point(1, 2), "size": torch.zeros(2, 3).shape}
    tensors = {}
    again = unpack_state(json.loads(json.dumps(pack_state(state, tensors))), tensors)
    assert bits(again) == bits({"dict": {"b": 1, "a": 2}, "point": (1, 2), "size": (2, 3)})


@pytest.mark.parametrize(
    "value, kind", [({1, 2}, "set"), (len, "builtin_function_or_method"), (1j, "complex"), (b"", "bytes")]
)
def test_what_a_checkpoint_cannot_hold_is_named(value, kind):
    with pytest.raises(TypeError, match=rf"state\.a\.1 is a {kind}"):
        pack_state({"a": [0, value]}, {})


def test_a_key_that_would_come_back_as_another_is_refused():
    with pytest.raises(TypeError, match=r"state\.a\.b'' is a bytes"):
        pack_state({"a": {b"": 3}}, {})


def make_adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.01)


def make_prodigy(parameters):
    prodigy = pytest.importorskip("prodigyopt").Prodigy
    return prodigy(parameters, lr=1.0, use_bias_correction=True, safeguard_warmup=True)


def make_adamw_8bit(parameters):
    return pytest.importorskip("bitsandbytes").optim.AdamW8bit(parameters, lr=0.01)


def make_adamw_8bit_with_a_small_limit(parameters):
    """Tensors above the limit have their state in 8 bits indeed; the package's own limit is 4096 elements."""
    return pytest.importorskip("bitsandbytes").optim.AdamW8bit(parameters, lr=0.01, min_8bit_size=16)


@pytest.mark.parametrize(
    "make", [make_adamw, make_prodigy, make_adamw_8bit, make_adamw_8bit_with_a_small_limit], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("schedule", ["constant_with_warmup", "cosine", "polynomial"])
def test_training_goes_on_to_the_bit(tmp_path, make, schedule):
    """With the optimizer and the learning rate as they come from a file; without them it would not."""
    from diffusers.optimization import get_scheduler

    def build():
        torch.manual_seed(0)
        # 64 x 80 is a multiple of the blocks that 8 bits are kept in, and 7 is none.
        model = torch.nn.Sequential(torch.nn.Linear(80, 64), torch.nn.Linear(64, 7))
        optimizer = make(list(model.parameters()))
        return model, optimizer, get_scheduler(schedule, optimizer, num_warmup_steps=2, num_training_steps=8)

    def step(model, optimizer, scheduler, number):
        inputs = torch.randn(4, 80, generator=torch.Generator().manual_seed(number))
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()

    whole = build()
    for number in range(3):
        step(*whole, number)
    weights = {name: value.clone() for name, value in whole[0].state_dict().items()}
    state = {"optimizer": whole[1].state_dict(), "scheduler": whole[2].state_dict()}
    state = through_files(state, tmp_path)
    for number in range(3, 6):
        step(*whole, number)

    def go_on(take_state: bool):
        model, optimizer, scheduler = build()
        model.load_state_dict(weights)
        if take_state:
            optimizer.load_state_dict(state["optimizer"])
            scheduler.load_state_dict(state["scheduler"])
        for number in range(3, 6):
            step(model, optimizer, scheduler, number)
        return model, optimizer

    model, optimizer = go_on(True)
    assert bits(model.state_dict()) == bits(whole[0].state_dict())
    assert bits(optimizer.state_dict()) == bits(whole[1].state_dict())
    assert bits(go_on(False)[0].state_dict()) != bits(whole[0].state_dict())


# ------------------------------------------------------------------------------------------------- whole or damaged


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


DAMAGES = {
    "truncated tensors": lambda folder: os.truncate(folder / STATE_TENSORS, 40),
    "truncated LoRA": lambda folder: os.truncate(folder / LORA, 0),
    "flipped tensor": lambda folder: flip_a_byte(folder / STATE_TENSORS),
    "flipped LoRA": lambda folder: flip_a_byte(folder / LORA),
    "flipped value": lambda folder: flip_a_byte(folder / STATE_VALUES),
    "longer": lambda folder: (folder / LORA).open("ab").write(b"\0"),
    "no tensors": lambda folder: (folder / STATE_TENSORS).unlink(),
    "no LoRA": lambda folder: (folder / LORA).unlink(),
    "no manifest": lambda folder: (folder / MANIFEST).unlink(),
    "empty manifest": lambda folder: (folder / MANIFEST).write_text(""),
    "manifest cut short": lambda folder: os.truncate(folder / MANIFEST, 60),
    "manifest of nothing": lambda folder: (folder / MANIFEST).write_text("{}"),
    "manifest of no files": lambda folder: (folder / MANIFEST).write_text('{"step": 1, "files": {}}'),
    "manifest without the state": lambda folder: forget(folder, STATE_VALUES),
    "manifest is a list": lambda folder: (folder / MANIFEST).write_text("[]"),
    "manifest is a number": lambda folder: (folder / MANIFEST).write_text("1"),
    "manifest of null": lambda folder: (folder / MANIFEST).write_text("null"),
    "files is a list": lambda folder: (folder / MANIFEST).write_text('{"files": ["a"]}'),
    "a file is a text": lambda folder: (folder / MANIFEST).write_text('{"files": {"a": "b"}}'),
    "manifest is no text": lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe\0"),
    "manifest is a folder": lambda folder: ((folder / MANIFEST).unlink(), (folder / MANIFEST).mkdir()),
    "a file is a folder": lambda folder: ((folder / LORA).unlink(), (folder / LORA).mkdir()),
    "empty folder": lambda folder: [path.unlink() for path in folder.iterdir()],
}


def forget(folder: Path, name: str) -> None:
    """A manifest that does not speak of one file, which is gone."""
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["files"][name]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    (folder / name).unlink()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_with_a_warning(tmp_path, caplog, damage):
    whole, newest = save(tmp_path, 1), save(tmp_path, 2)
    assert latest_checkpoint(tmp_path) == newest and not caplog.records
    DAMAGES[damage](newest)
    with pytest.raises(ValueError) as caught:
        check_checkpoint(newest)
    assert str(newest) in str(caught.value) and "\n" not in str(caught.value)
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(tmp_path) == whole
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert str(newest) in caplog.text
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"], "a warning is all that a damaged checkpoint causes"


def test_every_byte_counts(tmp_path):
    """Not a sample: each byte of each file that a manifest speaks of, changed."""
    folder = save(tmp_path, 1)
    for name in (STATE_TENSORS, STATE_VALUES, LORA):
        content = (folder / name).read_bytes()
        for i in range(len(content)):
            (folder / name).write_bytes(content[:i] + bytes([content[i] ^ 0x80]) + content[i + 1 :])
            with pytest.raises(ValueError, match=name):
                check_checkpoint(folder)
        (folder / name).write_bytes(content)
    check_checkpoint(folder)


def test_all_damaged_is_none(tmp_path, caplog):
    for step in (1, 2):
        (save(tmp_path, step) / MANIFEST).unlink()
    assert latest_checkpoint(tmp_path) is None
    assert len(caplog.records) == 2
    assert what_is_safe(tmp_path) == "there is no earlier checkpoint"


def test_checkpoints_are_ordered_by_number_and_others_are_left_alone(tmp_path):
    for step in (10, 9, 100):
        save(tmp_path, step)
    for name in ("checkpoint-best", "checkpoint-", "checkpoint-7-old", "my-checkpoint-900", "checkpoint--1"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-200").write_text("a file is no checkpoint")
    assert [path.name for path in find_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]
    assert latest_checkpoint(tmp_path).name == "checkpoint-100"
    save(tmp_path, 101, total_limit=1)
    assert [path.name for path in find_checkpoints(tmp_path)] == ["checkpoint-101"]
    kept = {"checkpoint-best", "checkpoint-", "checkpoint-7-old", "my-checkpoint-900", "checkpoint--1"}
    assert set(names(tmp_path)) == {*kept, "checkpoint-101", "checkpoint-200"}


def test_no_folder_has_no_checkpoints(tmp_path):
    assert find_checkpoints(tmp_path / "none") == [] and latest_checkpoint(tmp_path / "none") is None
    remove_leftovers(tmp_path / "none")


# --------------------------------------------------------------------------------------------------------- writing


def test_a_checkpoint_holds_no_pickle(tmp_path):
    folder = save(tmp_path / "new" / "output", 3)
    assert folder == tmp_path / "new" / "output" / "checkpoint-3"
    assert names(folder) == sorted([LORA, MANIFEST, STATE_TENSORS, STATE_VALUES])
    assert names(folder.parent) == ["checkpoint-3"]
    assert all(path.read_bytes()[:1] != b"\x80" and path.read_bytes()[:2] != b"PK" for path in folder.iterdir())
    assert bits(read_state(folder)) == bits({"step": 3, "weight": torch.full((3,), 3.0)})


def test_the_manifest_counts_every_file(tmp_path):
    manifest = json.loads((save(tmp_path, 3) / MANIFEST).read_text())
    assert manifest["step"] == 3 and set(manifest["files"]) == {LORA, STATE_TENSORS, STATE_VALUES}


@pytest.mark.parametrize("limit, kept", [(None, [1, 2, 3, 4]), (1, [4]), (2, [3, 4]), (10, [1, 2, 3, 4])])
def test_the_limit_keeps_the_newest(tmp_path, limit, kept):
    for step in range(1, 5):
        save(tmp_path, step, total_limit=limit)
    assert names(tmp_path) == [f"checkpoint-{step}" for step in kept]


def test_the_checkpoint_just_written_is_never_the_one_that_goes(tmp_path):
    """A run can go on from an earlier checkpoint than its last, and then those of the first way are ahead of it."""
    for step in (1, 2, 5):
        save(tmp_path, step)
    place = save(tmp_path, 3, total_limit=2)
    assert place.is_dir() and names(tmp_path) == ["checkpoint-3", "checkpoint-5"]
    place = save(tmp_path, 4, total_limit=1)
    assert place.is_dir() and names(tmp_path) == ["checkpoint-4"]


def test_older_ones_go_only_when_the_new_one_is_in_place(tmp_path, monkeypatch):
    old = save(tmp_path, 1)
    removed, remove = [], checkpoints._delete

    def watched(folder):
        check_checkpoint(tmp_path / "checkpoint-2")
        removed.append(folder)
        remove(folder)

    monkeypatch.setattr(checkpoints, "_delete", watched)
    save(tmp_path, 2, total_limit=1)
    assert removed == [old] and names(tmp_path) == ["checkpoint-2"]


def test_a_removed_checkpoint_is_never_seen_half(tmp_path, monkeypatch):
    """A kill in the middle of a deletion leaves a hidden folder."""
    folder = save(tmp_path, 1)
    monkeypatch.setattr(checkpoints.shutil, "rmtree", lambda path: (path / MANIFEST).unlink())
    checkpoints._delete(folder)
    (left,) = names(tmp_path)
    assert left.startswith(".saving-") and find_checkpoints(tmp_path) == []
    monkeypatch.undo()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize("damage", [None, "no manifest"])
def test_what_is_at_the_place_is_replaced(tmp_path, damage):
    folder = save(tmp_path, 2)
    (folder / "more").write_text("of an earlier run")
    if damage is not None:
        DAMAGES[damage](folder)
    again = save_checkpoint(tmp_path, 2, {"value": "new"}, write_lora)
    assert again == folder and names(tmp_path) == ["checkpoint-2"]
    check_checkpoint(folder)
    assert read_state(folder) == {"value": "new"} and not (folder / "more").exists()


def test_leftovers_go_and_all_else_stays(tmp_path):
    save(tmp_path, 1)
    for name in (".saving-checkpoint-1", ".saving-123"):
        (tmp_path / name).mkdir()
        write_lora(tmp_path / name)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [".hidden", "checkpoint-1", "checkpoint-best"]
    check_checkpoint(tmp_path / "checkpoint-1")


def test_everything_is_on_the_disk_before_it_is_in_place(tmp_path, monkeypatch):
    """After a power cut a renamed folder could else lack files, and the older checkpoints are gone by then."""
    events, fsync, replace = [], os.fsync, os.replace

    def watched_fsync(descriptor):
        events.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def watched_replace(source, target):
        events.append("rename")
        replace(source, target)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc to tell a descriptor's path")
    monkeypatch.setattr(checkpoints.os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    save(tmp_path, 1)
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    hidden = before[-1]
    assert set(before) == {f"{hidden}/{name}" for name in (LORA, MANIFEST, STATE_TENSORS, STATE_VALUES)} | {hidden}
    assert before[-2] == f"{hidden}/{MANIFEST}" and after == [str(tmp_path)]


# ------------------------------------------------------------------------------------------- what Windows does not do


@pytest.mark.skipif(sys.platform == "win32", reason="there the system itself checks this")
def test_files_are_synced_by_handles_that_may_write(tmp_path, monkeypatch):
    import fcntl

    modes, fsync = {}, os.fsync

    def watched_fsync(descriptor):
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        modes.setdefault(is_folder, set()).add(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE)
        fsync(descriptor)

    monkeypatch.setattr(checkpoints.os, "fsync", watched_fsync)
    save(tmp_path, 1)
    assert modes == {False: {os.O_RDWR}, True: {os.O_RDONLY}}


def test_a_state_that_was_read_holds_no_file(tmp_path):
    """Windows deletes no file that is mapped into memory."""
    if not Path("/proc/self/maps").is_file():
        pytest.skip("needs /proc to tell what is mapped")
    folder = save_checkpoint(tmp_path, 1, {"weight": torch.ones(100_000)}, write_lora)
    state = read_state(folder)
    assert str(folder) not in Path("/proc/self/maps").read_text() and state["weight"].sum() == 100_000


@pytest.mark.parametrize("gone", ["lock", "folder"])
def test_a_lock_that_is_gone_hides_no_error(tmp_path, gone):
    folder = tmp_path / "a" / "b"
    with pytest.raises(ZeroDivisionError), lock_folder(folder):
        (folder / LOCK).unlink()
        if gone == "folder":
            folder.rmdir()
        raise ZeroDivisionError
    assert names(tmp_path) == []
    with lock_folder(folder):
        assert (folder / LOCK).exists()


def test_what_cannot_be_deleted_is_said_and_nothing_is_lost(tmp_path, monkeypatch, caplog):
    def refuse(folder, **kwargs):
        raise PermissionError(13, "The process cannot access the file because it is being used", str(folder))

    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "shutil", SimpleNamespace(rmtree=refuse))
        folder = save_checkpoint(tmp_path, 2, {"value": 2}, write_lora, total_limit=1)
        assert "checkpoint-1 could not be deleted" in caplog.text
        caplog.clear()
        remove_leftovers(tmp_path)
        assert f".saving-{os.getpid()}-checkpoint-1 could not be deleted" in caplog.text
    check_checkpoint(folder)
    assert find_checkpoints(tmp_path) == [folder]
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["checkpoint-2"]


# ---------------------------------------------------------------------------------------------- a write that fails


# Which file grows too large: elements of the LoRA and of the state's tensor, and numbers beside them.
TOO_LARGE = {"the LoRA": (5000, 10, 10), "the tensors": (10, 5000, 10), "the values": (10, 10, 5000)}


def write_under_limit(output_dir: Path, sizes: tuple[int, int, int]) -> None:
    """Where files cannot grow above 8 kB, by the kernel's own limit; Python ignores the signal."""
    resource = pytest.importorskip("resource", reason="no such limits")
    lora_size, state_size, values = sizes
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        save_checkpoint(
            output_dir,
            2,
            {"weight": torch.zeros(state_size), "values": list(range(values))},
            lambda folder: save_file({"weight": torch.zeros(lora_size)}, folder / LORA),
            total_limit=1,
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("which", TOO_LARGE)
@pytest.mark.parametrize("earlier", [True, False])
def test_a_write_that_fails_half_way_leaves_what_there_was(tmp_path, which, earlier):
    if earlier:
        save(tmp_path, 1)
    with pytest.raises(CheckpointError) as error:
        write_under_limit(tmp_path, TOO_LARGE[which])
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"{tmp_path / 'checkpoint-2'} could not be written: ") and "File too large" in message
    if earlier:
        assert message.endswith(f"; {tmp_path / 'checkpoint-1'} is whole, and the run can go on from it")
        check_checkpoint(tmp_path / "checkpoint-1")
    else:
        assert message.endswith("; there is no earlier checkpoint")
    assert names(tmp_path) == (["checkpoint-1"] if earlier else [])


def test_under_the_limit_the_same_write_works(tmp_path):
    """What the tests above ascribe to the limit is due to it."""
    save(tmp_path, 1)
    write_under_limit(tmp_path, (10, 10, 10))
    assert names(tmp_path) == ["checkpoint-2"]


def test_an_output_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError) as caught:
        save(tmp_path / "file" / "output", 1)
    assert str(tmp_path / "file" / "output" / "checkpoint-1") in str(caught.value)
    assert "there is no earlier checkpoint" in str(caught.value)


def test_a_failure_is_one_line(tmp_path):
    def fail(folder):
        raise OSError("first\n  second")

    with pytest.raises(CheckpointError, match="could not be written: first second; there is no earlier"):
        save_checkpoint(tmp_path, 1, {}, fail)
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_what_is_no_failure_of_writing_passes_and_leaves_nothing(tmp_path, error):
    def fail(folder):
        write_lora(folder)
        raise error

    with pytest.raises(error):
        save_checkpoint(tmp_path, 1, {}, fail)
    assert names(tmp_path) == []
