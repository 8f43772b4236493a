"""LoRA files read: diffusers' format, and kohya's, in which most LoRAs are published. [ours]"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_layers import (
    EMBEDDING,
    FLUX,
    TEXT_ENCODERS,
    Layers,
    check_names,
    find_family,
    kohya_family,
    make_layer,
    missing_metadata,
    parse_key,
    parse_layers,
)
from loras.kohya_names import parse_kohya_key


_LAYERS = {
    "unet": re.compile(r"(down_blocks|up_blocks|mid_block|conv_in|conv_out|time_embedding|add_embedding)\b.*"),
    "transformer": re.compile(
        r"transformer_blocks\.\d+\.(attn|attn2|ff|ff_context|norm1|norm1_context)\..+|"
        r"(pos_embed|context_embedder|time_text_embed|norm_out|proj_out)\b.*"
    ),
    "text_encoder": re.compile(r"encoder\.layers\..+|text_projection"),  # the last of Stable Diffusion 3
    "text_encoder_2": re.compile(r"encoder\.layers\..+|text_projection"),
}
_FAMILIES = "Stable Diffusion 1.x, 2.x, XL or 3"
_NO_WEIGHT = "is no LoRA weight of Stable Diffusion's UNet or text encoder, nor of its transformer"


@dataclass(frozen=True)
class LoraFile:
    """A LoRA as it lies in a file."""

    layers: Layers
    family: str | None  # STABLE_DIFFUSION, SDXL or SD3; None where nothing in the file tells
    is_kohya: bool  # whether it has names of kohya's format
    note: str  # what to say of textual inversions that lie beside it; empty if there are none
    # Whether diffusers takes each layer's rank and alpha as they are here. Where metadata leaves one out, PEFT has a
    # number of its own; without any metadata both take the rank as alpha, but diffusers finds that of a text encoder's
    # layers by their names in its own model alone, and of a projection it finds none.
    reads_as_meant: bool

    @property
    def is_dora(self) -> bool:
        """Whether a layer has a magnitude."""
        return any(layer.magnitude is not None for group in self.layers.values() for layer in group.values())


def read_lora(path: Path) -> LoraFile:
    """Read a `.safetensors` file of either format.

    Raises ValueError: it is damaged, or no LoRA of Stable Diffusion 1.x, 2.x, XL or 3; one line without the path.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = _read_metadata(file)
            embeddings = [key for key in file.keys() if key.startswith(EMBEDDING)]
            tensors = {key: file.get_tensor(key) for key in file.keys() if key not in embeddings}
    except SafetensorError as error:
        raise ValueError(f"no safetensors file, and a pickle is not read ({error})") from error
    if not tensors:
        raise ValueError("holds no LoRA")
    check_names(tensors)
    is_kohya = any(name.startswith(("lora_unet_", "lora_te")) for name in tensors)
    for key in tensors if not is_kohya else ():
        place = parse_key(key)
        if place is None or place[0] not in _LAYERS:
            raise ValueError(f"{key!r} {_NO_WEIGHT}")
    layers = _read_kohya(tensors) if is_kohya else parse_layers(tensors, metadata)
    family = find_family(layers) or kohya_family(tensors)
    if family == FLUX:
        raise ValueError(f"this is a {FLUX} LoRA, and only those of {_FAMILIES} are read")
    for model, group in layers.items():
        for layer in group:
            if not _LAYERS[model].fullmatch(layer):
                wrong = f"is no layer of {_FAMILIES} ({model})" if is_kohya else _NO_WEIGHT
                raise ValueError(f"{layer!r} {wrong}")
    words = ", ".join(dict.fromkeys(key.removeprefix(EMBEDDING).split(".")[0] for key in embeddings))
    note = f"holds a textual inversion ({words}), which is left out: only the LoRA is read" if embeddings else ""
    if metadata:
        lacks = any(missing_metadata(metadata, model) for model in layers)
    else:
        lacks = not layers.keys().isdisjoint(TEXT_ENCODERS) and not any("lora_magnitude" in key for key in tensors)
    return LoraFile(layers, family, is_kohya, note, not (is_kohya or embeddings or lacks))


def _read_metadata(file: Any) -> dict:
    try:
        metadata = json.loads((file.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "{}"))
    except ValueError as error:
        raise ValueError(f"its metadata {LORA_ADAPTER_METADATA_KEY} is no JSON ({error})") from error
    if not isinstance(metadata, dict):
        raise ValueError(f"its metadata {LORA_ADAPTER_METADATA_KEY} has another form than diffusers writes")
    return metadata


def _read_kohya(tensors: Mapping[str, Tensor]) -> Layers:
    found: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        place = parse_kohya_key(key)
        if place is None:
            raise ValueError(f"{key!r} is no weight that a LoRA of Stable Diffusion 1.x, 2.x or XL has")
        model, layer, part = place
        if part == "dora_scale":
            unclear = "what wrote it decides what its magnitude means, so it cannot be read"
            raise ValueError(f"a DoRA in kohya's format ({key!r}): {unclear}")
        weights = found.setdefault((model, layer), {})
        if part in weights:
            raise ValueError(f"layer '{model}.{layer}' is there under two names, one of them {key!r}")
        weights[part] = tensor
    layers: Layers = {}
    for (model, layer), weights in found.items():
        layers.setdefault(model, {})[layer] = make_layer(f"{model}.{layer}", weights, weights.pop("alpha", None))
    return layers
