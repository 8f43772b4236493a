"""What a training run leaves in its folder, as the programs find it.

Source: [ours].
"""

from __future__ import annotations

import re
from pathlib import Path


def find_checkpoints(output_dir: Path) -> list[Path]:
    """The folders `checkpoint-<step>` in a folder, by step, whole or not."""
    found = [
        path
        for path in output_dir.glob("checkpoint-*")
        if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir()
    ]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))
