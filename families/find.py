"""Which family a model belongs to, from its own configurations and never from a flag.

A new family is a class beside these, and a line in `find_family` that knows it.
"""

import logging
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DConditionModel

from families.stable_diffusion import MODEL, ModelFacts, StableDiffusion, read_config
from families.stable_diffusion_3 import StableDiffusion3
from families.stable_diffusion_xl import StableDiffusionXL
from programs.loading import check_model_name, naming_flag
from programs.single_file import SingleFile, find_single_file


logger = logging.getLogger(__name__)

_KNOWN = "known are Stable Diffusion 1.x, 2.x, XL, 3 and 3.5"

# Models that draw in a few steps say so in their names, and hardly anywhere else: in words of their own, or with a
# capital inside of a longer one.
_DISTILLED = re.compile(
    r"(?<![A-Za-z])(turbo|lightning|lcm|hyper|dmd2?)(?![a-z])|(Turbo|Lightning|LCM|Hyper|DMD2?)(?![a-z])"
)


class BaseModel(NamedTuple):
    """What the configurations of a base model say of it."""

    family: type[StableDiffusion]
    file: SingleFile | None  # that it is, if it is one
    place: str  # the folder or id of the Hub with its configurations
    title: str  # its name, and where its configurations are from if they are not its own
    denoiser_config: dict[str, Any]


def find_family(model_index: Mapping[str, Any], denoiser_config: Mapping[str, Any]) -> type[StableDiffusion]:
    """The family of a model, from its `model_index.json` and the configuration of its UNet or transformer.

    Raises ValueError: none that is known, or a model that takes more than a prompt and noise.
    """
    kind, pipeline = denoiser_config.get("_class_name", "UNet2DConditionModel"), model_index.get("_class_name")
    told = denoiser_config.get("addition_embed_type")
    if kind == "SD3Transformer2DModel":
        return _find_family_3(model_index, denoiser_config)
    if kind != "UNet2DConditionModel" or told not in (None, "text_time"):
        raise ValueError(f"the {kind} of a {pipeline}; {_KNOWN}")
    channels = denoiser_config.get("in_channels", 4)
    if channels != 4:
        raise ValueError(f"it takes {channels} channels and not 4 (9 are for inpainting): no model for text to image")
    if told is None:
        return StableDiffusion
    first, second = ((model_index.get(name) or (None,))[0] for name in StableDiffusionXL.text_encoders)
    if first == second == "transformers":
        return StableDiffusionXL
    if first is None and second == "transformers":
        raise ValueError("the refiner of Stable Diffusion XL, which only goes over pictures: use its base model")
    raise ValueError(f"the {kind} of a {pipeline}, with other text encoders than Stable Diffusion XL's; {_KNOWN}")


def _find_family_3(model_index: Mapping[str, Any], denoiser_config: Mapping[str, Any]) -> type[StableDiffusion3]:
    taken, given = (denoiser_config.get(name) for name in ("in_channels", "out_channels"))
    if given is not None and taken != given:
        raise ValueError(f"it takes {taken} channels and gives {given}: no model for text to image")
    parts = zip(StableDiffusion3.text_encoders, StableDiffusion3.tokenizers, strict=True)
    for name in (name for pair in parts if pair[0] not in StableDiffusion3.optional for name in pair):
        if (model_index.get(name) or (None,))[0] is None:
            raise ValueError(f"a Stable Diffusion 3 without its {name}, by which phrases are found")
    return StableDiffusion3


def find_base(
    name: str, flag: str, *, base_config: str | None = None, variant: str | None = None, revision: str | None = None,
    cache_dir: str | None = None, without: Collection[str] = (), prediction_type: str | None = None,
) -> BaseModel:  # fmt: skip
    """Look at the folder, id or file that a flag names, without its weights.

    Args:
        base_config: where one file has its configurations from; by default its family's published repository.
        without: components of one file that come from elsewhere.
        prediction_type: what a flag says of it, which spares the warning of a file that does not say so itself.

    Raises InputError: one line that names the flag, the value and the part of the model that does not fit.
    """
    hub = {"revision": revision, "cache_dir": cache_dir}
    with naming_flag(flag, name):
        file = find_single_file(name, base_config, variant=variant, without=without, **hub)
        if file is None:
            check_model_name(name)
            place = title = name
        else:
            file.warn(prediction_type)
            place, title = file.folder, f"{name} with the configuration of {file.config}"
        model_index = read_config(DiffusionPipeline, place, **hub)
        denoiser = next((part for part in ("unet", "transformer") if part in model_index), None)
        if denoiser is None:
            raise ValueError(f"is a {model_index.get('_class_name')}; {_KNOWN}")
    with naming_flag(flag, f"{title}, {denoiser}"):
        # Every model of diffusers reads a configuration alike.
        denoiser_config = read_config(UNet2DConditionModel, place, subfolder=denoiser, **hub)
        return BaseModel(find_family(model_index, denoiser_config), file, place, title, denoiser_config)


def check_model(
    name: str, *, base_config: str | None = None, variant: str | None = None, revision: str | None = None,
    cache_dir: str | None = None, vae: str | None = None, prediction_type: str | None = None, **flags: str | None,
) -> tuple[type[StableDiffusion], ModelFacts]:  # fmt: skip
    """Find the family of a model that is to be trained, and what is known of it without weights; `flags` are what its
    `check` takes.

    Raises InputError: as of `find_base`.
    """
    hub = {"revision": revision, "cache_dir": cache_dir}
    base = find_base(
        name, MODEL, base_config=base_config, variant=variant, without=() if vae is None else ("vae",),
        prediction_type=prediction_type, **hub,
    )  # fmt: skip
    if base.file is not None:
        prediction_type = prediction_type or base.file.scheduler.get("prediction_type")
    facts = base.family.check(
        base.title, base.denoiser_config, place=base.place, file=base.file, vae=vae, prediction_type=prediction_type,
        **hub, **flags,
    )  # fmt: skip
    scheduler = read_config(DDPMScheduler, base.place, subfolder="scheduler", **hub).get("_class_name", "")
    _warn_of_distilled(name, facts.denoiser_config, scheduler)
    return base.family, facts


def _warn_of_distilled(name: str, denoiser_config: Mapping[str, Any], scheduler: str) -> None:
    """Say that a model which was made to draw in a few steps is learned from badly."""
    by_name = _DISTILLED.search(Path(name).name)
    if by_name is None and denoiser_config.get("time_cond_proj_dim") is None and "LCM" not in scheduler:
        return
    logger.warning(
        "--%s %s: seems to be distilled to a few steps%s; training undoes that, and its noise is not what it learned "
        "from. Train on the model that it was made of, and draw with this one",
        MODEL, name, f" ({by_name[0]!r} in its name)" if by_name else "",
    )  # fmt: skip
