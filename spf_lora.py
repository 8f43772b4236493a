"""The LoRAs of a pipeline: loaded and checked, active as a call says, and off in the text encoders. [ours]"""

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers.loaders.lora_base import _fetch_state_dict
from diffusers.utils.torch_utils import is_compiled_module
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor


# The siblings as modules of the package that a custom pipeline is, or as modules on the path.
try:
    from . import adapters, lora_layers, spf_arguments
except ImportError:
    import adapters as adapters
    import lora_layers as lora_layers
    import spf_arguments as spf_arguments


class LoraPipeline:
    """What a stock pipeline becomes with LoRAs that are checked before they are loaded, and switched by a call."""

    _denoiser_name = "unet"

    @property
    def _denoiser(self) -> torch.nn.Module | None:
        """The model that predicts noise, compiled or not; None where a pipeline only encodes prompts."""
        return getattr(self, self._denoiser_name)

    def load_lora_weights(
        self, pretrained_model_name_or_path_or_dict: str | dict[str, Tensor], adapter_name: str | None = None, **kwargs
    ) -> None:
        """Load a LoRA as the stock pipeline does, with its arguments, in diffusers' or kohya's format.

        Raises:
            `ValueError`: it is for another architecture, damaged, or has numbers that are none; nothing was loaded.
        """
        given = pretrained_model_name_or_path_or_dict
        weights, metadata = _read_lora(given, **kwargs)
        family = lora_layers.kohya_family(weights)
        found = self.lora_state_dict(weights, **self._lora_options(), **kwargs)
        state, alphas = found if isinstance(found, tuple) else (found, None)  # only the older families have alphas
        name = "The LoRA" if isinstance(given, dict) else f"The LoRA {given}"
        if kwargs.get("weight_name") is not None:
            name += f"/{kwargs['weight_name']}"
        models = {key: getattr(self, key) for key in self._lora_loadable_modules}
        modules = {key: dict(uncompiled(model).named_modules()) for key, model in models.items() if model is not None}
        try:
            lora_layers.check_loadable(state, alphas, metadata, modules, family)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        with _without_false_alarms():
            super().load_lora_weights(given, adapter_name=adapter_name, **kwargs)

    @classmethod
    def load_lora_into_text_encoder(cls, state_dict: dict[str, Tensor], *args, **kwargs) -> None:
        """As the stock pipeline does, and a DoRA with its magnitudes."""
        super().load_lora_into_text_encoder(lora_layers.with_whole_names(state_dict), *args, **kwargs)

    def _lora_options(self) -> dict[str, Any]:
        """What the stock pipeline itself tells `lora_state_dict` of its models."""
        return {}

    def _adapted_models(self) -> list[torch.nn.Module]:
        """The models that a LoRA can be in."""
        return [model for name in self._lora_loadable_modules if (model := getattr(self, name)) is not None]

    def _adapted_layers(self) -> list[BaseTunerLayer]:
        modules = (module for model in self._adapted_models() for module in model.modules())
        return [module for module in modules if isinstance(module, BaseTunerLayer)]

    @contextmanager
    def _adapters(
        self, request: spf_arguments.Request, targets: Sequence[spf_arguments.Target]
    ) -> Iterator[list[str]]:
        """Inside, the adapters of a call are active, as strong as it says; gives their names in order."""
        models = self._adapted_models()
        layers = [module for module in self._adapted_layers() if not module.disable_adapters]
        active = list(dict.fromkeys(name for layer in layers for name in layer.active_adapters))
        with ExitStack() as stack:
            if isinstance(request.target_prompt, dict):
                active = list(request.target_prompt)
                known = list(dict.fromkeys(name for model in models for name in getattr(model, "peft_config", {})))
                unknown = [name for name in active if name not in known]
                if unknown:
                    raise ValueError(
                        f"`target_prompt` names the adapters {unknown}, but loaded are {known}: call "
                        "`load_lora_weights(…, adapter_name=…)` first."
                    )
                for model in models:
                    own = [name for name in active if name in getattr(model, "peft_config", {})]
                    stack.enter_context(adapters.active_adapters(model, own))
            if request.target_scale is not None:
                factors = spf_arguments.scale_factors(request.target_scale, active, targets)
                for model in models:
                    stack.enter_context(adapters.adapter_scales(model, factors))
            yield active

    @contextmanager
    def _original_text_encoders(self) -> Iterator[None]:
        """Inside, prompts are encoded without adapters."""
        with ExitStack() as stack:
            for model in self._adapted_models():
                if model is not self._denoiser:
                    stack.enter_context(adapters.original_rows(model, range))
            yield


def _read_lora(
    given: str | os.PathLike | dict[str, Tensor], *, use_safetensors: bool | None = None, **kwargs
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """A LoRA's tensors under the names that its file has, and its metadata, as `lora_state_dict` finds them."""
    if isinstance(given, dict):
        return dict(given), None
    names = ("weight_name", "local_files_only", "cache_dir", "proxies", "token", "revision", "subfolder")
    return _fetch_state_dict(
        given,
        use_safetensors=use_safetensors in (None, True),
        allow_pickle=use_safetensors is None,
        force_download=kwargs.get("force_download", False),
        user_agent={"file_type": "attn_procs_weights", "framework": "pytorch"},
        **{name: kwargs.get(name) for name in names},
    )


def uncompiled(model: torch.nn.Module) -> torch.nn.Module:
    """The model itself, with its layers under their own names, where `torch.compile` has wrapped it."""
    return model._orig_mod if is_compiled_module(model) else model


@contextmanager
def _without_false_alarms() -> Iterator[None]:
    """Inside, nothing is said of what is no fault in a LoRA that was checked: no part of it is for a text encoder, or
    there is an earlier one beside it."""

    def other(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("No LoRA keys associated to")

    speaker = logging.getLogger("diffusers.loaders.lora_base")
    speaker.addFilter(other)
    with warnings.catch_warnings(), ExitStack() as stack:
        stack.callback(speaker.removeFilter, other)
        warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
        yield
