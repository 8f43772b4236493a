"""The layers of a LoRA: read from tensors under any of diffusers' names, and compared with a model's. [ours]"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft.utils.other import get_pattern_key
from torch import Tensor


EMBEDDING = "bundle_emb."  # begins the names of a textual inversion that trainers put beside a LoRA's layers
# A model, a layer, and which of its tensors. One tensor has three names: PEFT's, diffusers' own, and an older one.
_KEY = re.compile(
    r"(\w+)\.(.+)[._]"
    r"(?:(?:lora_|lora\.|lora_linear_layer\.)(A|B|down|up)\.weight|lora_(magnitude)_vector(?:\.weight)?)"
)
_SIDES = {"A": "down", "B": "up"}
# What PEFT has numbers of its own for where metadata leaves it out.
_NEEDED = {"r": int, "lora_alpha": (int, float), "target_modules": (str, list)}
_ANOTHER = "is for another architecture: {}; it needs a model as it was trained on"
# The families that a LoRA can be for; of Flux none is read, but its layers begin like those of Stable Diffusion 3.
STABLE_DIFFUSION, SDXL, SD3, FLUX = "Stable Diffusion 1.x or 2.x", "SDXL", "Stable Diffusion 3", "Flux"
# A pipeline's components that can have a LoRA.
DENOISERS, TEXT_ENCODERS = ("unet", "transformer"), ("text_encoder", "text_encoder_2")
# What no UNet of Stable Diffusion 1.x and 2.x has: micro-conditioning, and several blocks in a transformer.
_OF_SDXL = re.compile(r"add_embedding\b.*|.*\.transformer_blocks\.[1-9].*")
_KOHYA_SDXL = re.compile("lora_te[12]_|lora_unet_(input_blocks|middle_block|output_blocks|label_emb)_")
_PROMPT_WIDTHS = {2048: SDXL, 1024: STABLE_DIFFUSION, 768: STABLE_DIFFUSION}
# What no transformer of Stable Diffusion 3 has, and what both have of different widths. Other models than Flux have
# the same names and widths, but more blocks.
_OF_FLUX = re.compile(r"single_transformer_blocks\..*|x_embedder|time_text_embed\.guidance_embedder\..*")
_FLUX_WIDTH, _FLUX_BLOCKS = 3072, {"transformer_blocks": 19, "single_transformer_blocks": 38}
_OF_WIDTH = re.compile(
    r"transformer_blocks\.\d+\."
    r"(attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)|ff(_context)?\.net\.0\.proj|norm1(_context)?\.linear)"
)
_ORIGINAL_SD3 = re.compile(r"(lora_unet_|(model\.)?diffusion_model\.)joint_blocks[._]")


@dataclass(frozen=True)
class LoraLayer:
    """What a LoRA adds to the weight of one layer: `alpha / rank * up @ down`."""

    down: Tensor  # (rank, in) or, of a convolution, (rank, in, h, w)
    up: Tensor  # (out, rank) or (out, rank, 1, 1)
    alpha: float
    magnitude: Tensor | None = None  # (out,), a DoRA's norm of each output's weight

    @property
    def rank(self) -> int:
        return len(self.down)


# By model, one of DENOISERS and TEXT_ENCODERS, and by the layer's name in it.
Layers = dict[str, dict[str, LoraLayer]]


def parse_key(key: str) -> tuple[str, str, str] | None:
    """Model, layer, and "down", "up" or "magnitude", of a name of diffusers; None if it is none of a LoRA."""
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    model, name, side = match[1], match[2].removeprefix("text_model.").replace(".processor.", "."), match[3]
    # As the layers are called, whichever version of diffusers and transformers wrote it.
    if model in DENOISERS:
        name = re.sub(r"\.to_out$", ".to_out.0", name)
    else:
        name = re.sub(r"\.to_(q|k|v|out)$", r".\1_proj", name)
    return model, name, _SIDES.get(side, side) or match[4]


def parse_layers(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> Layers:
    """The layers of a LoRA in diffusers' format, with ranks and alphas of the file's metadata; where it has no alpha,
    that is the rank. Tensors that are no LoRA's are passed over.

    Raises ValueError: a layer that is not whole, or has no numbers; metadata of another form; one line.
    """
    metadata = metadata or {}
    found: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if place := parse_key(key):
            found.setdefault(place[:2], {})[place[2]] = tensor
    layers: Layers = {}
    for (model, name), weights in found.items():
        layer = make_layer(f"{model}.{name}", weights, _alpha_of(metadata, model, name))
        if metadata.get(f"{model}.use_rslora"):
            # rsLoRA divides by the root of the rank, and all others by the rank.
            layer = replace(layer, alpha=layer.alpha * math.sqrt(layer.rank))
        layers.setdefault(model, {})[name] = layer
    return layers


def _alpha_of(metadata: Mapping[str, Any], model: str, layer: str) -> Any:
    pattern = metadata.get(f"{model}.alpha_pattern") or {}
    if not isinstance(pattern, Mapping):
        raise ValueError(f"its metadata {LORA_ADAPTER_METADATA_KEY} has another form than diffusers writes")
    try:
        key = get_pattern_key(pattern, layer)
        # A pattern may be the whole name that the layer has where it lies in a `text_model`.
        key = key if key in pattern or model in DENOISERS else get_pattern_key(pattern, f"text_model.{layer}")
    except re.error as error:
        raise ValueError(f"its metadata {model}.alpha_pattern has a name that is no pattern ({error})") from error
    return pattern.get(key, metadata.get(f"{model}.lora_alpha"))


def make_layer(name: str, weights: Mapping[str, Tensor], alpha: Any = None) -> LoraLayer:
    """One layer of its tensors "down", "up" and, of a DoRA, "magnitude"; its alpha is the rank where a file has none.

    Raises ValueError: it is not whole, its tensors do not belong together, or they or its alpha are no numbers.
    """
    if missing := sorted({"down", "up"} - weights.keys()):
        raise ValueError(f"layer {name!r} has no lora_{' and no lora_'.join(missing)}")
    down, up = weights["down"], weights["up"]
    if down.ndim < 2 or up.ndim != down.ndim:
        raise ValueError(f"layer {name!r} has weights that are no matrices")
    if up.shape[1] != len(down):
        raise ValueError(f"layer {name!r} has the ranks {len(down)} and {up.shape[1]}")
    for weight in weights.values():
        values = weight.float()  # not all kinds of 8-bit numbers can be asked
        if not values.isfinite().all():
            kind = "NaN" if values.isnan().any() else "infinite"
            raise ValueError(f"its weights are not numbers ({kind}) in layer {name}")
    return LoraLayer(alpha=float(len(down)) if alpha is None else read_alpha(alpha, name), **weights)


def read_alpha(alpha: Any, layer: str) -> float:
    """An alpha as a file holds it; a ValueError that names the layer if it is no number."""
    try:
        value = float(alpha)
    except (TypeError, ValueError, RuntimeError):  # a list, a text, a tensor of several numbers
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"its alpha is not a number ({alpha}) in layer {layer}")
    return value


def missing_metadata(metadata: Mapping[str, Any], model: str) -> list[str]:
    """What PEFT needs to know of a model's layers, and metadata does not tell."""
    given = {key: metadata.get(f"{model}.{key}") for key in _NEEDED}
    return [key for key, kind in _NEEDED.items() if not isinstance(given[key], kind) or given[key] in ("", [])]


def with_whole_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A DoRA's magnitudes under PEFT's own names; its files leave out the last part, and transformers, which loads a
    text encoder's, then leaves out the magnitudes themselves.
    """
    return {f"{key}.weight" if key.endswith("lora_magnitude_vector") else key: v for key, v in tensors.items()}


def find_family(lora: Layers) -> str | None:
    """STABLE_DIFFUSION, SDXL, SD3 or FLUX, as names and widths of layers tell; None where they fit several.

    Two text encoders alone are SDXL's and Stable Diffusion 3's alike, and called SDXL's.
    """
    if "transformer" in lora:
        return FLUX if _is_flux(lora["transformer"]) else SD3
    unet = lora.get("unet", {})
    if "text_encoder_2" in lora or any(map(_OF_SDXL.fullmatch, unet)):
        return SDXL
    widths = (layer.down.shape[1] for name, layer in unet.items() if name.endswith(("attn2.to_k", "attn2.to_v")))
    return next((_PROMPT_WIDTHS[width] for width in widths if width in _PROMPT_WIDTHS), None)


def _is_flux(transformer: Mapping[str, LoraLayer]) -> bool:
    for name in transformer:
        block, _, rest = name.partition(".")
        number = rest.partition(".")[0]
        if number.isdecimal() and int(number) >= _FLUX_BLOCKS.get(block, math.inf):
            return False
    return any(
        _OF_FLUX.fullmatch(name) or (_OF_WIDTH.fullmatch(name) and layer.down.shape[1] == _FLUX_WIDTH)
        for name, layer in transformer.items()
    )


def kohya_family(keys: Iterable[str]) -> str | None:
    """STABLE_DIFFUSION, SDXL or SD3, as names that begin with "lora_" tell; None where families share them, and for
    other names.

    They tell more than what diffusers makes of them, which calls SDXL's first text encoder as the one of Stable
    Diffusion.
    """
    keys = list(keys)
    if any(map(_ORIGINAL_SD3.match, keys)):
        return SD3
    # Some trainers give Stable Diffusion's blocks their original names, too.
    if any(key.startswith("lora_te_") for key in keys):
        return STABLE_DIFFUSION
    return SDXL if any(map(_KOHYA_SDXL.match, keys)) else None


def check_names(keys: Iterable[str]) -> None:
    """Refuse the names of LoRAs of Stable Diffusion 3 that diffusers passes over.

    Raises ValueError: they are of the original model, as sd-scripts has them, or of T5; one line.
    """
    for key in keys:
        if _ORIGINAL_SD3.match(key):
            raise ValueError(
                f"a {SD3} LoRA with the original model's names, as sd-scripts writes them ({key!r}), which diffusers "
                "does not read: its own begin with 'transformer.'"
            )
        if key.startswith("text_encoder_3."):
            raise ValueError(f"has layers of T5 ({key!r}), and diffusers loads no LoRA into text_encoder_3")


def check_fits(
    lora: Layers, models: Mapping[str, Mapping[str, torch.nn.Module]], family: str | None = None
) -> None:  # fmt: skip
    """Compare a LoRA's layers and shapes with the modules by name of the UNet or transformer and of text encoders, by
    the names that they have in a pipeline; they need no weights.

    `family` is what a LoRA is known to be for; by default what `find_family` tells.

    Raises ValueError: it is a LoRA of another model; one line.
    """
    _check_family(lora, models, family or find_family(lora))
    for model, group in lora.items():
        # Beside an earlier LoRA, the layer itself is a `base_layer`. Some versions of transformers have a
        # CLIPTextModel whose layers lie in a `text_model`, and others do not.
        modules = {
            name.replace(".base_layer", "").removeprefix("text_model."): module
            for name, module in models.get(model, {}).items()
        }
        for name, layer in group.items():
            shape = _weight_shape(modules.get(name))
            if shape is None:
                raise ValueError(_ANOTHER.format(f"there is no layer {model}.{name}"))
            magnitude = layer.up if layer.magnitude is None else layer.magnitude.reshape(-1)
            for own in ((len(layer.up), *layer.down.shape[1:]), (len(magnitude), *shape[1:])):
                if own != shape:
                    features, others = (" x ".join(map(str, sizes)) for sizes in (own, shape))
                    raise ValueError(_ANOTHER.format(f"{model}.{name} has {features} features, not {others}"))


def _check_family(lora: Layers, models: Mapping[str, Mapping[str, torch.nn.Module]], family: str | None) -> None:
    if "transformer" in models:
        # Here a UNet's layers tell a LoRA of SDXL: names of two text encoders do not.
        own, is_other = SD3, "unet" in lora or family not in (None, SD3, SDXL)
    else:
        has_sizes = any(name.startswith("add_embedding") for name in models.get("unet", {}))
        own = SDXL if has_sizes or "text_encoder_2" in models else STABLE_DIFFUSION
        is_other = family not in (None, own)
    if is_other:
        kind = "LoRA of a UNet" if family is None else f"{family} LoRA"
        raise ValueError(f"this is {'an' if family == SDXL else 'a'} {kind}, and the base model is {own}")


def check_loadable(
    tensors: Mapping[str, Tensor], alphas: Mapping[str, Any] | None, metadata: Mapping[str, Any] | None,
    models: Mapping[str, Mapping[str, torch.nn.Module]], family: str | None = None,
) -> None:  # fmt: skip
    """Whether diffusers loads a LoRA, as of its `lora_state_dict`, into models, as of `check_fits`, as it is meant.

    `family` is what the file's own names tell, where those of diffusers do not.

    Raises ValueError: it is for other models, damaged, or what diffusers takes for something else; one line.
    """
    if embedding := next((key for key in tensors if key.startswith(EMBEDDING)), None):
        raise ValueError(
            f"holds a textual inversion beside its layers ({embedding!r}), and diffusers reads none of both: "
            "export_spf_portrait_lora.py writes the LoRA without it"
        )
    check_names(tensors)
    lora = parse_layers(tensors, metadata)
    if not lora:
        # diffusers leaves kohya's names as they are where a transformer has none.
        if "transformer" in models and any(key.startswith(("lora_unet_", "lora_te")) for key in tensors):
            _check_family({"unet": {}}, models, family)
        raise ValueError("has no LoRA layer that is known here")
    for layer, alpha in (alphas or {}).items():
        read_alpha(alpha, layer)
    for model in lora if metadata else ():
        if missing := missing_metadata(metadata, model):
            raise ValueError(f"its metadata tells no {' and no '.join(missing)} of the {model}'s layers")
    check_fits(lora, models, find_family(lora) or family)


def _weight_shape(layer: torch.nn.Module | None) -> tuple[int, ...] | None:
    """Of a layer's weights, of which quantized ones do not tell it; None for modules of other kinds."""
    if getattr(layer, "weight", None) is None:
        return None
    if hasattr(layer, "in_channels"):
        return (layer.out_channels, layer.in_channels, *layer.kernel_size)
    return (layer.out_features, layer.in_features) if hasattr(layer, "in_features") else None
