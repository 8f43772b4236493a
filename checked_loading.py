"""Loading what a flag names: an error that says which flag it was, and a tokenizer that is really there.

Source: [ours].
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError
from transformers import CLIPTokenizer


class InputError(ValueError):
    """A mistake in what the run was given; its message is one line that names the flag and the value."""


@contextmanager
def naming_flag(flag: str, value: str) -> Iterator[None]:
    """Put a flag and its value before what a library says of them, in one line."""
    try:
        yield
    # transformers raises a RuntimeError for weights of other shapes than the configuration's.
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"--{flag} {value}: {' '.join(str(error).split())}") from error


def load_tokenizer(name: str, **kwargs: str | None) -> CLIPTokenizer:
    """A CLIP tokenizer; a ValueError where its files are missing and transformers makes up an empty one."""
    tokenizer = CLIPTokenizer.from_pretrained(name, **kwargs)
    if len(tokenizer) < 256:
        raise ValueError(f"a tokenizer of {len(tokenizer)} tokens, so its files are missing")
    return tokenizer
