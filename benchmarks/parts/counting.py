"""Counts the bytes of tensors that are alive, with the dtypes that CUDA's autocast would give them. [ours]"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


HALF = torch.bfloat16
# What CUDA's autocast computes in float32, and a CPU's does not.
UPCAST = ((F, "group_norm"), (F, "layer_norm"), (F, "softmax"), (Tensor, "softmax"))


class LiveBytes(TorchDispatchMode):
    """Counts storages that operations made inside of it, and those it is told of: the bytes now, and the most."""

    def __init__(self, *modules: nn.Module) -> None:
        """Counts the modules' tensors from the beginning."""
        super().__init__()
        self.live = self.peak = 0
        self._counted: set[int] = set()
        for module in modules:
            for tensor in (*module.parameters(), *module.buffers()):
                self.count(tensor)

    def count(self, tensor: Tensor) -> None:
        """Count a tensor's storage until it is freed; views of one storage count once."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._counted:
            return
        self._counted.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        # The storage outlives its last Python name if autograd has saved it, and its finalizer waits as long.
        weakref.finalize(storage, self._forget, key, size).atexit = False

    def _forget(self, key: int, size: int) -> None:
        self._counted.discard(key)
        self.live -= size

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self.count(leaf)
        return output


@contextmanager
def like_cuda() -> Iterator[None]:
    """Inside, autocast on a CPU takes half precision as float32 where CUDA's does."""

    def upcast(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.dtype == HALF else value

    def in_float32(function: Callable) -> Callable:
        def wrapped(*args: Any, **kwargs: Any) -> Tensor:
            if torch.is_autocast_enabled("cpu"):
                args, kwargs = tree_map(upcast, (args, kwargs))
            return function(*args, **kwargs)

        return wrapped

    # A torch function mode would be off while checkpointing recomputes.
    with ExitStack() as stack:
        for owner, name in UPCAST:
            stack.enter_context(patch.object(owner, name, in_float32(getattr(owner, name))))
        yield
