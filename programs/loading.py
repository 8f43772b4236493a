"""Loading what a user names: an error of one line says what it was, and tokenizers are really there. [ours]"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from transformers import CLIPTextConfig, CLIPTokenizer

from programs.console import without_warning
from programs.single_file import SingleFile, find_single_file


Pipeline = TypeVar("Pipeline", bound=StableDiffusionPipeline | StableDiffusionXLPipeline)
# How a model that is one file ends, as other programs keep it.
_SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")

_SDXL = "text_time"  # what its UNet is told besides a prompt: sizes, and the prompt in one vector


class InputError(ValueError):
    """A mistake in what the run was given; its message is one line that names the flag and the value."""


def naming_flag(flag: str, value: str) -> AbstractContextManager[None]:
    """Put a flag and its value before what a library says of them, in one line."""
    return naming(f"--{flag} {value}")


@contextmanager
def naming(subject: str) -> Iterator[None]:
    """Put a subject before what a library says of it, in one line."""
    try:
        yield
    # transformers raises a RuntimeError for weights of other shapes than the configuration's.
    except (ImportError, OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{subject}: {' '.join(str(error).split())}") from error


def load_tokenizer(name: str, **kwargs: str | None) -> CLIPTokenizer:
    """A CLIP tokenizer; a ValueError where its files are missing and transformers makes up an empty one."""
    tokenizer = CLIPTokenizer.from_pretrained(name, **kwargs)
    if len(tokenizer) < 256:
        raise ValueError(f"a tokenizer of {len(tokenizer)} tokens, so its files are missing")
    return tokenizer


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of an id of the Hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def check_model_name(name: str, kind: str | None = None) -> None:
    """Refuse what can be neither a folder nor an id of the Hub, before a library takes it for one of them.

    `kind` is the class of diffusers that turns a single file of such a model into a folder, if there is one.

    Raises ValueError: a single file, or a path where nothing is; one line without `name`.
    """
    path = Path(name)
    if path.is_dir():
        return
    if path.is_file():
        way = "" if kind is None else f": convert it with `{kind}.from_single_file(...).save_pretrained(folder)`"
        raise ValueError(f"a single file, and a folder is needed{way}")
    if not is_hub_id(name):
        raise ValueError("no such file or folder, and no id of the Hub such as user/name")
    if name.endswith(_SINGLE_FILES):
        raise ValueError("no such file or folder")


def find_stock_pipeline(
    name: str, flag: str = "base_model", *, base_config: str | None = None
) -> type[StableDiffusionPipeline] | type[StableDiffusionXLPipeline]:  # fmt: skip
    """diffusers' pipeline for the folder, id or file that a flag names, as the configuration of its UNet says.

    Raises InputError: it has no UNet.
    """
    with naming_flag(flag, name):
        file = find_single_file(name, base_config)
        if file is None:
            check_model_name(name)
        place = name if file is None else file.folder
        index = DiffusionPipeline.load_config(place)
        if "unet" not in index:
            raise ValueError(f"is a {index.get('_class_name')}; known are Stable Diffusion 1.x, 2.x and XL")
        config = UNet2DConditionModel.load_config(place, subfolder="unet")
    return StableDiffusionXLPipeline if config.get("addition_embed_type") == _SDXL else StableDiffusionPipeline


def load_pipeline(
    kind: type[Pipeline], name: str, dtype: torch.dtype, flag: str = "base_model", *, revision: str | None = None,
    cache_dir: str | None = None, base_config: str | None = None, variant: str | None = None,
    prediction_type: str | None = None, **options: Any,
) -> Pipeline:  # fmt: skip
    """A pipeline of this class, on the CPU, from the folder, id or file that a flag names. A pickle is not read.

    Args:
        base_config: where a single file has its configurations from.
        prediction_type: what a flag says of it, which spares the warning of a file that does not say so itself.
        options: further arguments of `from_pretrained` and `from_single_file`: other components, None for none.

    Raises InputError: it cannot be loaded, has weights in pickles alone, or is a model that takes more than a prompt
    and noise.
    """
    hub = {"revision": revision, "cache_dir": cache_dir}
    with naming_flag(flag, name):
        file = find_single_file(name, base_config, variant=variant, without=options, **hub)
        if file is None:
            check_model_name(name)
        config = UNet2DConditionModel.load_config(name if file is None else file.folder, subfolder="unet", **hub)
        is_sdxl = issubclass(kind, StableDiffusionXLPipeline)
        if config.get("addition_embed_type") != (_SDXL if is_sdxl else None) or config.get("in_channels", 4) != 4:
            family = "SDXL" if is_sdxl else "Stable Diffusion 1.x or 2.x"
            raise ValueError(f"not {family} for text to image, as its UNet's configuration says")
        if is_sdxl:
            _check_no_refiner(config, name if file is None else file.folder, hub)
        if file is not None:
            file.warn(prediction_type)
            return _load_single_file(kind, file, dtype, options)
        try:
            return kind.from_pretrained(name, dtype=dtype, use_safetensors=True, variant=variant, **hub, **options)
        except OSError as error:
            pickles = " (pickles, such as .bin, are not read: save the model in safetensors)"
            raise ValueError(f"{error}{pickles if '.safetensors' in str(error) else ''}") from error


def _check_no_refiner(unet_config: Mapping[str, Any], place: str, hub: dict[str, str | None]) -> None:
    """Tell the refiner by the numbers about a picture's size that its UNet takes, which are 5 and not 6."""
    text = CLIPTextConfig.from_pretrained(place, subfolder="text_encoder_2", **hub)
    width = unet_config["projection_class_embeddings_input_dim"] - text.projection_dim
    if width != 6 * unet_config["addition_time_embed_dim"]:
        raise ValueError("Stable Diffusion XL's refiner, which only goes over pictures: use the base model")


def _load_single_file(kind: type[Pipeline], file: SingleFile, dtype: torch.dtype, options: dict[str, Any]) -> Pipeline:
    for part in file.layout.text_encoders:
        load_tokenizer(file.folder, subfolder=part.replace("text_encoder", "tokenizer"))
    if file.scheduler:
        options = {"scheduler": file.load_scheduler()} | options
    if not issubclass(kind, StableDiffusionXLPipeline):
        # Such a file has no safety checker, whatever its configurations say; SDXL's class has no place for one.
        options = {"safety_checker": None, "requires_safety_checker": False} | options
    return kind.from_single_file(file.path, config=file.folder, dtype=dtype, local_files_only=True, **options)


@contextmanager
def without_false_alarms() -> Iterator[None]:
    """Inside, nothing is said of layers that stay in float32 where there are none, nor of how SDXL's stock pipeline
    brings its VAE to float32 and back for each picture in float16.
    """

    def other(record: logging.LogRecord) -> bool:
        return "that should be kept in float32: []" not in record.getMessage()

    speaker = logging.getLogger("diffusers.models.modeling_utils")
    speaker.addFilter(other)
    try:
        with without_warning("`upcast_vae` is deprecated"):
            yield
    finally:
        speaker.removeFilter(other)


def cast_models(pipeline: DiffusionPipeline, dtype: torch.dtype) -> None:
    """Bring all models to a dtype; diffusers' own way warns of layers that stay in float32 where there are none."""
    for model in pipeline.components.values():
        if isinstance(model, torch.nn.Module):
            torch.nn.Module.to(model, dtype)


def choose_device(name: str | None) -> str:
    """The device of --device, or the best there is for None; an InputError if it does not work."""
    if name is None:
        backends = {"cuda": torch.cuda, "mps": torch.backends.mps}
        return next((device for device, backend in backends.items() if backend.is_available()), "cpu")
    try:
        torch.empty(0, device=name)
    # torch's way to say that it was built without CUDA is an AssertionError.
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return name
