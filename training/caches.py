"""Tensors kept on disk under a name made from all that they depend on, so that nothing ever needs to be invalidated.

A frozen model's outputs are computed once: their key is a fingerprint of the model and of what it was given.
Source: [ours].
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from programs.writing import whole


logger = logging.getLogger(__name__)

_TENSOR = "tensor"  # its name in the file
# What a configuration says of how it was stored and read, and not of what the model computes.
_ORIGIN = frozenset(
    {"_class_name", "_diffusers_version", "_name_or_path", "_use_default_values", "transformers_version"}
)


def fingerprint(*parts: str | bytes | int | float | tuple | None) -> str:
    """SHA-256 in hexadecimal digits; different values, types or groupings have different ones."""
    return hashlib.sha256(_encode(parts)).hexdigest()


def module_fingerprint(module: torch.nn.Module) -> str:
    """SHA-256 of what a model computes: its weights and buffers with their dtype, and its configuration if it has one.

    The same on each device, and wherever the model was loaded from.
    """
    config = getattr(module, "config", None)
    if config is not None:
        config = config if isinstance(config, Mapping) else config.to_dict()
        config = json.dumps(_drop_origin(config), sort_keys=True)
    digest = hashlib.sha256(_encode(config))
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(_encode((name, str(tensor.dtype), tuple(tensor.shape))))
        # numpy has no bfloat16, but every tensor can be seen as bytes; those have no dimension to lose in a scalar.
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class TensorCache:
    """Tensors by key, one safetensors file each; without a `folder` nothing is kept.

    Several processes may share a folder: a file appears whole or not at all, and whoever writes a key writes the same.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder

    def get_or_compute(
        self, keys: Sequence[str], compute: Callable[[list[int]], Iterable[torch.Tensor]]
    ) -> list[torch.Tensor]:
        """The tensor of each key, looked up or computed, on the CPU, without gradient, in its own dtype.

        Args:
            keys: as `fingerprint` returns them; equal ones share one tensor.
            compute: takes the indices of missing keys, if there are any, each different key once, and yields their
                tensors in that order. Each is written as it comes, so an interrupted run keeps what it has.

        Raises:
            OSError: a file cannot be read or written; the message names --cache_dir and the file.
            ValueError: `compute` yields another number of tensors than it was asked for.
        """
        places: dict[str, int] = {}
        for i, key in enumerate(keys):
            places.setdefault(key, i)
        tensors = {key: None if self.folder is None else _read(self._path(key)) for key in places}
        missing = [key for key, tensor in tensors.items() if tensor is None]
        if missing:
            for key, tensor in zip(missing, compute([places[key] for key in missing]), strict=True):
                # A view would keep the whole batch that it was cut from in memory.
                tensors[key] = tensor.detach().to("cpu", copy=True).contiguous()
                if self.folder is not None:
                    _write(self._path(key), tensors[key])
        return [tensors[key] for key in keys]

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"


def _read(path: Path) -> torch.Tensor | None:
    """The tensor in a file; None if there is no file, or a damaged one."""
    try:
        return load(path.read_bytes())[_TENSOR]
    except FileNotFoundError:
        return None
    except OSError as error:
        raise OSError(f"--cache_dir: {path} cannot be read: {error.strerror}") from error
    except (SafetensorError, KeyError) as error:
        logger.warning("The cached %s is damaged (%r); it is computed again and replaced.", path, error)
        return None


def _write(path: Path, tensor: torch.Tensor) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as file:
            file.write_bytes(save({_TENSOR: tensor}))
    except OSError as error:
        raise OSError(f"--cache_dir: {path} cannot be written: {error.strerror}") from error


def _encode(value: Any) -> bytes:
    """Type, length and content, so that no two values have the same bytes, alone or one after another."""
    # The exact type: a truth value is an integer too, and 1 == True == 1.0.
    kind = type(value)
    if kind is tuple:
        content = b"".join(map(_encode, value))
    elif kind is bytes:
        content = value
    elif kind in (str, bool, int, type(None)):
        content = str(value).encode("utf-8", "surrogatepass")
    elif kind is float:
        content = value.hex().encode()
    else:
        raise TypeError(f"A fingerprint is made of str, bytes, int, float, None and tuples of them, got {value!r}.")
    return f"{kind.__name__} {len(content)} ".encode() + content


def _drop_origin(value: Any) -> Any:
    """Also from configurations within: CLIP's has one of the texts and one of the pictures."""
    if isinstance(value, Mapping):
        return {str(key): _drop_origin(item) for key, item in value.items() if key not in _ORIGIN}
    return [_drop_origin(item) for item in value] if isinstance(value, list | tuple) else value
