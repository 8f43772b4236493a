"""Which family a model belongs to, from its own configurations and never from a flag.

A new family is a class beside `StableDiffusion`, and a line in `find_family` that knows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers import DiffusionPipeline, UNet2DConditionModel

from families.stable_diffusion import MODEL, ModelFacts, StableDiffusion, read_config
from programs.loading import check_model_name, naming_flag


def find_family(model_index: Mapping[str, Any], denoiser_config: Mapping[str, Any]) -> type[StableDiffusion]:
    """The family of a model.

    Args:
        model_index: its `model_index.json`.
        denoiser_config: of its UNet or transformer.

    Raises:
        ValueError: none that can be trained.
    """
    kind = denoiser_config.get("_class_name", "UNet2DConditionModel")
    if kind != "UNet2DConditionModel":
        raise ValueError(
            f"the {kind} of a {model_index.get('_class_name')}; there is training for Stable Diffusion 1.x and 2.x"
        )
    if denoiser_config.get("addition_embed_type") is not None:
        raise ValueError(
            f"asks for more than a prompt ({denoiser_config['addition_embed_type']!r}), as Stable Diffusion XL does"
        )
    return StableDiffusion


def check_model(
    model: str, *, revision: str | None = None, cache_dir: str | None = None, **flags: str | None
) -> tuple[type[StableDiffusion], ModelFacts]:
    """Find the family of a model, and what is known of it without weights.

    Args:
        model, revision, cache_dir: the flags.
        flags: the others that its `check` takes.

    Raises:
        InputError: one line that names the flag, the value and the part of the model that does not fit.
    """
    hub = {"revision": revision, "cache_dir": cache_dir}
    with naming_flag(MODEL, model):
        check_model_name(model)
        model_index = read_config(DiffusionPipeline, model, **hub)
    denoiser = "transformer" if "transformer" in model_index else "unet"
    with naming_flag(MODEL, f"{model}, {denoiser}"):
        # Every model of diffusers reads a configuration alike.
        denoiser_config = read_config(UNet2DConditionModel, model, subfolder=denoiser, **hub)
        family = find_family(model_index, denoiser_config)
    return family, family.check(model, denoiser_config, **hub, **flags)
