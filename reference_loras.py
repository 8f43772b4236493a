"""Earlier LoRAs under the one in training: found, compared with the base model, and merged into its weights.

With them merged, "all adapters off" is the original model with the earlier LoRAs, in every step and picture.

Source: [ours].
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import StableDiffusionPipeline
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open


# Why a DoRA is not trained on top of another LoRA.
DORA_ON_TOP = (
    "its magnitude would be trained for the weights with the earlier LoRA in them, and where both are loaded side by "
    "side it is taken for that of the original ones"
)
_SUFFIX = ".safetensors"
_KOHYA_PREFIXES = ("lora_unet_", "lora_te")
_KOHYA_WEIGHTS = (".lora_down.weight", ".lora_up.weight", ".alpha")
_WEIGHT = re.compile(r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.weight)?")


@dataclass(frozen=True)
class ReferenceLora:
    """An earlier LoRA that stays as it is while a new one is trained on top of it.

    Attributes:
        name: as it was given: a file, a folder, or an id of the Hub.
        path: the safetensors file.
        hub_file: repository and file on the Hub, None for a file of this machine.
        sha256: of the file's content, in hexadecimal digits.
        scale: how strongly it is active.
    """

    name: str
    path: Path
    hub_file: tuple[str, str] | None
    sha256: str
    scale: float


def find_reference(name: str, scale: float, cache_dir: str | None = None) -> ReferenceLora:
    """Look for an earlier LoRA on this machine and then on the Hub, and read what is in it as bytes.

    Args:
        name: a safetensors file; a folder with `pytorch_lora_weights.safetensors`; "user/name" on the Hub with a file
            of that name, or "user/name/file.safetensors".
        scale: how strongly it is active.
        cache_dir: where the Hub's files are kept.

    Raises:
        OSError: there is no such file, or none that can be read; one line without the name.

    Source: [ours].
    """
    path, hub_file = Path(name), None
    if path.is_dir():
        path /= LORA_WEIGHT_NAME_SAFE
        if not path.is_file():
            raise FileNotFoundError(f"the folder has no {LORA_WEIGHT_NAME_SAFE}; name the file itself")
    elif not path.exists():
        hub_file = _name_on_hub(name)
        if hub_file is None:
            raise FileNotFoundError("there is no such file or folder")
        try:
            path = Path(hf_hub_download(*hub_file, cache_dir=cache_dir))
        except (HTTPError, OSError) as error:
            line = " ".join(str(error).split())
            raise FileNotFoundError(f"no file or folder of this machine, nor found on the Hub: {line}") from error
    return ReferenceLora(name, path, hub_file, hashlib.sha256(path.read_bytes()).hexdigest(), scale)


def _name_on_hub(name: str) -> tuple[str, str] | None:
    """The repository and the file in it; None for what can only be a path."""
    owner, _, rest = name.partition("/")
    repository, _, file = rest.partition("/")
    if repository.endswith(_SUFFIX) or (file and not file.endswith(_SUFFIX)):
        return None
    try:
        validate_repo_id(f"{owner}/{repository}")
    except HFValidationError:
        return None
    return f"{owner}/{repository}", file or LORA_WEIGHT_NAME_SAFE


def check_reference(path: Path, layers: Mapping[str, Mapping[str, torch.nn.Module]]) -> None:
    """Compare names and shapes in a LoRA of diffusers' or kohya's format with a base model, without its weights.

    Args:
        path: the file.
        layers: of "unet" and of "text_encoder", the linear and convolutional layers by name.

    Raises:
        ValueError: it is no safetensors file, holds no plain LoRA or DoRA, or one of another model; one line without
            the file's name.

    Source: [ours].
    """
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
    except SafetensorError as error:
        raise ValueError(f"no safetensors file, and a pickle is not read ({error})") from error
    if not names:
        raise ValueError("holds no weights")
    for name in names:
        if "lora" not in name:
            raise ValueError(f"{name!r} in it is no weight of a LoRA")
        if name.startswith(_KOHYA_PREFIXES) and not name.endswith(_KOHYA_WEIGHTS):
            raise ValueError(f"{name!r} in it is of a kind (DoRA, LoHa, LoKr …) that diffusers does not read")
    try:
        state, _, _ = StableDiffusionPipeline.lora_state_dict(path, return_lora_metadata=True, use_safetensors=True)
    except KeyError as error:
        raise ValueError(f"a half of a pair is missing: {error}") from error
    others = [name for name in state if name.split(".")[0] not in layers]
    if others:
        raise ValueError(f"{others[0]!r} in it belongs to neither UNet nor text encoder")
    for part, part_layers in layers.items():
        own = {name.removeprefix(f"{part}."): weight for name, weight in state.items() if name.startswith(f"{part}.")}
        if own:
            _check_part(part, _peft_names(part, own), part_layers)


def _peft_names(part: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of the UNet or text encoder under the names they get when diffusers loads them."""
    if part == "unet":
        return state if "lora_A" in next(iter(state)) else convert_unet_state_dict_to_peft(state)
    return convert_state_dict_to_peft(convert_state_dict_to_diffusers(state))


def _check_part(part: str, state: Mapping[str, torch.Tensor], layers: Mapping[str, torch.nn.Module]) -> None:
    # Some versions of transformers have a CLIPTextModel whose layers lie in a `text_model`, and others do not.
    layers = {name.removeprefix("text_model."): layer for name, layer in layers.items()}
    ranks: dict[str, dict[str, int]] = {}
    for name, weight in state.items():
        match = _WEIGHT.fullmatch(name)
        layer = layers.get(match[1].removeprefix("text_model.")) if match else None
        if layer is None:
            raise ValueError(f"{part}.{name} in it belongs to no layer of this base model")
        shape, own = tuple(layer.weight.shape), tuple(weight.shape)
        if match[2] == "lora_magnitude_vector":
            fits = weight.numel() == shape[0]
        elif match[2] == "lora_A":
            fits = len(own) == len(shape) and own[1:] == shape[1:]
        else:
            fits = len(own) == len(shape) and own[0] == shape[0]
        if not fits:
            raise ValueError(f"{part}.{name} in it is {own}, and this base model's layer {shape}: for another model")
        if match[2] != "lora_magnitude_vector":
            ranks.setdefault(match[1], {})[match[2]] = own[0] if match[2] == "lora_A" else own[1]
    for layer, found in ranks.items():
        if len(found) < 2 or found["lora_A"] != found["lora_B"]:
            raise ValueError(f"{part}.{layer} in it lacks a matching pair of lora_A and lora_B")


def merge_references(
    pipeline: StableDiffusionPipeline, references: Sequence[ReferenceLora], dtype: torch.dtype = torch.float32
) -> None:
    """Merge earlier LoRAs into UNet and text encoder, as diffusers computes them when all are active in this order.

    Args:
        pipeline: on the CPU and in float32, so that nothing is rounded that an adapter beside the weights would keep;
            without adapters, before and after.
        references: at least one, each checked by `check_reference`.
        dtype: what the pipeline is brought to afterwards.

    Source: [ours].
    """
    names = [f"reference_{i}" for i in range(len(references))]
    # Adapters are made of random numbers before they are filled; a new LoRA is to begin as without the earlier ones.
    with _quiet_libraries(), torch.random.fork_rng(devices=[]):
        for name, reference in zip(names, references):
            # The stock loader, whatever a subclass makes of it: it is what others will load the LoRA with.
            StableDiffusionPipeline.load_lora_weights(
                pipeline, str(reference.path), adapter_name=name, use_safetensors=True
            )
        pipeline.set_adapters(names, [reference.scale for reference in references])
        # All at once: a DoRA's magnitude is a factor on the weights it was trained on, without the others.
        pipeline.fuse_lora(adapter_names=names)
        pipeline.unload_lora_weights()
        pipeline.to(dtype)


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Inside, the libraries do not list layers without a LoRA: which have one was checked before."""
    levels = [(library, library.utils.logging.get_verbosity()) for library in (diffusers, transformers)]
    try:
        for library, _ in levels:
            library.utils.logging.set_verbosity_error()
        yield
    finally:
        for library, level in levels:
            library.utils.logging.set_verbosity(level)
