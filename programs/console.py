"""What the programs show: flags with their defaults, a bar for each phase, and no alarm of a library without a cause.

The standard library and tqdm alone, for it is there before flags are read.
Source: [ours].
"""

import argparse
import importlib
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm.auto import tqdm


DTYPES = ("float32", "float16", "bfloat16")  # of weights, as flags name them
BASE_CONFIG = (
    "Folder or Hub id with the configuration of a base model in one file, and, where that is the transformer of "
    "Stable Diffusion 3, with all other models; its family's published one if not given."
)
# What every program imports. The import itself reports packages that are not installed and that nothing here needs.
LIBRARIES = ("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion", "peft", "transformers.models.clip")


class FlagFormatter(argparse.HelpFormatter):
    """Help with each flag's default, but for those that are off or not given."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if any(action.default is nothing for nothing in (None, False, argparse.SUPPRESS)):
            return action.help
        default = " ".join(map(str, action.default)) if isinstance(action.default, tuple | list) else action.default
        return f"{action.help} (default: {str(default).replace('%', '%%')})"


in_home = os.path.expanduser  # a path of a flag, with ~ for the home folder as the shell has it


def path_in_home(path: str) -> Path:
    """The same as a `Path`."""
    return Path(in_home(path))


def import_libraries() -> None:
    """Import the libraries once, without what they log of themselves meanwhile."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        for name in LIBRARIES:
            importlib.import_module(name)
    finally:
        logging.disable(before)


@contextmanager
def without_warning(message: str) -> Iterator[None]:
    """Inside, the warnings that begin with a text are not shown; it is a regular expression."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message)
        yield


def phase_bar(description: str, total: int, unit: str, shown: bool = True) -> tqdm:
    """A bar for one phase of the work, as "validation pictures" by the "picture", if this process shows any.

    Inside another bar it goes away when it is full.
    """
    return tqdm(total=total, desc=description, unit=unit, disable=not shown, leave=None)
