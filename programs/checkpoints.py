"""The folders of checkpoints in a training run's output folder, by name."""

from __future__ import annotations

import re
from pathlib import Path


def checkpoint_folder(output_dir: Path, step: int) -> Path:
    """Where the checkpoint after this many updates lies. Source: [ours]."""
    return output_dir / f"checkpoint-{step}"


def find_checkpoints(output_dir: Path) -> list[Path]:
    """The folders `checkpoint-<step>` in a folder, by step, whole or not. Source: [ours]."""
    names = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in output_dir.glob("checkpoint-*"))
    return [path for _, path in sorted((int(name[1]), path) for name, path in names if name and path.is_dir())]
