"""What a flag of the training script is: a field of a group, with its help and the rules that its value must keep.

No library is imported here: flags are read before any is.
Source: [ours].
"""

import importlib.util
import math
from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from programs.console import in_home


# Names of what other modules and libraries have.
OPTIMIZERS = ("adamw", "prodigy")
DUAL_PATH_MODES = ("two_pass", "single_pass")
INTERPOLATION_MODES = ("lanczos", "bicubic", "bilinear", "box", "hamming", "nearest")
ENHANCEMENT_LOSSES = ("difference", "direct")
# A list, since a program that brings further modes extends it.
SFCM_MODES = ["averaged_target", "averaged", "paper", "none"]
SCHEDULERS = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
)  # fmt: skip
TRACKERS = (
    "all", "aim", "tensorboard", "wandb", "comet_ml", "mlflow", "clearml", "dvclive", "swanlab", "trackio",
)  # fmt: skip
# Ways to keep the portrait, and those that add a row that keeps a prediction to each training portrait's.
PRESERVATIONS = ("spf", "none", "prior", "dop", "cat", "mask")
WITH_KEPT_ROWS = ("prior", "dop", "cat")
CARD_TAG = "\n- spf-portrait\n"  # as the metadata of a model card has it


class Rule(NamedTuple):
    """What a number must be, and how a refusal says it."""

    holds: Callable[[float], bool]
    words: str


AT_LEAST_1 = Rule(lambda value: value >= 1, "at least 1")
NOT_NEGATIVE = Rule(lambda value: 0 <= value < math.inf, "0 or more")
ABOVE_0 = Rule(lambda value: 0 < value < math.inf, "above 0")
SHARE = Rule(lambda value: 0 <= value <= 1, "in [0, 1]")
SHARE_BELOW_1 = Rule(lambda value: 0 <= value < 1, "in [0, 1)")
BELOW_2_32 = Rule(lambda value: value < 2**32, "below 2**32")


def flag(default: Any, help: str, *rules: Rule, **options: Any) -> Any:
    """A field that is a flag, `MISSING` where it must be given, with its help and what its number must keep if it is
    not
    None; `options` are more of `ArgumentParser.add_argument`.
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


def check_folder(name: str, folder: str | Path | None) -> None:
    """Whether a flag's folder is there, or can be made."""
    if folder is not None:
        folder = Path(folder)
        if not next(path for path in (folder, *folder.parents) if path.exists()).is_dir():
            raise ValueError(f"--{name} {folder} is, or lies below, a file")


def check_package(name: str, package: str) -> None:
    """Whether the package that a flag needs is installed."""
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"--{name} needs the package {package}: pip install {package}")


@dataclass(frozen=True)
class FlagGroup:
    """Flags that belong together, under their docstring; `ValueError` at the first whose value cannot work."""

    def __init_subclass__(cls) -> None:
        cls._argument_group_name = cls.__doc__.removesuffix(".")  # as the parser asks for it

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            for rule in one.metadata["rules"]:
                if value is not None and not rule.holds(value):
                    raise ValueError(f"--{one.name} must be {rule.words}, got {value}")
        self.check()

    def check(self) -> None:
        """What the rules of single flags do not say."""
