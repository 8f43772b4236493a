"""docs/flags.md, a table for each group of flags, as the flags themselves say: `python -m training.flags_page`.

Source: [ours].
"""

from __future__ import annotations

import re
from dataclasses import MISSING, Field, fields
from pathlib import Path

from training.arguments import GROUPS


PAGE = Path(__file__).resolve().parents[1] / "docs" / "flags.md"
HEAD = """# Every flag of the training script

`train_spf_portrait_lora.py [run.yaml] [flags]`. What is on or off has a form with `--no-` as well, as in
`--no-center_crop`. A file may come first that holds flags by name, one a line as in `rank: 16`; flags on the command
line win over it. Each run writes such a file, `run.yaml`, into its output folder, and can be started again from it.

This page is written by `python -m training.flags_page`.
"""


def page() -> str:
    """The page's text."""
    parts = [HEAD]
    for group in GROUPS.values():
        rows = [f"| `--{one.name}` | {_default(one)} | {_meaning(one)} |" for one in fields(group)]
        title = group.__doc__.removesuffix(".")
        parts.append("\n".join([f"## {title}\n", "| flag | default | meaning |", "| --- | --- | --- |", *rows, ""]))
    return "\n".join(parts)


def _default(one: Field) -> str:
    words = {id(MISSING): "required", id(None): "not given", id(True): "on", id(False): "off"}
    value = " ".join(map(str, one.default)) if isinstance(one.default, tuple) else one.default
    return words.get(id(one.default), f"`{value}`")


def _meaning(one: Field) -> str:
    """The help, with flags as code, and the choices that it does not name."""
    text = re.sub(r"(?<!`)(--[\w-]*\w)", r"`\1`", one.metadata["help"]).replace("|", "\\|")
    choices = [choice for choice in one.metadata.get("choices", ()) if not re.search(rf"\b{choice}\b", text)]
    return f"{text} Choices: {', '.join(f'`{choice}`' for choice in one.metadata['choices'])}." if choices else text


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
