"""Records of prompts as users write them: lines of JSON, and the targets and phrases in them. Source: [ours]."""

import codecs
import json
from pathlib import Path
from typing import Any


Target = str | tuple[str, str]  # an addition, or (replaced phrase, target)


def read_json_lines(path: Path, name: str) -> tuple[list[str], list[dict[str, Any]]]:
    """The objects of a file of JSON lines in UTF-8, after the source of each, such as "data/metadata.jsonl, line 3".

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is no JSON object with columns.
    """
    sources, records = [], []
    # Lines of bytes: those of a text also end at separators that a JSON string may hold.
    for number, line in enumerate(path.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines(), start=1):
        if not line.strip():
            continue
        sources.append(f"{name}, line {number}")
        try:
            records.append(json.loads(line.decode("utf-8")))
        except ValueError as error:  # broken JSON or broken UTF-8
            raise ValueError(f"{sources[-1]} is not JSON: {error}") from error
        if not (isinstance(records[-1], dict) and records[-1]):
            raise ValueError(f"{sources[-1]} must be a JSON object with columns, got {records[-1]!r}.")
    return sources, records


def read_target(value: Any, where: str) -> str | list[Target]:
    """A target as JSON spells it, a text or a list of texts and of [phrase, target], with these pairs as tuples.

    Raises ValueError: it is neither; begins with `where`, as do those of the functions below.
    """
    if not isinstance(value, list):
        return check_text(value, where)
    if not value:
        raise ValueError(f"{where} must hold a target, got [].")
    for item in value:
        if isinstance(item, list) and len(item) != 2:
            raise ValueError(f"{where}: a replacement is [phrase, target], got {item!r}.")
        for text in item if isinstance(item, list) else [item]:
            check_text(text, where)
    return [tuple(item) if isinstance(item, list) else item for item in value]


def read_phrases(value: Any, where: str) -> tuple[str, ...]:
    """A list of phrases as JSON spells it."""
    if not (isinstance(value, list) and value):
        raise ValueError(f"{where} must be a list of phrases, got {value!r}.")
    return tuple(check_text(phrase, where) for phrase in value)


def check_text(value: Any, where: str) -> str:
    """The value itself, if it is a text that is not empty."""
    if not (isinstance(value, str) and value.strip()):
        raise ValueError(f"{where} must be a text that is not empty, got {value!r}.")
    return value
