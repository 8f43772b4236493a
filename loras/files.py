"""LoRA files: diffusers' and kohya's format, each read into the other, and LoRAs loaded whole or merged from either.

kohya's is what ComfyUI and A1111 read, and what most LoRAs for Stable Diffusion are published in.
Source: [ours].
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import diffusers
import safetensors.torch
import torch
import transformers
from diffusers import StableDiffusionPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import HFValidationError, HTTPError, RemoteEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open


logger = logging.getLogger(__name__)

# Why a DoRA is not trained on top of another LoRA.
DORA_ON_TOP = (
    "its magnitude would be trained for the weights with the earlier LoRA in them, and where both are loaded side by "
    "side it is taken for that of the original ones"
)
# A model, a layer, and which of its tensors: diffusers renames the attention's, and leaves PEFT's names to others.
_DIFFUSERS_KEY = re.compile(
    r"(unet|text_encoder)\.(.+)[._]"
    r"(?:(?:lora_|lora\.|lora_linear_layer\.)(A|B|down|up)\.weight|lora_(magnitude)_vector(?:\.weight)?)"
)
_KINDS = {"A": "down", "down": "down", "B": "up", "up": "up", "magnitude": "magnitude"}
_KOHYA_KEY = re.compile(r"lora_(unet|te)_(\w+)\.(?:lora_(down|up)\.weight|(alpha)|(dora_scale))")
_KOHYA_MODELS = {"unet": "unet", "te": "text_encoder"}
# What kohya's names, which have "_" for every ".", hold of names with a "_" of their own.
_COMPOUNDS = (
    "down_blocks|up_blocks|mid_block|transformer_blocks|time_emb_proj|time_embedding|linear_1|linear_2|conv_shortcut|"
    "conv_in|conv_out|proj_in|proj_out|to_q|to_k|to_v|to_out|text_model|self_attn|q_proj|k_proj|v_proj|out_proj"
)
_KOHYA_PART = re.compile(rf"({_COMPOUNDS}|[^_]+)(?:_|$)")
_LAYERS = {
    "unet": re.compile(r"(down_blocks|up_blocks|mid_block|conv_in|conv_out|time_embedding)\b.*"),
    "text_encoder": re.compile(r"encoder\.layers\..+"),
}
_SUFFIX = ".safetensors"
_EMBEDDING = "bundle_emb."  # begins the names of a textual inversion that trainers put beside a LoRA's layers
# Of a page of the Hub: repository, revision, and a file or folder in it.
_HUB_PAGE = re.compile(r"([^/]+/[^/]+)(?:/(blob|raw|resolve|tree)/([^/]+)(?:/(.+))?)?")
_SD2_TEXT_WIDTH = 1024  # of the text embeddings that a cross-attention layer reads; SD 1.x has 768


@dataclass(frozen=True)
class LoraLayer:
    """What a LoRA adds to the weight of one layer: `alpha / rank * up @ down`.

    Args:
        down: (rank, in) or, of a convolution, (rank, in, h, w).
        up: (out, rank) or (out, rank, 1, 1).
        alpha: any real number.
        magnitude: (out,) a DoRA's norm of each output's weight, or None.
    """

    down: torch.Tensor
    up: torch.Tensor
    alpha: float
    magnitude: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        return len(self.down)


Layers = dict[str, dict[str, LoraLayer]]  # by model, "unet" and "text_encoder", and by the layer's name in it


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


# ------------------------------------------------------------------------------------------------------------- finding


def clean_source(source: str) -> str:
    """A LoRA's name without what comes with it when it is copied: quotes, "~", and an address of the Hub.

    Args:
        source: as a user gives it.

    Returns:
        A path or an id, as of `find_lora`; what is one already is returned as it is.

    Raises:
        ValueError: an address that is of no LoRA on the Hub; one line without `source`.

    Source: [ours].
    """
    text = source.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        text = text[1:-1].strip()
    return _read_address(text) if text.startswith(("http://", "https://")) else os.path.expanduser(text)


def _read_address(address: str) -> str:
    """The id that an address of the Hub is of."""
    parts = urlsplit(address)
    match = _HUB_PAGE.fullmatch(unquote(parts.path).strip("/"))
    hosts = ("huggingface.co", "www.huggingface.co", "hf.co", urlsplit(constants.ENDPOINT).netloc)
    if match is None or parts.netloc not in hosts:
        raise ValueError("not the address of a LoRA on the Hub, such as https://huggingface.co/user/name")
    repository, kind, revision, file = match.groups()
    if revision not in (None, "main"):
        raise ValueError(f"of the revision {revision!r}, and only main is read: download the file and name that")
    if kind not in (None, "tree") and not (file or "").endswith(_SUFFIX):
        raise ValueError(f"not a {_SUFFIX} file")
    if file is not None and not file.endswith(_SUFFIX):
        file = f"{file}/{LORA_WEIGHT_NAME_SAFE}"
    return repository if file is None else f"{repository}/{file}"


def find_lora(source: str, cache_dir: str | None = None) -> Path:
    """The file that is meant: one of this machine, or else downloaded from the Hub.

    Args:
        source: a `.safetensors` file, a folder with one, or of the Hub "user/name", "user/name/file.safetensors" or
            their address; `clean_source` takes off what was copied along.
        cache_dir: where the Hub's files are kept.

    Returns:
        The file here.

    Raises:
        ValueError: there is no such file, or several; one line without `source`.

    Source: [ours].
    """
    path, place = Path(clean_source(source)), find_on_hub(source)
    if path.is_file():
        if path.suffix != _SUFFIX:
            raise ValueError(f"not a {_SUFFIX} file")
        return path
    if path.is_dir():
        names = sorted(file.name for file in path.glob(f"*{_SUFFIX}"))
        if LORA_WEIGHT_NAME_SAFE in names:
            return path / LORA_WEIGHT_NAME_SAFE
        if len(names) != 1:
            raise ValueError(
                f"the folder has no {LORA_WEIGHT_NAME_SAFE}, and {len(names)} {_SUFFIX} files instead of one"
            )
        return path / names[0]
    if place is None:
        raise ValueError("no such file or folder")
    with _asking_hub(place[1], "no file or folder of this machine, nor found on the Hub"):
        return Path(hf_hub_download(*place, cache_dir=cache_dir))


def find_on_hub(source: str) -> tuple[str, str] | None:
    """The repository and the file in it that are meant; None for what is here, or can only be a path."""
    source = clean_source(source)
    return None if Path(source).exists() else _parse_id(source)


def _parse_id(source: str) -> tuple[str, str] | None:
    owner, _, rest = source.partition("/")
    repository, _, file = rest.partition("/")
    if repository.endswith(_SUFFIX) or (file and not file.endswith(_SUFFIX)):
        return None
    if ".." in file.split("/") or "\\" in file:  # it would lead out of the repository
        return None
    try:
        validate_repo_id(f"{owner}/{repository}")
    except HFValidationError:
        return None
    return f"{owner}/{repository}", file or LORA_WEIGHT_NAME_SAFE


def download_public_lora(source: str, folder: Path, max_bytes: int) -> Path:
    """A LoRA of a public repository, for somebody whom this machine's files and token are not for.

    No file of this machine is looked at, no token is sent, and what lies in the Hub's cache here is not used: it may
    have come with a token.

    Args:
        source: of the Hub, as of `find_lora`.
        folder: an empty one, for the file.
        max_bytes: the largest file that is downloaded.

    Returns:
        The file in `folder`.

    Raises:
        ValueError: no such file in a public repository, or a larger one; one line without `source`.

    Source: [ours].
    """
    place = _parse_id(clean_source(source))
    if place is None:
        raise ValueError(f"not a public LoRA of the Hub, as user/name or user/name/file{_SUFFIX}")
    with _asking_hub(place[1], "not found among the public LoRAs of the Hub"):
        found = get_hf_file_metadata(hf_hub_url(*place), token=False)
        if found.size is None or found.size > max_bytes:
            size = "of unknown size" if found.size is None else f"{found.size / 1e6:.1f} MB"
            raise ValueError(f"{size}, and at most {max_bytes / 1e6:g} MB are downloaded")
        # That commit, so that it is the file whose size is known.
        return Path(hf_hub_download(*place, revision=found.commit_hash, token=False, local_dir=folder))


@contextmanager
def _asking_hub(file: str, otherwise: str) -> Iterator[None]:
    try:
        yield
    except RemoteEntryNotFoundError as error:
        raise ValueError(f"no {file} there; name the file, as in user/name/file{_SUFFIX}") from error
    except (HTTPError, OSError) as error:
        raise ValueError(f"{otherwise}: {' '.join(str(error).split())}") from error


@contextmanager
def _naming(source: str | Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(f"{source}: {' '.join(str(error).split())}") from error


# ------------------------------------------------------------------------------------------------------------- reading


def read_lora(path: Path) -> Layers:
    """Read a LoRA of either format.

    Args:
        path: a `.safetensors` file. Where it has no alpha, that is the rank, as diffusers and kohya take it.

    Returns:
        The layers.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, or holds something other than a LoRA of Stable Diffusion 1.x or 2.x; one line
            without the path.

    Source: [ours].
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = _read_metadata(file)
            tensors = {key: file.get_tensor(key) for key in file.keys() if not key.startswith(_EMBEDDING)}
    except SafetensorError as error:
        raise ValueError(f"no safetensors file, and a pickle is not read ({error})") from error
    if not tensors:
        raise ValueError("holds no LoRA")
    return _read_kohya(tensors) if _are_kohyas(tensors) else _read_diffusers(tensors, metadata)


def _read_metadata(file: Any) -> dict:
    """What an open file says of ranks and alphas; empty if nothing."""
    try:
        metadata = json.loads((file.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "{}"))
    except ValueError as error:
        raise ValueError(f"its metadata {LORA_ADAPTER_METADATA_KEY} is no JSON ({error})") from error
    if not isinstance(metadata, dict) or not all(
        isinstance(metadata.get(f"{model}.alpha_pattern") or {}, dict) for model in _LAYERS
    ):
        raise ValueError(f"its metadata {LORA_ADAPTER_METADATA_KEY} has another form than diffusers writes")
    return metadata


def embedding_note(path: Path) -> str:
    """What to say of textual inversions that lie in a LoRA's file; empty if there are none. Source: [ours]."""
    with safe_open(path, "pt") as file:
        names = [key.removeprefix(_EMBEDDING) for key in file.keys() if key.startswith(_EMBEDDING)]
    words = dict.fromkeys(name.split(".")[0] for name in names)
    return f"holds a textual inversion ({', '.join(words)}), which is left out: only the LoRA is read" if words else ""


def is_kohya(path: Path) -> bool:
    """Whether a `.safetensors` file has names of kohya's format."""
    with safe_open(path, "pt") as file:
        return _are_kohyas(file.keys())


def is_dora(lora: Layers) -> bool:
    """Whether a layer has a magnitude."""
    return any(layer.magnitude is not None for group in lora.values() for layer in group.values())


def _are_kohyas(names: Iterable[str]) -> bool:
    return any(name.startswith(("lora_unet_", "lora_te")) for name in names)


def _read_diffusers(tensors: dict[str, torch.Tensor], metadata: dict) -> Layers:
    found: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = _DIFFUSERS_KEY.fullmatch(key)
        if match is None:
            raise ValueError(f"{key!r} is no LoRA weight of Stable Diffusion's UNet or text encoder")
        found.setdefault((match[1], _layer_name(match[1], match[2])), {})[_KINDS[match[3] or match[4]]] = tensor
    return _collect({place: (weights, _alpha_of(metadata, *place)) for place, weights in found.items()})


def _layer_name(model: str, name: str) -> str:
    """The name of a layer, whichever version of diffusers and transformers wrote it."""
    name = name.removeprefix("text_model.").replace(".processor.", ".")
    if model == "unet":
        return re.sub(r"\.to_out$", ".to_out.0", name)
    return re.sub(r"\.to_(q|k|v|out)$", r".\1_proj", name)


def _alpha_of(metadata: dict, model: str, layer: str) -> tuple[float | None, bool]:
    """Of one layer, None if the file has none, and whether the root of the rank divides it (rsLoRA)."""
    pattern = metadata.get(f"{model}.alpha_pattern") or {}
    try:
        key = get_pattern_key(pattern, layer)
    except re.error as error:
        raise ValueError(f"its metadata {model}.alpha_pattern has a name that is no pattern ({error})") from error
    alpha = pattern.get(key, metadata.get(f"{model}.lora_alpha"))
    return alpha, bool(metadata.get(f"{model}.use_rslora"))


def _read_kohya(tensors: dict[str, torch.Tensor]) -> Layers:
    found: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KOHYA_KEY.fullmatch(key)
        if match is None:
            raise ValueError(f"{key!r} is no weight that a LoRA of Stable Diffusion 1.x or 2.x has")
        if match[5]:
            raise ValueError(
                f"a DoRA in kohya's format ({key!r}): what wrote it decides what its magnitude means, so it cannot be "
                "read"
            )
        layer = ".".join(_KOHYA_PART.findall(match[2])).removeprefix("text_model.")
        found.setdefault((_KOHYA_MODELS[match[1]], layer), {})[match[3] or match[4]] = tensor
    alphas = {place: weights.pop("alpha", None) for place, weights in found.items()}
    return _collect({place: (weights, (alphas[place], False)) for place, weights in found.items()})


def _collect(found: dict[tuple[str, str], tuple[dict[str, torch.Tensor], tuple]]) -> Layers:
    layers: Layers = {}
    for (model, layer), (weights, (alpha, rank_stabilized)) in found.items():
        if not _LAYERS[model].fullmatch(layer):
            raise ValueError(f"{layer!r} is no layer of Stable Diffusion 1.x or 2.x ({model})")
        missing = {"down", "up"} - weights.keys()
        if missing:
            raise ValueError(f"layer {layer!r} has no lora_{' and no lora_'.join(sorted(missing))}")
        if min(weights["down"].ndim, weights["up"].ndim) < 2:
            raise ValueError(f"layer {layer!r} has weights that are no matrices")
        rank = len(weights["down"])
        if weights["up"].shape[1] != rank:
            raise ValueError(f"layer {layer!r} has the ranks {rank} and {weights['up'].shape[1]}")
        _check_finite(weights.values(), f"{model}.{layer}")
        alpha = float(rank) if alpha is None else _read_alpha(alpha, f"{model}.{layer}")
        if rank_stabilized:
            alpha *= math.sqrt(rank)  # rsLoRA divides by the root of the rank, and all others by the rank
        layers.setdefault(model, {})[layer] = LoraLayer(alpha=alpha, **weights)
    return layers


def _check_finite(weights: Iterable[torch.Tensor], layer: str) -> None:
    for weight in weights:
        values = weight.float()  # not all kinds of 8-bit numbers can be asked
        if not values.isfinite().all():
            kind = "NaN" if values.isnan().any() else "infinite"
            raise ValueError(f"its weights are not numbers ({kind}) in layer {layer}")


def _read_alpha(alpha: Any, layer: str) -> float:
    try:
        value = float(alpha)
    except (TypeError, ValueError, RuntimeError):  # a list, a text, a tensor of several numbers
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"its alpha is not a number ({alpha}) in layer {layer}")
    return value


def check_lora_fits(lora: Layers, models: Mapping[str, Mapping[str, torch.nn.Module]]) -> None:
    """Compare a LoRA's layers and shapes with those of a base model, of whose weights nothing but the shape is needed.

    Args:
        lora: as of `read_lora`.
        models: the linear and convolutional layers by name, of each model that may have a LoRA: "unet",
            "text_encoder".

    Raises:
        ValueError: it is a LoRA of another model; one line.

    Source: [ours].
    """
    for model, group in lora.items():
        # Some versions of transformers have a CLIPTextModel whose layers lie in a `text_model`, and others do not.
        modules = {name.removeprefix("text_model."): module for name, module in models.get(model, {}).items()}
        for name, layer in group.items():
            if name not in modules:
                raise ValueError(f"{model}.{name} in it belongs to no layer of this base model")
            shape, down, up = (tuple(weight.shape) for weight in (modules[name].weight, layer.down, layer.up))
            magnitude = shape[:1] if layer.magnitude is None else (layer.magnitude.numel(),)
            if down[1:] != shape[1:] or (len(up), up[0]) != (len(shape), shape[0]) or magnitude != shape[:1]:
                raise ValueError(
                    f"{model}.{name} in it adds {up} x {down} to this base model's {shape}: for another model"
                )


# ------------------------------------------------------------------------------------------------------------- writing


def save_kohya_lora(lora: Path, path: Path) -> None:
    """Write a LoRA of diffusers' format in kohya's format, which ComfyUI and A1111 read, whole or not at all.

    Both scale a layer by `alpha / rank`, and kohya's file holds an alpha for each layer. diffusers has a converter of
    its own; it writes `alpha = rank` whatever the alpha, and does not find DoRA's magnitude in a UNet. Its loader
    takes one of the file's alphas for all layers: they are made equal here, and what a layer's own alpha differs is
    put into `lora_up`.

    A DoRA's magnitude is written as (out, 1), one number for each output. No common reader treats it as PEFT does:
    diffusers drops `dora_scale`, ComfyUI divides by the norm of the original weight alone, A1111 by that of columns.

    Args:
        lora: a `.safetensors` file of diffusers' format.
        path: the file to write; its folder exists.

    Raises:
        ValueError: `read_lora` cannot read it; one line that begins with its path.

    Source: [ours].
    """
    with _naming(lora):
        layers = read_lora(lora)
    alpha = _most_common(layer.alpha for group in layers.values() for layer in group.values())
    state, ranks, widths = {}, set(), set()
    for model, group in layers.items():
        for name, layer in group.items():
            prefix = "lora_unet_" if model == "unet" else "lora_te_text_model_"
            key, up = f"{prefix}{name.replace('.', '_')}", layer.up
            if layer.alpha != alpha:
                up = up * (layer.alpha / alpha)
            state |= {f"{key}.lora_down.weight": layer.down, f"{key}.lora_up.weight": up}
            state[f"{key}.alpha"] = torch.tensor(alpha)
            if layer.magnitude is not None:
                # A plain vector would be taken for one number an input, and broadcast along the wrong side.
                state[f"{key}.dora_scale"] = layer.magnitude.reshape(-1, *[1] * (up.ndim - 1))
            ranks.add(layer.rank)
            if "attn2.to_k" in name:
                widths.add(layer.down.shape[1])
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(*ranks) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(alpha),
        # Without it, A1111 takes a LoRA with metadata for one of SD 1.x, and hides it from other models.
        "ss_v2": str(_SD2_TEXT_WIDTH in widths),
    }
    with _whole(path) as whole:
        whole.write_bytes(safetensors.torch.save(state, metadata))
        sort_header(whole)


def save_diffusers_lora(lora: Path, folder: Path) -> Path:
    """Write a LoRA in diffusers' format, each layer with its own rank and alpha.

    Args:
        lora: a `.safetensors` file of kohya's format, or one of diffusers' whose metadata is not whole.
        folder: where the file is written, under the name that diffusers looks for; it is made.

    Returns:
        The file.

    Raises:
        ValueError: `read_lora` cannot read it; one line that begins with its path.

    Source: [ours].
    """
    options = {}
    with _naming(lora):
        layers = read_lora(lora)
        if is_dora(layers):
            raise ValueError("a DoRA is read with whole metadata alone, which names ranks, alphas and layers")
    for model, group in layers.items():
        state, metadata = diffusers_state(group)
        options |= {f"{model}_lora_layers": state, f"{model}_lora_adapter_metadata": metadata}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LORA_WEIGHT_NAME_SAFE
    with _whole(path) as whole:
        StableDiffusionPipeline.save_lora_weights(whole.parent, **options)
        sort_header(whole)
    return path


def diffusers_state(group: Mapping[str, LoraLayer]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """One model's layers as diffusers writes them.

    Args:
        group: the layers by name, none of a DoRA; each may have a rank and an alpha of its own.

    Returns:
        The tensors under PEFT's names, and the metadata that tells ranks and alphas.

    Source: [ours].
    """
    rank = _most_common(layer.rank for layer in group.values())
    alpha = _most_common(layer.alpha for layer in group.values())
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        rank_pattern={name: layer.rank for name, layer in group.items() if layer.rank != rank},
        alpha_pattern={name: layer.alpha for name, layer in group.items() if layer.alpha != alpha},
        target_modules=list(group),
    )
    state = {
        f"{name}.{key}.weight": tensor.contiguous()
        for name, layer in group.items()
        for key, tensor in (("lora_A", layer.down), ("lora_B", layer.up))
    }
    return state, adapter_metadata(config)


def adapter_metadata(config: LoraConfig) -> dict[str, Any]:
    """A LoRA's configuration as its file holds it, the same in each process: a set has no order of its own.

    Source: [ours].
    """
    return {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}


def sort_header(path: Path) -> None:
    """Rewrite a safetensors file with the metadata in order, which safetensors writes in an order of chance.

    Equal runs have equal files then, byte for byte.

    Args:
        path: a whole `.safetensors` file.

    Source: [ours]; the format as safetensors documents it: the header's length in 8 bytes, the header, the tensors.
    """
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors stay aligned
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


def _most_common(values: Iterable[float]) -> float:
    return Counter(values).most_common(1)[0][0]


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Where to write a file that takes its place once it is whole."""
    # In a folder beside it, so that the last step is a rename on one file system.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".saving-") as temporary:
        whole = Path(temporary) / path.name
        yield whole
        os.replace(whole, path)


# ------------------------------------------------------------------------------------------------------------- loading


def load_lora(pipeline: StableDiffusionPipeline, source: str, adapter_name: str, path: Path | None = None) -> None:
    """Load a LoRA whole, and make it the only active one; on an error the pipeline's LoRAs are as they were.

    diffusers warns and goes on where a LoRA, or a part of it, is for another model, and takes one alpha for the
    attention layers of a file in kohya's format. Here the one is an error, and each layer has its own alpha.

    Args:
        pipeline: gets the LoRA on its UNet and, if the file has weights for it, on its text encoder.
        source: as of `find_lora`, in diffusers' or kohya's format.
        adapter_name: a name that no adapter of the pipeline has.
        path: the file, where it is found already.

    Raises:
        ValueError: there is no such LoRA, or it is for another model; one line that begins with `source`.

    Source: [ours].
    """
    active = pipeline.get_active_adapters()
    # On Windows a file cannot be removed while its weights are mapped.
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        _naming(source),
        _quiet_libraries(),
    ):
        path = path or find_lora(source)
        lora = read_lora(path)
        expected = sum(len(group) for group in lora.values())
        if note := embedding_note(path):
            logger.warning("%s: %s", source, note)
        if not _reads_as_meant(path, lora):
            path = save_diffusers_lora(path, Path(folder))
        try:
            pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=adapter_name)
            found = _count_layers(pipeline, adapter_name)
            if found != expected:
                raise ValueError(f"a LoRA for another model: {found} of its {expected} layers are in this one")
        except (ValueError, RuntimeError, TypeError) as error:
            _remove_adapter(pipeline, adapter_name, active)
            if isinstance(error, TypeError):  # of what another version of PEFT wrote
                raise ValueError(f"its metadata is not of a LoRA as PEFT reads it here: {error.__cause__}") from error
            # torch lists each layer whose shape differs; the first tells enough.
            raise ValueError(" ".join(str(error).splitlines()[:2])) from error


def _reads_as_meant(path: Path, lora: Layers) -> bool:
    """Whether diffusers takes rank and alpha of each layer as `read_lora` does.

    Where metadata leaves one out, PEFT has a number of its own; without any metadata both take the rank as alpha.
    """
    with safe_open(path, "pt") as file:
        names, metadata = list(file.keys()), _read_metadata(file)
    if _are_kohyas(names) or any(name.startswith(_EMBEDDING) for name in names):
        return False
    return not metadata or all(
        isinstance(metadata.get(f"{model}.r"), int)
        and isinstance(metadata.get(f"{model}.lora_alpha"), int | float)
        and metadata.get(f"{model}.target_modules")
        for model in lora
    )


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


def merge_loras(pipeline: StableDiffusionPipeline, loras: Sequence[str], scales: Sequence[float]) -> None:
    """Merge LoRAs into the weights of a pipeline, as diffusers computes them when all are active in this order.

    Args:
        pipeline: in float32, so that nothing is rounded that an adapter beside the weights would keep; without
            adapters, before and after.
        loras: at least one, as of `find_lora`.
        scales: their strengths, any real number.

    Raises:
        ValueError: one cannot be loaded or does not fit, or their sum is not finite.

    Source: [ours].
    """
    names = [f"merged_{i}" for i in range(len(loras))]
    # Adapters are made of random numbers before they are filled; what is random later is to be as without them.
    with torch.random.fork_rng(devices=[]):
        for name, lora in zip(names, loras, strict=True):
            load_lora(pipeline, lora, name)
    pipeline.set_adapters(names, list(scales))
    # All at once: a DoRA's magnitude is a factor on the weights it was trained on, without the others.
    try:
        pipeline.fuse_lora(adapter_names=names, safe_fusing=True)
    except ValueError as error:
        numbers = " + ".join(f"{scale:g} x {lora}" for scale, lora in zip(scales, loras, strict=True))
        raise ValueError(f"{numbers}: the base model's weights with this are not numbers") from error
    pipeline.unload_lora_weights()


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Inside, the libraries list no layers without a LoRA: what does not fit comes as one line of ours."""
    levels = [(library, library.utils.logging.get_verbosity()) for library in (diffusers, transformers)]
    try:
        for library, _ in levels:
            library.utils.logging.set_verbosity(logging.CRITICAL)
        yield
    finally:
        for library, level in levels:
            library.utils.logging.set_verbosity(level)
