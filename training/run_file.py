"""A run in a file: the flags by name in YAML, as they are given to a run and as it writes them down. [ours]"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from programs.writing import whole
from training.flag_rules import refuse


RUN_FILE = "run.yaml"
SECRETS = ("hub_token",)


def read_run_file(path: str, actions: Mapping[str, argparse.Action]) -> dict[str, list[str]]:
    """The words of a command line for each flag that a run file gives another value than the default.

    Args:
        actions: of the parser, by the flags' names.

    Raises ValueError: it cannot be read, is no YAML, or has a key or a kind of value that no flag has.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    refuse(not isinstance(values, dict), f"{path} must hold the flags by name, such as 'rank: 16'")
    for name in values:
        refuse(name not in actions, f"{path}: there is no flag --{name}")
    return {
        name: _words(f"{path}: {name}", actions[name], value)
        for name, value in values.items()
        if value is not None and value != actions[name].default
    }


def _words(where: str, action: argparse.Action, value: Any) -> list[str]:
    flag = action.option_strings[0]
    if action.nargs == 0:
        refuse(not isinstance(value, bool), f"{where} must be true or false, got {value!r}")
        return [flag if value else action.option_strings[1]]
    values = value if isinstance(value, list) else [value]
    plain = all(isinstance(one, str | int | float) for one in values)
    refuse(not plain, f"{where} must be a text or a number, or a list of them, got {value!r}")
    # YAML reads the word no, which --mixed_precision can be, as false.
    values = [{False: "no", True: "yes"}[one] if isinstance(one, bool) else str(one) for one in values]
    if isinstance(action, argparse._ExtendAction):
        return [f"{flag}={one}" for one in values]
    if action.nargs is not None:
        return [flag, *values]
    several = isinstance(value, list) and flag != "--lora_layers"
    refuse(several, f"{where} must be one value, got {value!r}")
    return [f"{flag}={','.join(values)}"]


def write_run_file(asked: Mapping[str, Any], folder: Path) -> Path:
    """Write down what a run was asked for, but secrets, so that it can be run again; returns the file."""
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in asked.items()}
    kept = {name: value for name, value in values.items() if name not in SECRETS}
    folder.mkdir(parents=True, exist_ok=True)
    with whole(folder / RUN_FILE) as file:
        file.write_text(yaml.safe_dump(kept, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return folder / RUN_FILE
