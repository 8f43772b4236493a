"""Loading what a user names: an error of one line says what it was, and tokenizers are really there. [ours]"""

import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import (
    DiffusionPipeline,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from transformers import CLIPTokenizer, PreTrainedTokenizerBase

from programs.console import without_warning
from programs.single_file import SingleFile


Pipeline = TypeVar("Pipeline", bound=StableDiffusionPipeline | StableDiffusionXLPipeline | StableDiffusion3Pipeline)
# How a model that is one file ends, as other programs keep it.
_SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


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


def load_tokenizer(
    name: str, kind: type[PreTrainedTokenizerBase] = CLIPTokenizer, **kwargs: str | None
) -> PreTrainedTokenizerBase:
    """A tokenizer; a ValueError where its files are missing and transformers makes up one without words."""
    tokenizer = kind.from_pretrained(name, **kwargs)
    if len(tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens)) < 26:
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


def load_pipeline(
    kind: type[Pipeline], name: str, dtype: torch.dtype | dict[str, torch.dtype], flag: str = "base_model", *,
    file: SingleFile | None = None, **options: Any,
) -> Pipeline:  # fmt: skip
    """A pipeline of this class, on the CPU, from the folder, id or file that a flag names and `find_base` looked at.

    A pickle is not read.

    Args:
        dtype: of all models, or by component, with those of all others under "default".
        file: what was found of it, if it is one file.
        options: further arguments of `from_pretrained` or `from_single_file`: other components, None for none.

    Raises InputError: it cannot be loaded, or has weights in pickles alone.
    """
    with naming_flag(flag, name):
        if file is not None and file.layout.is_whole:
            return _load_single_file(kind, file, dtype, options)
        if file is not None:
            name, options = file.config, _with_transformer(file, dtype, options)
        try:
            options = _left_out(kind, name, options) | options
            return kind.from_pretrained(name, dtype=dtype, use_safetensors=True, **options)
        except OSError as error:
            pickles = " (pickles, such as .bin, are not read: save the model in safetensors)"
            raise ValueError(f"{error}{pickles if '.safetensors' in str(error) else ''}") from error


def _left_out(kind: type[Pipeline], name: str, options: Mapping[str, Any]) -> dict[str, None]:
    """What a Stable Diffusion 3 that was saved without T5 has none of; its class takes that for missing files, unless
    it is told so.
    """
    where = {key: options[key] for key in ("revision", "cache_dir", "token") if key in options}
    index = kind.load_config(name, **where)
    return {part: None for part in ("text_encoder_3", "tokenizer_3") if index.get(part) == [None, None]}


def _load_single_file(
    kind: type[Pipeline], file: SingleFile, dtype: torch.dtype | dict[str, torch.dtype], options: dict[str, Any]
) -> Pipeline:
    for part in file.layout.text_encoders:
        load_tokenizer(file.folder, subfolder=part.replace("text_encoder", "tokenizer"))
    if file.scheduler:
        options = {"scheduler": file.load_scheduler()} | options
    if "safety_checker" in inspect.signature(kind.__init__).parameters:
        # Such a file has none, whatever its configurations say.
        options = {"safety_checker": None, "requires_safety_checker": False} | options
    return kind.from_single_file(file.path, config=file.folder, dtype=dtype, local_files_only=True, **options)


def _with_transformer(
    file: SingleFile, dtype: torch.dtype | dict[str, torch.dtype], options: dict[str, Any]
) -> dict[str, Any]:
    """What `from_pretrained` is told of a pipeline whose transformer is a file, unless the options have another."""
    if "transformer" in options:
        return {**file.hub, **options}
    own = dtype.get("transformer", dtype["default"]) if isinstance(dtype, dict) else dtype
    with without_false_alarms():
        transformer = SD3Transformer2DModel.from_single_file(
            file.path, config=file.folder, subfolder="transformer", dtype=own, local_files_only=True
        )
    return {**file.hub, **options, "transformer": transformer}


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
