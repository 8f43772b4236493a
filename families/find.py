"""Which family a model belongs to, from its own configurations and never from a flag.

A new family is a class beside these, and a line in `find_family` that knows it.
"""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DConditionModel

from families.stable_diffusion import MODEL, ModelFacts, StableDiffusion, read_config
from families.stable_diffusion_xl import StableDiffusionXL
from programs.loading import check_model_name, naming_flag
from programs.single_file import find_single_file


logger = logging.getLogger(__name__)



# Models that draw in a few steps say so in their names, and hardly anywhere else: in words of their own, or with a
# capital inside of a longer one.
_DISTILLED = re.compile(
    r"(?<![A-Za-z])(turbo|lightning|lcm|hyper|dmd2?)(?![a-z])|(Turbo|Lightning|LCM|Hyper|DMD2?)(?![a-z])"
)


def find_family(model_index: Mapping[str, Any], denoiser_config: Mapping[str, Any]) -> type[StableDiffusion]:
    """The family of a model, from its `model_index.json` and the configuration of its UNet or transformer.

    Raises ValueError: none that can be trained.
    """
    kind, pipeline = denoiser_config.get("_class_name", "UNet2DConditionModel"), model_index.get("_class_name")
    told = denoiser_config.get("addition_embed_type")
    if kind == "UNet2DConditionModel" and told is None:
        return StableDiffusion
    if kind == "UNet2DConditionModel" and told == "text_time":
        first, second = ((model_index.get(name) or (None,))[0] for name in StableDiffusionXL.text_encoders)
        if first == second == "transformers":
            return StableDiffusionXL
        if first is None and second == "transformers":
            raise ValueError("the refiner of Stable Diffusion XL, which only goes over pictures: give its base model")
    raise ValueError(f"the {kind} of a {pipeline}; there is training for Stable Diffusion 1.x, 2.x and XL")


def check_model(
    model: str, *, base_config: str | None = None, variant: str | None = None, revision: str | None = None,
    cache_dir: str | None = None, vae: str | None = None, prediction_type: str | None = None, **flags: str | None,
) -> tuple[type[StableDiffusion], ModelFacts]:  # fmt: skip
    """Find the family of a model, and what is known of it without weights; `flags` are what its `check` takes.

    A model in one file has its configurations from `base_config`, or its family's published repository.

    Raises InputError: one line that names the flag, the value and the part of the model that does not fit.
    """
    hub, name = {"revision": revision, "cache_dir": cache_dir}, model
    with naming_flag(MODEL, model):
        without = () if vae is None else ("vae",)
        file = find_single_file(model, base_config, variant=variant, without=without, **hub)
        if file is None:
            check_model_name(model)
            place = model
        else:
            file.warn(prediction_type)
            place, model = file.folder, f"{model} with the configuration of {file.config}"
            prediction_type = prediction_type or file.scheduler.get("prediction_type")
        model_index = read_config(DiffusionPipeline, place, **hub)
    denoiser = "transformer" if "transformer" in model_index else "unet"
    with naming_flag(MODEL, f"{model}, {denoiser}"):
        # Every model of diffusers reads a configuration alike.
        denoiser_config = read_config(UNet2DConditionModel, place, subfolder=denoiser, **hub)
        family = find_family(model_index, denoiser_config)
    facts = family.check(
        model, denoiser_config, place=place, file=file, vae=vae, prediction_type=prediction_type, **hub, **flags
    )
    scheduler = read_config(DDPMScheduler, place, subfolder="scheduler", **hub).get("_class_name", "")
    _warn_of_distilled(name, facts.denoiser_config, scheduler)
    return family, facts


def _warn_of_distilled(name: str, unet_config: Mapping[str, Any], scheduler: str) -> None:
    """Say that a model which was made to draw in a few steps is learned from badly."""
    by_name = _DISTILLED.search(Path(name).name)
    if by_name is None and unet_config["time_cond_proj_dim"] is None and "LCM" not in scheduler:
        return
    logger.warning(
        "--%s %s: seems to be distilled to a few steps%s; training undoes that, and its noise is not what it learned "
        "from. Train on the model that it was made of, and draw with this one",
        MODEL, name, f" ({by_name[0]!r} in its name)" if by_name else "",
    )  # fmt: skip
