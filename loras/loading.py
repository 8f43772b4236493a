"""LoRAs of either format on a pipeline: loaded whole, or merged into its weights. Source: [ours]."""

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from peft.tuners.tuners_utils import BaseTunerLayer

from lora_layers import DENOISERS, TEXT_ENCODERS, Layers, check_fits
from loras.finding import find_lora
from loras.reading import read_lora
from loras.writing import save_diffusers_lora
from programs.loading import naming


logger = logging.getLogger(__name__)

LoraPipeline = StableDiffusionPipeline | StableDiffusionXLPipeline | StableDiffusion3Pipeline
# Why a DoRA is not trained on top of another LoRA.
DORA_ON_TOP = (
    "its magnitude would be trained for the weights with the earlier LoRA in them, and where both are loaded side by "
    "side it is taken for that of the original ones"
)


@dataclass(frozen=True)
class ReferenceLora:
    """An earlier LoRA that stays as it is while a new one is trained on top of it."""

    name: str  # as it was given: a file, a folder, or an id of the Hub
    path: Path
    hub_file: tuple[str, str] | None  # repository and file on the Hub; None for a file of this machine
    sha256: str  # of the file's content, in hexadecimal digits
    scale: float  # how strongly it is active


def load_lora(pipeline: LoraPipeline, source: str, adapter_name: str, path: Path | None = None) -> str:
    """Load a LoRA whole, and make it the only active one; on an error the pipeline's LoRAs are as they were.

    diffusers warns and goes on where a LoRA, or a part of it, is for another model, and takes one alpha for the
    attention layers of a file in kohya's format; transformers leaves the magnitudes of a DoRA out. Here the one is an
    error, and each layer has its own alpha and magnitude.

    Args:
        source: as of `find_lora`, in diffusers' or kohya's format.
        adapter_name: a name that no adapter of the pipeline has.
        path: the file, where it is found already.

    Returns: The file's `LoraFile.note`.
    Raises ValueError: there is no such LoRA, or it is for another model; one line that begins with `source`.
    """
    active = pipeline.get_active_adapters()
    # The libraries list layers without a LoRA: what does not fit is one line of ours. On Windows a file cannot be
    # removed while its weights are mapped.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, naming(source), _quiet_libraries():
        path = path or find_lora(source)
        lora = read_lora(path)
        parts = (*DENOISERS, *TEXT_ENCODERS)
        models = {name: pipeline.components[name] for name in parts if pipeline.components.get(name) is not None}
        check_fits(lora.layers, {name: dict(model.named_modules()) for name, model in models.items()}, lora.family)
        if not lora.reads_as_meant:
            path = save_diffusers_lora(path, Path(folder))
        try:
            pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=adapter_name)
            layers = [module for model in models.values() for module in model.modules()]
            found = sum(isinstance(layer, BaseTunerLayer) and adapter_name in layer.lora_A for layer in layers)
            expected = sum(map(len, lora.layers.values()))
            if found != expected:
                raise ValueError(f"its metadata names {found} of its {expected} layers")
            _put_magnitudes(lora.layers, models, adapter_name)
        except (ValueError, RuntimeError, TypeError) as error:
            if active:
                pipeline.delete_adapters(adapter_name)
                pipeline.set_adapters(active)
            else:
                pipeline.unload_lora_weights()
            if isinstance(error, TypeError):  # of what another version of PEFT wrote
                raise ValueError(f"its metadata is not of a LoRA as PEFT reads it here: {error.__cause__}") from error
            # torch lists each layer whose shape differs; the first tells enough.
            raise ValueError(" ".join(str(error).splitlines()[:2])) from error
    if lora.note:
        logger.warning("%s: %s", source, lora.note)
    return lora.note


@torch.no_grad()
def _put_magnitudes(lora: Layers, models: Mapping[str, torch.nn.Module], adapter_name: str) -> None:
    """What a DoRA's layers have, into the models; a stock pipeline leaves it out of a text encoder's."""
    for model, group in lora.items():
        modules = {name.removeprefix("text_model."): module for name, module in models[model].named_modules()}
        for name, layer in group.items():
            if layer.magnitude is not None:
                magnitude = modules[name].lora_magnitude_vector[adapter_name].weight
                magnitude.copy_(layer.magnitude.view_as(magnitude))


def merge_loras(pipeline: LoraPipeline, loras: Sequence[str], scales: Sequence[float]) -> None:
    """Merge LoRAs into the weights of a pipeline, as diffusers computes them when all are active in this order.

    Args:
        pipeline: without adapters, and in float32, so that nothing is rounded that an adapter would keep.
        loras: at least one, as of `find_lora`, each with its scale.

    Raises ValueError: one cannot be loaded or does not fit, or their sum is not finite.
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
    """Inside, the libraries list no layers without a LoRA."""
    levels = [(library.utils.logging, library.utils.logging.get_verbosity()) for library in (diffusers, transformers)]
    try:
        for own, _ in levels:
            own.set_verbosity(logging.CRITICAL)
        yield
    finally:
        for own, level in levels:
            own.set_verbosity(level)
