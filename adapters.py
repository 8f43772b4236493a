"""Adapters of a model on and off, for the whole batch or row by row; which weights are trained stays. [ours]

The paper's Reference Path is the model with its adapters off, its Response Path the same model with one adapter on.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cache

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn


BASE_ROW = "__base__"  # peft's name for "no adapter" in a batch of mixed adapters


class Adapters:
    """The adapters of a model, found once and then switched without a walk over its modules.

    Each switch is a context: state and requires_grad flags are as before on exit, also after an error. The flags do
    not change inside either: activating a frozen adapter leaves it frozen. The model is no DDP wrapper; after an
    adapter came or went this object is made again.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self.names = list(getattr(model, "peft_config", {}))
        self.layers = [module for module in modules if isinstance(module, BaseTunerLayer)]
        self._model = model
        self._weights = [parameter for layer in self.layers for parameter in layer.parameters()]
        self._replaces_modules = any(isinstance(module, AuxiliaryTrainingWrapper) for module in modules)

    def check(self, names: Sequence[str] = ()) -> None:
        """Whether these adapters can be switched.

        Raises:
            ValueError: an unknown adapter, adapters merged into the weights, or one that replaces whole modules.
            RuntimeError: an adapter came or went since this object was made.
        """
        if list(getattr(self._model, "peft_config", {})) != self.names:
            raise RuntimeError("an adapter was added or deleted: Adapters has to be made again")
        if unknown := [name for name in names if name not in self.names]:
            raise ValueError(f"unknown adapters {unknown}; the model has {self.names}")
        kind = type(self._model).__name__
        if any(layer.merged for layer in self.layers):
            raise ValueError(f"A LoRA is fused into the weights of {kind}: call `unfuse_lora()` first.")
        if self._replaces_modules:
            raise ValueError(
                f"An adapter of {kind} replaces whole modules (`modules_to_save`), which cannot be turned "
                "off for a part of a batch: use one without them."
            )

    def parameters(self, name: str) -> list[nn.Parameter]:
        """The weights of one adapter, in the model's order."""
        self.check([name])
        return [
            parameter
            for layer in self.layers
            for key, parameter in layer.named_parameters()
            if key.split(".")[0] in layer.adapter_layer_names and key.split(".")[1] == name
        ]

    @contextmanager
    def only(self, names: str | Sequence[str] | None) -> Iterator[None]:
        """Exactly these adapters are active inside; None switches all of them off. Raises what `check` does."""
        names = [names] if isinstance(names, str) else list(names or ())
        self.check(names)
        flags = [weight.requires_grad for weight in self._weights]
        before = [(vars(layer), layer.active_adapters, layer.disable_adapters) for layer in self.layers]
        try:
            # peft's `set_adapter` and `enable_adapters` would also set the flags, and a module's own way to set an
            # attribute is slow.
            for state, active, _ in before:
                state.update(_active_adapter=list(names or active), _disable_adapters=not names)
            yield
        finally:
            for state, active, disabled in before:
                state.update(_active_adapter=active, _disable_adapters=disabled)
            for weight, flag in zip(self._weights, flags, strict=True):
                if weight.requires_grad is not flag:
                    weight.requires_grad_(flag)

    @contextmanager
    def per_sample(self, names: Sequence[str]) -> Iterator[None]:
        """Each batch row goes through its own adapter, "__base__" for none. Works in training; a backward under
        checkpointing must run inside.

        Raises ValueError: as `check` says, or there is no adapter; from the forward, a batch of another size.
        """
        self.check([name for name in names if name != BASE_ROW])
        if not self.layers:
            raise ValueError("the model has no adapter: there is nothing for the rows to choose from")

        def pass_adapter_names(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            return args, {**kwargs, "adapter_names": list(names)}

        # A layer whose adapters are switched off ignores `adapter_names`.
        with self.only(self.names), ExitStack() as stack:
            for layer in self.layers:
                stack.callback(layer.register_forward_pre_hook(pass_adapter_names, with_kwargs=True).remove)
            yield

    @contextmanager
    def dropout(self, name: str) -> Iterator[None]:
        """Inside, the dropout of one adapter is on."""
        dropouts = [layer.lora_dropout[name] for layer in self.layers if name in layer.lora_dropout]
        before = [dropout.training for dropout in dropouts]
        try:
            for dropout in dropouts:
                dropout.training = True
            yield
        finally:
            for dropout, training in zip(dropouts, before, strict=True):
                dropout.training = training


def active_adapters(model: nn.Module, names: str | Sequence[str] | None) -> AbstractContextManager[None]:
    """`Adapters.only`, for a model that is switched once."""
    return Adapters(model).only(names)


@contextmanager
def original_rows(model: nn.Module, rows: Callable[[int], Iterable[int]]) -> Iterator[None]:
    """Inside, the adapters of `model` leave those rows of a batch as the original model has them that `rows` chooses
    from its size, anew in each call.

    Every row goes through the adapters that are active; then the chosen rows are taken from the layer below. Unlike
    `Adapters.per_sample` this works with several active adapters, with DoRA and for a text encoder; without gradient,
    and uncompiled. Raises what `check` does.
    """
    adapters = Adapters(model)
    adapters.check()

    @cache
    def indices(chosen: tuple[int, ...], device: torch.device) -> Tensor:
        return torch.tensor(chosen, dtype=torch.long, device=device)

    def restore(layer: nn.Module, args: tuple, output: Tensor) -> Tensor:
        # Indices from a list would be copied to the device, and waited for, in each layer.
        chosen = indices(tuple(rows(len(output))), output.device)
        if len(chosen):
            output[chosen] = layer.base_layer(args[0][chosen]).to(output.dtype)
        return output

    with ExitStack() as stack:
        # A compiled graph knows nothing of the hooks, or, compiled here, would keep them for later calls.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for layer in adapters.layers:
            stack.callback(layer.register_forward_hook(restore).remove)
        yield


@contextmanager
def adapter_scales(model: nn.Module, factors: Mapping[str, float]) -> Iterator[None]:
    """Inside, the strength of each named adapter is multiplied by a factor; names that the model has not do nothing.

    Raises ValueError: as `check` says, or an adapter is of a kind that has no strength.
    """
    adapters = Adapters(model)
    adapters.check()
    if not all(hasattr(layer, "scaling") for layer in adapters.layers):
        raise ValueError(f"An adapter of {type(model).__name__} is no LoRA and has no strength that could be scaled.")
    before = [dict(layer.scaling) for layer in adapters.layers]
    try:
        for layer in adapters.layers:
            layer.scaling.update({name: value * factors.get(name, 1.0) for name, value in layer.scaling.items()})
        yield
    finally:
        for layer, scaling in zip(adapters.layers, before, strict=True):
            layer.scaling.update(scaling)
