"""Checkpoints of a training run: folders that are whole or not there at all, and no pickle in them. [ours]

A checkpoint's manifest holds the size and the hash of every file, so that a damaged one is told from a whole one.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from huggingface_hub.utils.sha import sha_fileobj
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from programs.writing import HIDDEN_PREFIX, find_checkpoints, whole
from training.flag_rules import refuse


logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STATE_TENSORS, STATE_VALUES = "training_state.safetensors", "training_state.json"
LOCK = ".lock"


class CheckpointError(OSError):
    """An output folder could not be written into; the message is one line that says what is safe."""


@contextmanager
def saying_what_is_safe(place: Path, output_dir: Path) -> Iterator[None]:
    """Inside, a CheckpointError says that a place could not be written, and what there is to go on from."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        message = f"{place} could not be written: {' '.join(str(error).split())}; {what_is_safe(output_dir)}"
        raise CheckpointError(message) from error


def pack_state(state: Any, tensors: dict[str, torch.Tensor], path: str = "state") -> Any:
    """Take the tensors out of a nested state, and make what is left of it JSON, from which it can be built again.

    Args:
        state: dicts, lists, tuples, tensors, texts, numbers, booleans and None; a TypeError names all else.
        tensors: filled with copies on the CPU, each under a name of its own that tells its path in the state.
    """
    if isinstance(state, torch.Tensor):
        # A copy: safetensors refuses tensors that share memory, as the views of one optimizer buffer do.
        name = path
        while name in tensors:  # 0 and "0" have one path, and so have a key with a dot and two keys
            name += "'"
        tensors[name] = state.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(state, dict):
        own = {key: f"{path}.{key}" for key in state}
        return {"dict": [[pack_state(key, {}, own[key]), pack_state(state[key], tensors, own[key])] for key in state]}
    if isinstance(state, list | tuple):
        items = [pack_state(value, tensors, f"{path}.{i}") for i, value in enumerate(state)]
        return {"list" if isinstance(state, list) else "tuple": items}
    if state is None or isinstance(state, bool | int | float | str):
        return state
    raise TypeError(f"{path} is a {type(state).__name__}, which a checkpoint cannot hold")


def unpack_state(packed: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The state that `pack_state` took apart."""
    if not isinstance(packed, dict):
        return packed
    ((kind, value),) = packed.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {unpack_state(key, tensors): unpack_state(item, tensors) for key, item in value}
    items = [unpack_state(item, tensors) for item in value]
    return tuple(items) if kind == "tuple" else items


def save_checkpoint(
    output_dir: Path, step: int, state: dict[str, Any], write_lora: Callable[[Path], object],
    total_limit: int | None = None,
) -> Path:  # fmt: skip
    """Write `checkpoint-<step>`, whole or not at all, and then delete the oldest ones above the limit.

    Args:
        state: all that the run needs to go on, see `pack_state`.
        write_lora: writes the LoRA into the folder it is given.
        total_limit: checkpoints to keep, at least 1; None keeps all.

    Raises CheckpointError: it could not be written, for instance because the disk is full; what there was before is
        untouched.
    """
    place = output_dir / f"checkpoint-{step}"
    with saying_what_is_safe(place, output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
        with whole(place) as folder:
            folder.mkdir()
            write_lora(folder)
            tensors: dict[str, torch.Tensor] = {}
            packed = pack_state(state, tensors)
            save_file(tensors, folder / STATE_TENSORS)
            (folder / STATE_VALUES).write_text(json.dumps(packed), encoding="utf-8")
            _write_manifest(folder, step)
        _sync(output_dir)
    if total_limit is not None:
        # Never the one just written: a run that went on from an earlier one has others ahead of it.
        others = [folder for folder in find_checkpoints(output_dir) if folder != place]
        for folder in others[: max(0, len(others) + 1 - total_limit)]:
            _delete(folder)
    return place


def _write_manifest(folder: Path, step: int) -> None:
    """What `_facts` says of each file, all of which are on the disk before the manifest is."""
    files = {}
    for path in sorted(folder.iterdir()):
        files[path.name] = _facts(path)
        _sync(path)
    (folder / MANIFEST).write_text(json.dumps({"step": step, "files": files}, indent=1), encoding="utf-8")
    _sync(folder / MANIFEST)
    _sync(folder)


def _facts(path: Path) -> dict[str, int | str]:
    """Size and hash of a file."""
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": sha_fileobj(file).hex()}


def _delete(folder: Path) -> None:
    """Delete a folder, out of sight first, so that an interruption leaves no half of it in place.

    That it cannot be deleted is no reason to end a run that has saved its work.
    """
    hidden = folder
    try:
        if not folder.name.startswith(HIDDEN_PREFIX):
            # A name that no leftover has.
            hidden = folder.rename(folder.with_name(f"{HIDDEN_PREFIX}{os.getpid()}-{folder.name}"))
        shutil.rmtree(hidden)
    except OSError as error:
        logger.warning("%s could not be deleted: %s", folder, " ".join(str(error).split()))


def _sync(path: Path) -> None:
    """Bring a file or a folder's entries to the disk itself."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open a folder
        return
    # Windows syncs only what may be written, and Linux opens a folder only to be read.
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep other runs out of an output folder; what was made for that alone is gone on exit.

    Raises CheckpointError: another run is in it.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except (Timeout, NotImplementedError) as error:
        busy = "another run is writing into it; give another folder"
        reason = busy if isinstance(error, Timeout) else "its file system cannot lock files"
        raise CheckpointError(f"--output_dir {folder}: {reason}") from error
    try:
        yield
    finally:
        if os.name != "nt":  # there an open file cannot be deleted, and `release` does it
            path.unlink(missing_ok=True)
        lock.release()
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def check_checkpoint(folder: Path) -> None:
    """Compare a checkpoint with its manifest.

    Raises ValueError: it is not a checkpoint, or damaged; one line that names the folder and the file.
    """
    try:
        files = dict(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"].items())
    except FileNotFoundError as error:
        raise ValueError(f"{folder} is no whole checkpoint: it has no {MANIFEST}") from error
    except (ValueError, KeyError, TypeError, AttributeError, IsADirectoryError) as error:
        raise ValueError(f"{folder} is damaged: {MANIFEST} cannot be read") from error
    for name in sorted({STATE_TENSORS, STATE_VALUES, *files}):
        refuse(not (folder / name).is_file(), f"{folder} is damaged: {name} is missing")
        refuse(_facts(folder / name) != files.get(name), f"{folder} is damaged: {name} is not what was written")


def latest_checkpoint(output_dir: Path) -> Path | None:
    """The whole checkpoint with the highest step, if any; a damaged one is skipped with a warning that names it."""
    for folder in reversed(find_checkpoints(output_dir)):
        try:
            check_checkpoint(folder)
        except ValueError as error:
            logger.warning("Skipped: %s", error)
        else:
            return folder
    return None


def read_state(folder: Path) -> dict[str, Any]:
    """The state in a checkpoint that was checked, its tensors on the CPU."""
    # Read and not mapped: Windows deletes no file that is, and the checkpoint may be pruned while the run goes on.
    tensors = load((folder / STATE_TENSORS).read_bytes())
    return unpack_state(json.loads((folder / STATE_VALUES).read_text(encoding="utf-8")), tensors)


def what_is_safe(output_dir: Path) -> str:
    """One clause on where a run can be taken up again."""
    folder = latest_checkpoint(output_dir)
    return "there is no earlier checkpoint" if folder is None else f"{folder} is whole, and the run can go on from it"


def remove_leftovers(output_dir: Path) -> None:
    """Delete the hidden folders of a run that was killed while it wrote or deleted something."""
    for folder in output_dir.glob(f"{HIDDEN_PREFIX}*"):
        _delete(folder)
