"""Files and folders that appear whole or not at all, and a run's checkpoints, which do. Source: [ours]."""

import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


logger = logging.getLogger(__name__)

HIDDEN_PREFIX = ".saving-"


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write a file or a folder, which takes its place once all of it is written.

    What is at the place stays until then, and comes back if the last step fails. The folder around it exists. Several
    processes may write to one place; one that is killed leaves a hidden folder beside it, whose name begins with
    `HIDDEN_PREFIX`.
    """
    # In a folder beside the place, so that the last step is a rename on one file system. On Windows a file that is
    # still open elsewhere cannot be removed.
    prefix = f"{HIDDEN_PREFIX}{path.name[:40]}-"  # a long name with more would be too long
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=prefix, ignore_cleanup_errors=True) as temporary:
        part, former = Path(temporary) / path.name, Path(temporary) / "former"
        yield part
        if path.is_dir():  # no file system replaces a folder that holds something
            path.rename(former)
        try:
            os.replace(part, path)
        except BaseException:
            if former.exists():
                former.rename(path)
            raise
    if os.path.exists(temporary):
        logger.warning("%s could not be deleted", temporary)


def sort_header(path: Path) -> None:
    """Put a safetensors file's metadata in order, which the library writes in an order of chance: equal runs have
    equal files then.

    Source: safetensors' documentation: the header's length in 8 bytes, the header, the tensors.
    """
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        file.seek(8)
        file.write(text.ljust(size))  # as long as it was: the tensors stay where they are


def find_checkpoints(output_dir: Path) -> list[Path]:
    """The folders `checkpoint-<step>` in a training run's output folder, by step, whole or not."""
    names = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in output_dir.glob("checkpoint-*"))
    return [path for _, path in sorted((int(name[1]), path) for name, path in names if name and path.is_dir())]
