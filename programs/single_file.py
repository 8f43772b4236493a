"""A base model that is one file of weights: its family by its keys, its configurations from elsewhere.

Of Stable Diffusion 3 the file is the transformer, and the other models are from elsewhere too.
Source: [ours].
"""

import inspect
import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from diffusers import (
    AutoencoderKL,
    ConfigMixin,
    DDIMScheduler,
    SchedulerMixin,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from huggingface_hub import snapshot_download
from safetensors import safe_open

from programs.original_layout import (
    LAYOUTS,
    PREDICTION,
    PUBLISHED_3,
    SD2,
    SD3,
    UNET,
    V_PREDICTION,
    VAE,
    ZERO_SNR,
    Layout,
    original_weights,
    transformer_weights,
)


logger = logging.getLogger(__name__)

_FIRST = UNET + "input_blocks.0.0.weight"
_CONFIGS = ["*.json", "*.txt", "*.model"]  # also those in folders: tokenizers have all of these
_PREDICTIONS = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon"}
_JOINT = "joint_blocks."  # of a transformer of Stable Diffusion 3, with the prefix of a whole model or without
_FLOATS = ("F64", "F32", "F16", "BF16")  # dtypes whose numbers are the weights, as safetensors calls them
_OTHER_MODELS = (VAE, "text_encoders.")  # that may lie beside a transformer
# What is taken for a base model by mistake, by how a name begins.
_MISTAKES = {
    "controlnet_": "a ControlNet", "control_model.": "a ControlNet", "double_blocks.": "a transformer of Flux",
    "single_transformer_blocks.": "a transformer of Flux",
    "transformer_blocks.": "a transformer under diffusers' own names: give the folder of the whole model",
}  # fmt: skip


@dataclass(frozen=True)
class SingleFile:
    """A base model in one file, checked without its weights."""

    path: str
    layout: Layout
    config: str  # the folder or id of the Hub with its configurations, and with the models that are not in it
    folder: str  # where the configurations lie on this machine
    scheduler: Mapping[str, Any]  # what the file says of its scheduler's configuration
    hub: Mapping[str, str | None]  # the revision of `config`, and the folder of its cache

    def load_scheduler(self) -> SchedulerMixin:
        """Its scheduler, DDIM where the configured one knows nothing of a signal that ends at zero."""
        config = _read(DDIMScheduler, self.folder, "scheduler") | self.scheduler
        # The class that diffusers takes where the file says nothing.
        kind = getattr(diffusers, _read_index(self.folder)["scheduler"][1])
        if not self.scheduler.keys() <= inspect.signature(kind).parameters.keys():
            kind = DDIMScheduler
        return kind.from_config(config)

    def warn(self, asked: str | None = None) -> None:
        """Say once what may be another prediction than the file's; `asked` is what a flag says of it."""
        said = self.scheduler.get("prediction_type")
        if said is None and asked is None and self.layout is SD2:
            own = _read(DDIMScheduler, self.folder, "scheduler").get("prediction_type", "epsilon")
            _warn_once(
                f"{self.path} does not say what its UNet predicts, which Stable Diffusion 2.x has both of; it is read "
                f"as {own}, as {self.config} says"
            )
        elif None not in (said, asked) and said != asked:
            _warn_once(f"{self.path} says that its UNet predicts {said}, and --prediction_type {asked} is taken")


def find_single_file(
    name: str, base_config: str | None, *, revision: str | None = None, cache_dir: str | None = None,
    variant: str | None = None, without: Collection[str] = (),
) -> SingleFile | None:  # fmt: skip
    """What a base model's name says if it is a file, None for a folder or an id of the Hub.

    Args:
        base_config: folder or id of the Hub with the configurations, and with the models that are not in the file;
            None for the family's published repository.
        without: components that come from elsewhere, or are not needed.

    Raises ValueError, OSError: no such file, a pickle, no base model, or one that does not fit its configurations.
    """
    path = Path(name)
    if not path.is_file():
        if base_config is not None:
            if not path.is_dir() and (path.suffix in (".safetensors", ".ckpt") or _is_path(name)):
                raise ValueError("no such file")
            raise ValueError(f"--base_config {base_config} is for a base model in one file")
        return None
    if path.suffix == ".gguf":
        raise ValueError("GGUF, whose weights are quantised, is not read: give the model in safetensors")
    if path.suffix != ".safetensors":
        raise ValueError("a pickle, such as .ckpt, is not read: save the model in safetensors, as a file or folder")
    if variant is not None:
        raise ValueError(f"one file has no variants, so --variant {variant} means nothing")
    with safe_open(name, "pt") as file:
        tensors = {key: file.get_slice(key) for key in file.keys()}
        shapes = {key: tuple(tensor.get_shape()) for key, tensor in tensors.items()}
        dtypes = {key: tensor.get_dtype() for key, tensor in tensors.items()}
        prediction = _PREDICTIONS.get((file.metadata() or {}).get(PREDICTION, ""))
    layout = _find_layout(shapes)
    config, hub = base_config or layout.repository, {"revision": revision, "cache_dir": cache_dir}
    if config is None:
        raise ValueError(f"is {layout.name} with other blocks than the published ones have: --base_config is needed")
    folder = _find_configs(layout, config, base_config, revision, cache_dir)
    if not layout.is_whole:
        _check_transformer(shapes, dtypes, layout, folder, config)
        _check_other_models(folder, config, without)
        return SingleFile(name, layout, config, folder, {}, hub)  # flow matching has one prediction
    prediction = "v_prediction" if V_PREDICTION in shapes else prediction
    scheduler = {} if prediction is None else {"prediction_type": prediction}
    if ZERO_SNR in shapes:
        # The last timestep is the one without signal, so it has to be among those that are drawn with.
        scheduler |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    _check_fits(shapes, layout, folder, config, without)
    return SingleFile(name, layout, config, folder, scheduler, hub)


def _find_layout(shapes: Mapping[str, tuple[int, ...]]) -> Layout:
    known = ", ".join(layout.name for layout in reversed(LAYOUTS))
    _refuse_mistakes(shapes)
    names = [own for key in shapes if (own := key.removeprefix(UNET)).startswith(_JOINT)]
    if names:
        blocks = {name.split(".")[1] for name in names}
        return PUBLISHED_3.get((len(blocks), any(".attn2." in name for name in names)), SD3)
    if _FIRST not in shapes:
        raise ValueError(
            f"no base model in one file ({_FIRST} is missing); known are {known}, and the transformer of {SD3.name}"
        )
    # Playground v2.5 has SDXL's names for everything else.
    if edm := next((key for key in ("edm_mean", "edm_std") if key in shapes), None):
        raise ValueError(f"{edm} in it says that it was trained on another noise (EDM), which is not supported")
    channels = shapes[_FIRST][1]
    if channels != 4:
        raise ValueError(
            f"its UNet takes {channels} channels and not 4 (9 are for inpainting): no model for text to image"
        )
    for layout in LAYOUTS:
        if all(any(key.startswith(prefix) for key in shapes) for prefix in layout.text_encoders.values()):
            return layout
    if any(key.startswith("conditioner.embedders.0.model.") for key in shapes):
        raise ValueError("the refiner of Stable Diffusion XL is no base model")
    raise ValueError(f"it has no text encoder of a family that is known: {known}")


def _refuse_mistakes(names: Collection[str]) -> None:
    if any("lora_" in name for name in names):
        raise ValueError("no base model in one file but a LoRA")
    for begin, what in _MISTAKES.items():
        if any(name.removeprefix(UNET).startswith(begin) for name in names):
            raise ValueError(f"no base model in one file but {what}")


def _find_configs(
    layout: Layout, config: str, base_config: str | None, revision: str | None, cache_dir: str | None
) -> str:
    """The folder of the configurations, from the Hub or its cache unless it is one already."""
    if Path(config).is_dir():
        if not Path(config, "model_index.json").is_file():
            raise ValueError(f"--base_config {config}: there is no model_index.json in it")
        return config
    if Path(config).exists() or _is_path(config):
        raise ValueError(f"--base_config {config}: no such folder, and no id of the Hub such as user/name")
    try:
        return snapshot_download(config, revision=revision, cache_dir=cache_dir, allow_patterns=_CONFIGS)
    except OSError as error:
        source = f"--base_config {config}" if base_config else f"{config}, where --base_config may name another"
        raise ValueError(f"is {layout.name}, and its configuration is that of {source}: {error}") from error


def _is_path(name: str) -> bool:
    """Whether a name can be no id of the Hub."""
    return name.count("/") > 1 or name.startswith((".", "/"))


def _check_fits(
    shapes: Mapping[str, tuple[int, ...]], layout: Layout, folder: str, config: str, without: Collection[str]
) -> None:
    """Compare the file's tensors with those of the models as they are configured."""
    index = _read_index(folder)
    encoders = {name for name in index if name.startswith("text_encoder") and index[name][0] is not None}
    if encoders != layout.text_encoders.keys():
        raise ValueError(f"is {layout.name}, and {config} is the configuration of a {index.get('_class_name')}")
    states: dict[str, Mapping[str, torch.Tensor]] = {}
    with init_empty_weights():
        for component, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
            if component not in without:
                states[component] = kind.from_config(_read(kind, folder, component)).state_dict()
        for component in encoders - set(without):
            kind = getattr(transformers, index[component][1])
            own = kind.config_class.from_pretrained(folder, subfolder=component)
            states[component] = kind(own).state_dict()
    for name, tensor in original_weights(layout, states).items():
        if name not in shapes:
            raise ValueError(f"{name} is missing in it, which {config} configures")
        # Some have the attention of the VAE as linear layers, which diffusers reads as well.
        found = tuple(size for i, size in enumerate(shapes[name]) if i < 2 or size != 1)
        if found != tuple(size for i, size in enumerate(tensor.shape) if i < 2 or size != 1):
            raise ValueError(f"{name} is {shapes[name]} in it, and {tuple(tensor.shape)} as {config} configures it")


def _check_transformer(
    shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str], layout: Layout, folder: str, config: str
) -> None:
    """Compare the file's tensors with those of the transformer as it is configured, both ways: diffusers leaves out
    what it has no place for.
    """
    index, kind = _read_index(folder), SD3Transformer2DModel
    if (index.get("transformer") or (None, None))[1] != kind.__name__:
        raise ValueError(f"is {layout.name}, and {config} is the configuration of a {index.get('_class_name')}")
    with torch.device("meta"):  # its table of positions alone may take a gigabyte
        state = kind.from_config(_read(kind, folder, "transformer")).state_dict()
    prefix = UNET if any(name.startswith(UNET) for name in shapes) else ""
    expected = {prefix + name: tuple(tensor.shape) for name, tensor in transformer_weights(state).items()}
    for name, shape in expected.items():
        if name not in shapes:
            raise ValueError(f"{name} is missing in it, which {config} configures")
        if dtypes[name] not in _FLOATS:
            raise ValueError(f"{name} is {dtypes[name]} in it, and weights are read in float32, float16 or bfloat16")
        if shapes[name] != shape:
            raise ValueError(f"{name} is {shapes[name]} in it, and {shape} as {config} configures it")
    for name in shapes:
        if name.startswith(prefix) and not name.startswith(_OTHER_MODELS) and name not in expected:
            raise ValueError(f"{name} is in it, and in no transformer as {config} configures it")


def _check_other_models(folder: str, config: str, without: Collection[str]) -> None:
    """That a folder is no mere configuration; what the Hub has is known when it is downloaded."""
    index = _read_index(folder)
    models = {name for name in index if name.startswith(("text_encoder", "vae")) and index[name][0] is not None}
    for name in sorted(models - set(without)) if Path(config).is_dir() else ():
        if not any(Path(config, name).glob("*.safetensors")):
            raise ValueError(
                f"is the transformer alone, and --base_config {config} has no weights of its {name} in safetensors"
            )


def _read(kind: type[ConfigMixin], folder: str, part: str) -> dict[str, Any]:
    return kind.load_config(folder, subfolder=part, local_files_only=True)


def _read_index(folder: str) -> dict[str, Any]:
    return json.loads(Path(folder, "model_index.json").read_text(encoding="utf-8"))


@cache
def _warn_once(message: str) -> None:
    logger.warning(message)
