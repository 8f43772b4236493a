"""Loading what a user names: an error of one line that says what it was, and a tokenizer or LoRA that is really there.

Source: [ours].
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from transformers import CLIPTokenizer


_DOWN = ("lora_A.weight", "down.weight")  # the end of one tensor of each LoRA layer, in PEFT's names and in others


Pipeline = TypeVar("Pipeline", bound=StableDiffusionPipeline)


class InputError(ValueError):
    """A mistake in what the run was given; its message is one line that names the flag and the value."""


@contextmanager
def naming_flag(flag: str, value: str) -> Iterator[None]:
    """Put a flag and its value before what a library says of them, in one line."""
    with naming(f"--{flag} {value}"):
        yield


@contextmanager
def naming(subject: str) -> Iterator[None]:
    """Put a subject before what a library says of it, in one line."""
    try:
        yield
    # transformers raises a RuntimeError for weights of other shapes than the configuration's.
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{subject}: {' '.join(str(error).split())}") from error


def load_tokenizer(name: str, **kwargs: str | None) -> CLIPTokenizer:
    """A CLIP tokenizer; a ValueError where its files are missing and transformers makes up an empty one."""
    tokenizer = CLIPTokenizer.from_pretrained(name, **kwargs)
    if len(tokenizer) < 256:
        raise ValueError(f"a tokenizer of {len(tokenizer)} tokens, so its files are missing")
    return tokenizer


def load_pipeline(kind: type[Pipeline], name: str, dtype: torch.dtype) -> Pipeline:
    """A pipeline of this class from the folder or id that --base_model names.

    Args:
        kind: `StableDiffusionPipeline` or a subclass.
        name: a folder or an id of the Hub.
        dtype: of all weights.

    Returns:
        The pipeline, on the CPU.

    Raises:
        InputError: it cannot be loaded, or is a model that takes more than a prompt and noise.

    Source: [ours].
    """
    with naming_flag("base_model", name):
        config = UNet2DConditionModel.load_config(name, subfolder="unet")
        if config.get("addition_embed_type") is not None or config.get("in_channels", 4) != 4:
            raise ValueError("not Stable Diffusion 1.x or 2.x for text to image, as its UNet's configuration says")
        return kind.from_pretrained(name, dtype=dtype)


def load_lora(pipeline: StableDiffusionPipeline, source: str, adapter_name: str) -> None:
    """Load a LoRA whole, and make it the only active one; on an error the pipeline's LoRAs are as they were.

    diffusers warns and goes on where a LoRA, or a part of it, is for another model. Here that is an error.

    Args:
        pipeline: gets the LoRA on its UNet and, if the file has weights for it, on its text encoder.
        source: a `.safetensors` file in diffusers' or kohya's format, a folder with one, an id of the Hub, or
            "user/name/file.safetensors" there.
        adapter_name: a name that no adapter of the pipeline has.

    Raises:
        InputError: there is no such LoRA, or it is for another model; one line that begins with `source`.

    Source: [ours].
    """
    path, weight_name = find_lora(source)
    active = pipeline.get_active_adapters()
    options = {"weight_name": weight_name, "use_safetensors": True}
    try:
        with naming(source):
            tensors, _ = pipeline.lora_state_dict(path, unet_config=pipeline.unet.config, **options)
            try:
                pipeline.load_lora_weights(path, adapter_name=adapter_name, **options)
            except RuntimeError as error:
                # torch lists each layer whose shape differs; the first tells enough.
                raise ValueError(" ".join(str(error).splitlines()[:2])) from error
            expected = sum(key.endswith(_DOWN) for key in tensors)
            found = _count_layers(pipeline, adapter_name)
            if not found or found != expected:
                raise ValueError(f"a LoRA for another model: {found} of its {expected} layers are in this one")
    except InputError:
        _remove_adapter(pipeline, adapter_name, active)
        raise


def find_lora(source: str) -> tuple[str, str | None]:
    """Where a LoRA lies: a path and None, a folder and its file, or an id of the Hub and a file or None.

    Raises:
        InputError: what exists is no LoRA, and what does not is no id of the Hub.

    Source: [ours].
    """
    path = Path(source)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise InputError(f"{source}: not a .safetensors file")
        return source, None
    if path.is_dir():
        names = sorted(file.name for file in path.glob("*.safetensors"))
        if LORA_WEIGHT_NAME_SAFE not in names and len(names) != 1:
            raise InputError(
                f"{source}: holds no {LORA_WEIGHT_NAME_SAFE}, and {len(names)} .safetensors files instead of one"
            )
        return source, LORA_WEIGHT_NAME_SAFE if LORA_WEIGHT_NAME_SAFE in names else names[0]
    parts = source.split("/")
    repo_id, weight_name = "/".join(parts[:2]), "/".join(parts[2:]) or None
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"{source}: no such file or folder") from error
    if repo_id.endswith(".safetensors") or "" in parts:
        raise InputError(f"{source}: no such file or folder")
    return repo_id, weight_name


def _count_layers(pipeline: StableDiffusionPipeline, adapter_name: str) -> int:
    models = (pipeline.unet, pipeline.text_encoder)
    layers = [layer for model in models for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    return sum(adapter_name in layer.lora_A for layer in layers)


def _remove_adapter(pipeline: StableDiffusionPipeline, adapter_name: str, active: list[str]) -> None:
    if active:
        pipeline.delete_adapters(adapter_name)
        pipeline.set_adapters(active)
    else:
        pipeline.unload_lora_weights()
