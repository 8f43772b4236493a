"""What is known of the models before their weights are loaded: configurations, layers, and the LoRAs that must fit.

Source: [ours].
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from transformers import AutoConfig, CLIPConfig, CLIPImageProcessorPil, CLIPTextConfig, CLIPTextModel

from families.find import check_model
from families.stable_diffusion import ModelFacts, StableDiffusion
from lora_layers import check_fits
from loras.finding import find_lora, find_on_hub
from loras.loading import DORA_ON_TOP, ReferenceLora
from loras.reading import read_lora
from programs.loading import check_model_name, load_tokenizer, naming_flag
from training.flags import LoraFlags, ModelFlags


def check_models(
    model: ModelFlags, last_timestep: int, enhances: bool
) -> tuple[type[StableDiffusion], ModelFacts]:
    """Read all of the models that needs no weights.

    Args:
        model: the flags.
        last_timestep: the higher of --sfcm_timesteps.
        enhances: whether the enhancement loss is computed, for which alone there is a second CLIP.

    Returns:
        The family of the base model, and what is known of it.
    """
    family, facts = check_model(
        model.pretrained_model_name_or_path,
        revision=model.revision,
        cache_dir=model.cache_dir,
        vae=model.pretrained_vae_model_name_or_path,
        tiny_vae=model.tiny_vae_model_name_or_path,
        prediction_type=model.prediction_type,
    )
    if last_timestep > facts.num_train_timesteps:
        raise ValueError(
            f"--sfcm_timesteps: HIGH is {last_timestep}, above the model's {facts.num_train_timesteps} timesteps"
        )
    if not enhances:
        return family, facts
    with naming_flag("clip_model_name_or_path", model.clip_model_name_or_path):
        check_model_name(model.clip_model_name_or_path, kind=None)
        config = AutoConfig.from_pretrained(model.clip_model_name_or_path, cache_dir=model.cache_dir)
        if not isinstance(config, CLIPConfig):
            raise ValueError("not a CLIP model of texts and pictures")
        load_tokenizer(model.clip_model_name_or_path, cache_dir=model.cache_dir)
        CLIPImageProcessorPil.from_pretrained(model.clip_model_name_or_path, cache_dir=model.cache_dir)
    return family, facts


def find_references(lora: LoraFlags, cache_dir: str | None) -> tuple[ReferenceLora, ...]:
    """The files of --reference_lora, each with its scale.

    Raises:
        InputError: one is not there, or twice.
    """
    references: list[ReferenceLora] = []
    if lora.use_dora and lora.reference_lora is not None:
        raise ValueError(f"--use_dora does not go with --reference_lora: {DORA_ON_TOP}")
    for name, scale in zip(lora.reference_lora or (), lora.reference_lora_scale or (), strict=True):
        with naming_flag("reference_lora", name):
            path = find_lora(name, cache_dir)
            sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
            references.append(ReferenceLora(name, path, find_on_hub(name), sha256, scale))
            if any(references[-1].sha256 == earlier.sha256 for earlier in references[:-1]):
                raise ValueError("the same LoRA is given twice")
    return tuple(references)


def check_references(references: Sequence[ReferenceLora], unet_config: dict, text_config: CLIPTextConfig) -> None:
    """Compare the earlier LoRAs with the base model, of which no weights are loaded.

    Raises:
        InputError: one is no LoRA, or one of another model.
    """
    if not references:
        return
    with init_empty_weights():
        text_layers = _layers(CLIPTextModel(text_config))
    layers = {"unet": _unet_layers(unet_config), "text_encoder": text_layers}
    for reference in references:
        with naming_flag("reference_lora", reference.name):
            check_fits(read_lora(reference.path).layers, layers)


def check_lora(lora: LoraFlags, dual_path: str, unet_config: dict) -> None:
    """Whether stage 1's LoRA, and the layers of the new one, are of this UNet.

    Raises:
        ValueError: they are not, or stage 1's LoRA is one that does not go with the other flags.
    """
    if lora.stage1_lora_path is not None:
        with naming_flag("stage1_lora_path", lora.stage1_lora_path):
            stage1 = read_lora(find_lora(lora.stage1_lora_path))
            check_fits(stage1.layers, {"unet": _unet_layers(unet_config)})
            if stage1.is_dora and dual_path == "single_pass":
                raise ValueError(
                    "is a DoRA, which cannot be off in some rows of a batch: it needs --dual_path two_pass"
                )
            if stage1.is_dora and lora.reference_lora:
                raise ValueError(f"is a DoRA, which does not go with --reference_lora: {DORA_ON_TOP}")
    names = [] if lora.lora_layers is None else list(_unet_layers(unet_config))
    for layer in lora.lora_layers or ():
        if not any(name == layer or name.endswith(f".{layer}") for name in names):
            raise ValueError(f"--lora_layers: no layer of the UNet has a name that ends in {layer!r}")


def _unet_layers(unet_config: dict) -> dict[str, torch.nn.Module]:
    """The UNet's linear and convolutional layers by name, without weights."""
    with init_empty_weights():
        return _layers(UNet2DConditionModel.from_config(unet_config))


def _layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    modules = model.named_modules()
    return {name: module for name, module in modules if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)}
