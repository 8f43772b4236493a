"""Files and folders that appear whole or not at all.

Source: [ours].
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


logger = logging.getLogger(__name__)

HIDDEN_PREFIX = ".saving-"


@contextmanager
def whole(path: Path, prefix: str = HIDDEN_PREFIX) -> Iterator[Path]:
    """Where to write a file or a folder, which takes its place once all of it is written.

    What is at the place stays until then, and comes back if the last step fails. Several processes may write to one
    place; a process that is killed leaves a hidden folder beside it.

    Args:
        path: the place; the folder around it exists.
        prefix: how the hidden folder's name begins.

    Yields:
        A path of the same name, where nothing is yet.
    """
    # In a folder beside the place, so that the last step is a rename on one file system. On Windows a file that is
    # still open elsewhere cannot be removed.
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
