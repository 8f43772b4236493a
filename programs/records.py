"""Records of prompts as users write them: lines of JSON, and the targets and phrases in them.

Source: [ours].
"""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any


Target = str | tuple[str, str]  # an addition, or (replaced phrase, target)


def read_json_lines(path: Path, name: str) -> tuple[list[str], list[dict[str, Any]]]:
    """The objects of a file of JSON lines, with or without a byte order mark.

    Args:
        path: the file, in UTF-8; empty lines are passed over.
        name: what sources and errors call it.

    Returns:
        The source of each object, such as "data/metadata.jsonl, line 3", and the objects.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is no JSON object with columns.

    Source: [ours].
    """
    sources, records = [], []
    # Lines of bytes: those of a text also end at separators that a JSON string may hold.
    for number, line in enumerate(path.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines(), start=1):
        if not line.strip():
            continue
        source = f"{name}, line {number}"
        try:
            record = json.loads(line.decode("utf-8"))
        except ValueError as error:  # broken JSON or broken UTF-8
            raise ValueError(f"{source} is not JSON: {error}") from error
        if not (isinstance(record, dict) and record):
            raise ValueError(f"{source} must be a JSON object with columns, got {record!r}.")
        sources.append(source)
        records.append(record)
    return sources, records


def read_target(value: Any, where: str) -> str | list[Target]:
    """A target as JSON spells it, pairs as tuples.

    Args:
        value: a text, or a list of texts and of [phrase, target].
        where: what an error begins with.

    Returns:
        The text, or the list.

    Raises:
        ValueError: neither.

    Source: [ours].
    """
    if not isinstance(value, list):
        check_text(value, where)
        return value
    if not value:
        raise ValueError(f"{where} must hold a target, got [].")
    targets: list[Target] = []
    for item in value:
        if isinstance(item, list) and len(item) != 2:
            raise ValueError(f"{where}: a replacement is [phrase, target], got {item!r}.")
        for text in item if isinstance(item, list) else [item]:
            check_text(text, where)
        targets.append(tuple(item) if isinstance(item, list) else item)
    return targets


def read_phrases(value: Any, where: str) -> tuple[str, ...]:
    """A list of phrases as JSON spells it; a ValueError that begins with `where` if it is none. Source: [ours]."""
    if not (isinstance(value, list) and value):
        raise ValueError(f"{where} must be a list of phrases, got {value!r}.")
    for phrase in value:
        check_text(phrase, where)
    return tuple(value)


def check_text(value: Any, where: str) -> None:
    """A ValueError that begins with `where` if a value is no text, or an empty one."""
    if not (isinstance(value, str) and value.strip()):
        raise ValueError(f"{where} must be a text that is not empty, got {value!r}.")
