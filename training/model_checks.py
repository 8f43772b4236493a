"""What is known of the models before their weights are loaded: configurations, layers, and the LoRAs that must fit.

Source: [ours].
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, AutoencoderTiny, ConfigMixin, DDPMScheduler, UNet2DConditionModel
from transformers import AutoConfig, CLIPConfig, CLIPImageProcessorPil, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from loras.files import DORA_ON_TOP, ReferenceLora, check_lora_fits, find_lora, find_on_hub, is_dora, read_lora
from programs.loading import check_model_name, load_tokenizer, naming_flag
from training.flags import LoraFlags, ModelFlags


def check_models(model: ModelFlags, last_timestep: int) -> tuple[dict, int]:
    """Read the configurations of UNet, VAE and scheduler.

    Args:
        model: the flags.
        last_timestep: the higher of --sfcm_timesteps.

    Returns:
        The UNet's, and the number of pixels that each side of a portrait must be a multiple of.
    """
    hub = {"revision": model.revision, "cache_dir": model.cache_dir}
    name = model.pretrained_model_name_or_path
    with naming_flag("pretrained_model_name_or_path", name):
        check_model_name(name)
    with naming_flag("pretrained_model_name_or_path", f"{name}, unet"):
        unet_config = _read_config(UNet2DConditionModel, name, subfolder="unet", **hub)
        if unet_config["addition_embed_type"] is not None:
            raise ValueError(
                f"asks for more than a prompt ({unet_config['addition_embed_type']!r}), as Stable Diffusion XL does"
            )
    if model.pretrained_vae_model_name_or_path is None:
        with naming_flag("pretrained_model_name_or_path", f"{name}, vae"):
            vae_config = _read_config(AutoencoderKL, name, subfolder="vae", **hub)
            _check_latents(vae_config, unet_config)
    else:
        vae_config = _check_decoder(model, "pretrained_vae_model_name_or_path", AutoencoderKL, unet_config)
    if model.tiny_vae_model_name_or_path is not None:
        _check_decoder(model, "tiny_vae_model_name_or_path", AutoencoderTiny, unet_config)
    with naming_flag("pretrained_model_name_or_path", f"{name}, scheduler"):
        scheduler = DDPMScheduler.from_pretrained(name, subfolder="scheduler", **hub)
    if model.prediction_type is None and scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"--pretrained_model_name_or_path {name}: no training for prediction_type "
            f"{scheduler.config.prediction_type!r}"
        )
    if last_timestep > scheduler.config.num_train_timesteps:
        raise ValueError(
            f"--sfcm_timesteps: HIGH is {last_timestep}, above the model's "
            f"{scheduler.config.num_train_timesteps} timesteps"
        )
    multiple = 2 ** (len(vae_config["block_out_channels"]) - 1) * 2 ** (len(unet_config["block_out_channels"]) - 1)
    return unet_config, multiple


def _check_decoder(model: ModelFlags, flag: str, kind: type, unet_config: dict) -> dict:
    """The configuration of the autoencoder that a flag names, of this kind and with the UNet's latents."""
    name = getattr(model, flag)
    with naming_flag(flag, name):
        check_model_name(name, kind.__name__)
        config = _read_config(kind, name, cache_dir=model.cache_dir)
        if config.get("_class_name") != kind.__name__:
            raise ValueError(f"not an {kind.__name__} but {config.get('_class_name')!r}")
        _check_latents(config, unet_config)
    return config


def _read_config(kind: type[ConfigMixin], name: str, **where: str | None) -> dict:
    """A configuration, and the class's own values for what it leaves out."""
    config = kind.load_config(name, **where)
    if not isinstance(config, dict):
        raise ValueError(f"its configuration is no JSON object but {config!r}")
    return {key: value.default for key, value in inspect.signature(kind).parameters.items()} | config


def _check_latents(config: dict, unet_config: dict) -> None:
    if config["latent_channels"] != unet_config["in_channels"]:
        raise ValueError(f"has {config['latent_channels']} latent channels, the UNet {unet_config['in_channels']}")


def check_text_models(model: ModelFlags) -> tuple[CLIPTokenizer, CLIPTextConfig]:
    """Read the tokenizer and text encoder's configuration of the diffusion model, and all of CLIP but the weights."""
    name = model.pretrained_model_name_or_path
    with naming_flag("pretrained_model_name_or_path", f"{name}, tokenizer"):
        tokenizer = load_tokenizer(name, subfolder="tokenizer", revision=model.revision, cache_dir=model.cache_dir)
    with naming_flag("pretrained_model_name_or_path", f"{name}, text_encoder"):
        text_config = AutoConfig.from_pretrained(
            name, subfolder="text_encoder", revision=model.revision, cache_dir=model.cache_dir
        )
    with naming_flag("clip_model_name_or_path", model.clip_model_name_or_path):
        check_model_name(model.clip_model_name_or_path, kind=None)
        config = AutoConfig.from_pretrained(model.clip_model_name_or_path, cache_dir=model.cache_dir)
        if not isinstance(config, CLIPConfig):
            raise ValueError("not a CLIP model of texts and pictures")
        load_tokenizer(model.clip_model_name_or_path, cache_dir=model.cache_dir)
        CLIPImageProcessorPil.from_pretrained(model.clip_model_name_or_path, cache_dir=model.cache_dir)
    return tokenizer, text_config


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
            check_lora_fits(read_lora(reference.path), layers)


def check_lora(lora: LoraFlags, dual_path: str, unet_config: dict) -> None:
    """Whether stage 1's LoRA, and the layers of the new one, are of this UNet.

    Raises:
        ValueError: they are not, or stage 1's LoRA is one that does not go with the other flags.
    """
    if lora.stage1_lora_path is not None:
        with naming_flag("stage1_lora_path", lora.stage1_lora_path):
            stage1 = read_lora(find_lora(lora.stage1_lora_path))
            check_lora_fits(stage1, {"unet": _unet_layers(unet_config)})
            if is_dora(stage1) and dual_path == "single_pass":
                raise ValueError(
                    "is a DoRA, which cannot be off in some rows of a batch: it needs --dual_path two_pass"
                )
            if is_dora(stage1) and lora.reference_lora:
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
