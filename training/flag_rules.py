"""What a flag of the training script is: a field of a group, with its help and the rules that its value must keep.

No library is imported here: flags are read before any is.
Source: [ours].
"""

import importlib.util
import math
from argparse import ArgumentTypeError
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from programs.console import in_home


# A list, since a program that brings further modes extends it.
SFCM_MODES = ["averaged_target", "averaged", "averaged_both", "paper", "none"]
# What a number must be, as a refusal says it.
RULES = {
    "at least 1": lambda value: value >= 1,
    "0 or more": lambda value: 0 <= value < math.inf,
    "above 0": lambda value: 0 < value < math.inf,
    "in [0, 1]": lambda value: 0 <= value <= 1,
    "in [0, 1)": lambda value: 0 <= value < 1,
    "below 2**32": lambda value: value < 2**32,
}


def flag(default: Any, help: str, *rules: str, **options: Any) -> Any:
    """A field that is a flag, `MISSING` where it must be given.

    Args:
        rules: of `RULES`, for a number that is not None.
        options: more of `ArgumentParser.add_argument`.
    """
    return field(default=default, metadata={"help": help, "rules": rules, **options})


def path(default: Any, help: str, **options: Any) -> Any:
    """A flag for a path: a shell leaves the ~ of --output_dir=~/lora as it is."""
    return flag(default, help, type=in_home, **options)


def names_of(text: str) -> list[str]:
    """The names in a list with commas."""
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise ArgumentTypeError(f"an empty name in {text!r}")
    return names


def refuse(wrong: object, message: str) -> None:
    """A ValueError with the message if something is wrong."""
    if wrong:
        raise ValueError(message)


def check_folder(name: str, folder: str | Path) -> None:
    """Whether a flag's folder is there, or can be made."""
    nearest = next(path for path in (Path(folder), *Path(folder).parents) if path.exists())
    refuse(not nearest.is_dir(), f"--{name} {folder} is, or lies below, a file")


def check_package(name: str, package: str) -> None:
    """Whether the package that a flag needs is installed."""
    missing = importlib.util.find_spec(package) is None
    refuse(missing, f"--{name} needs the package {package}: pip install {package}")


@dataclass(frozen=True)
class FlagGroup:
    """Flags that belong together, under their docstring; `ValueError` at the first whose value cannot work."""

    def __init_subclass__(cls) -> None:
        cls._argument_group_name = cls.__doc__.removesuffix(".")  # as the parser asks for it

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            for rule in one.metadata["rules"]:
                wrong = value is not None and not RULES[rule](value)
                refuse(wrong, f"--{one.name} must be {rule}, got {value}")
        self.check()

    def check(self) -> None:
        """What the rules of single flags do not say."""
