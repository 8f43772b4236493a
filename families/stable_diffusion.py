"""Stable Diffusion 1.x and 2.x: a UNet that is told a prompt by one CLIP text encoder.

Legend: B batch, C latent channels, H/W latent size, H'/W' size in pixels, T text tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    ConfigMixin,
    DDPMScheduler,
    DiffusionPipeline,
    ModelMixin,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import AutoConfig, CLIPTextModel, CLIPTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from attention_processors import CrossAttentionCapture, find_cross_attention_layers
from families import hub_names
from families.noise_process import DDPM, NoiseProcess
from families.prompt_embeds import PromptEmbeds
from pipeline_spf_portrait import SPFPortraitPipeline
from programs.loading import check_model_name, load_tokenizer, naming_flag
from programs.single_file import SingleFile
from prompts import PromptPair, PromptTokens, locate_in_all
from sfcm import clip_distances


MODEL, VAE, TINY_VAE = (
    "pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "tiny_vae_model_name_or_path",
)  # fmt: skip


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a model before its weights are loaded."""

    denoiser_config: dict[str, Any]
    text_configs: tuple[PretrainedConfig | None, ...]  # None for a text encoder that the model does not have
    tokenizers: tuple[PreTrainedTokenizerBase | None, ...]  # likewise
    file: SingleFile | None  # that it is, if it is one
    side: int | None  # in pixels, of the pictures that it draws by itself, if its configuration says so
    side_multiple: int  # of pixels that each side of a picture must be a multiple of
    noise: NoiseProcess


class StableDiffusion:
    """What is particular to this family; it has no state, and is used without an instance."""

    title = "Stable Diffusion"
    pipeline_class: type[DiffusionPipeline] = SPFPortraitPipeline  # draws with it
    stock_class: type[DiffusionPipeline] = StableDiffusionPipeline  # diffusers' own
    # Arguments of `pipeline_class` when it is loaded for a training, and for pictures that are looked at.
    training_options: Mapping[str, Any] = {"safety_checker": None, "requires_safety_checker": False}
    drawing_options: Mapping[str, Any] = {}
    sliced_vae = False  # whether the VAE takes one picture at a time
    large_embeds = False  # whether the embeddings of all prompts are too many for the device
    large_text_encoders: tuple[str, ...] = ()  # of those that are no smaller than the denoiser, the names
    objectives: tuple[str, ...] = ("composed", "paper", "both")  # what stage 2 can learn
    has_self_attention = True  # in layers of their own
    has_kohya_names = True  # whether a LoRA for it has names in kohya's format
    noise_process: type[NoiseProcess] = DDPM
    hub = hub_names.STABLE_DIFFUSION
    # Names of the pipeline's components.
    denoiser = "unet"
    denoiser_class: type[ModelMixin] = UNet2DConditionModel
    text_encoders: tuple[str, ...] = ("text_encoder",)
    tokenizers: tuple[str, ...] = ("tokenizer",)
    tokenizer_classes: Mapping[str, type[PreTrainedTokenizerBase]] = {}  # of those that are not CLIP's
    text_models: tuple[type[nn.Module], ...] = (CLIPTextModel,)  # classes of its text encoders
    optional: tuple[str, ...] = ()  # text encoders that a model may be without

    @classmethod
    def check(
        cls, model: str, denoiser_config: Mapping[str, Any], *, place: str | None = None, revision: str | None = None,
        cache_dir: str | None = None, vae: str | None = None, tiny_vae: str | None = None,
        prediction_type: str | None = None, file: SingleFile | None = None,
    ) -> ModelFacts:  # fmt: skip
        """Read the other configurations of a model, without weights; they lie at `place` if not under its name.

        Raises InputError: one line that names the flag, the value and the part of the model that does not fit.
        """
        hub, place = {"revision": revision, "cache_dir": cache_dir}, model if place is None else place
        unet_config = _with_defaults(cls.denoiser_class, denoiser_config)
        if vae is None:
            with naming_flag(MODEL, f"{model}, vae"):
                vae_config = _with_defaults(AutoencoderKL, read_config(AutoencoderKL, place, subfolder="vae", **hub))
                _check_latents(vae_config, unet_config)
        else:
            vae_config = _check_decoder(VAE, vae, AutoencoderKL, unet_config, cache_dir)
        if tiny_vae is not None:
            _check_decoder(TINY_VAE, tiny_vae, AutoencoderTiny, unet_config, cache_dir)
        with naming_flag(MODEL, f"{model}, scheduler"):
            config = read_config(DDPMScheduler, place, subfolder="scheduler", **hub)
        with naming_flag(MODEL, model):
            changed = {} if prediction_type is None else {"prediction_type": prediction_type}
            noise = cls.noise_process(config.get("_class_name", "DDPMScheduler"), {**config, **changed})
            parts = read_config(DiffusionPipeline, place, **hub)
        tokenizers, text_configs = [], []
        for tokenizer, text_encoder in zip(cls.tokenizers, cls.text_encoders, strict=True):
            missing = text_encoder in cls.optional and (parts.get(text_encoder) or [None])[0] is None
            with naming_flag(MODEL, f"{model}, {tokenizer}"):
                kind = cls.tokenizer_classes.get(tokenizer, CLIPTokenizer)
                tokenizers.append(None if missing else load_tokenizer(place, kind, subfolder=tokenizer, **hub))
            with naming_flag(MODEL, f"{model}, {text_encoder}"):
                found = None if missing else AutoConfig.from_pretrained(place, subfolder=text_encoder, **hub)
                text_configs.append(found)
        scale = 2 ** (len(vae_config["block_out_channels"]) - 1)  # each level but the first halves the sides
        return ModelFacts(
            denoiser_config=unet_config,
            text_configs=tuple(text_configs),
            file=file,
            tokenizers=tuple(tokenizers),
            side=side * scale if isinstance(side := unet_config["sample_size"], int) else None,
            side_multiple=scale * cls.latent_multiple(unet_config),
            noise=noise,
        )

    @staticmethod
    def latent_multiple(denoiser_config: Mapping[str, Any]) -> int:
        """What each side of the latents must be a multiple of: each level of a UNet but the last halves them."""
        return 2 ** (len(denoiser_config["block_out_channels"]) - 1)

    @classmethod
    def text_encoders_of(cls, pipeline: DiffusionPipeline) -> tuple[str, ...]:
        """Names of the text encoders that a pipeline has."""
        return tuple(name for name in cls.text_encoders if getattr(pipeline, name) is not None)

    @classmethod
    def vae_dtype(cls, vae: AutoencoderKL, dtype: torch.dtype) -> torch.dtype:
        """The dtype that the VAE of a model in `dtype` can compute in."""
        return dtype

    @staticmethod
    def locate(pair: PromptPair, tokenizers: Sequence[CLIPTokenizer]) -> PromptTokens:
        """Where words and padding of both prompts lie among the T tokens that the UNet attends to."""
        return locate_in_all(pair, tokenizers)

    @staticmethod
    def tokenize(tokenizers: Sequence[CLIPTokenizer], prompts: Sequence[str]) -> list[tuple[int, ...]]:
        """What `encode` takes of each prompt: the T tokens of every tokenizer, one after another; cut where too long.
        """
        rows = [tokenizer(list(prompts), padding="max_length", truncation=True).input_ids for tokenizer in tokenizers]
        return [tuple(chain.from_iterable(row)) for row in zip(*rows, strict=True)]

    @classmethod
    def encode(cls, pipeline: DiffusionPipeline, ids: Tensor) -> PromptEmbeds:
        """Prompts, as `tokenize` gives them (B, T), for the UNet."""
        return PromptEmbeds(pipeline.text_encoder(ids)[0])

    @staticmethod
    def pooled_dim(pipeline: DiffusionPipeline) -> int:
        """The size of a prompt's pooled embedding; 0 for none."""
        return 0

    @staticmethod
    def distances(
        pipeline: DiffusionPipeline, pairs: Sequence[PromptPair], tokens: Sequence[PromptTokens]
    ) -> list[Tensor]:
        """CLIP distances (P,) of each pair's phrases to its target, as the pipeline itself has them."""
        encoder = pipeline.text_encoder
        return clip_distances(encoder, pipeline.tokenizer, pairs, tokens, encoder.device)

    @staticmethod
    def predict(denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, embeds: PromptEmbeds) -> Tensor:
        """What the UNet, or its distributed wrapper, predicts, (B, C, H, W)."""
        return denoiser(noisy_latents, timesteps, embeds.states, return_dict=False)[0]

    @staticmethod
    @torch.no_grad()
    def to_latents(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
        """Latents (B, C, H, W) float32 of pictures (B, 3, H', W') in [-1, 1]; no gradient, nothing is random."""
        return vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode().float() * vae.config.scaling_factor

    @staticmethod
    def to_pixels(vae: AutoencoderKL | AutoencoderTiny, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H', W') of latents (B, C, H, W); gradient flows."""
        return vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]

    @staticmethod
    def capture(denoiser: nn.Module) -> CrossAttentionCapture:
        """The layers whose attention to the prompt can be recorded."""
        return CrossAttentionCapture(denoiser)

    @staticmethod
    def lora_targets(denoiser: nn.Module, kind: Literal["cross", "all"]) -> list[str]:
        """Names of the layers that a LoRA is on: the projections of cross-attention, or of all attention."""
        names = list(find_cross_attention_layers(denoiser))
        if kind == "all":
            names += [name.removesuffix("attn2") + "attn1" for name in names]
        return [f"{name}.{projection}" for name in names for projection in ("to_q", "to_k", "to_v", "to_out.0")]


def read_config(kind: type[ConfigMixin], name: str, **where: str | None) -> dict[str, Any]:
    """A configuration of a folder or an id of the Hub."""
    config = kind.load_config(name, **where)
    if not isinstance(config, dict):
        raise ValueError(f"its configuration is no JSON object but {config!r}")
    return config


def _with_defaults(kind: type[ConfigMixin], config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration, and the class's own values for what it leaves out."""
    return {key: value.default for key, value in inspect.signature(kind).parameters.items()} | config


def _check_decoder(flag: str, name: str, kind: type, unet_config: dict, cache_dir: str | None) -> dict[str, Any]:
    """The configuration of the autoencoder that a flag names, of this kind and with the UNet's latents."""
    with naming_flag(flag, name):
        check_model_name(name, kind.__name__)
        config = _with_defaults(kind, read_config(kind, name, cache_dir=cache_dir))
        if config.get("_class_name") != kind.__name__:
            raise ValueError(f"not an {kind.__name__} but {config.get('_class_name')!r}")
        _check_latents(config, unet_config)
    return config


def _check_latents(config: dict[str, Any], unet_config: dict[str, Any]) -> None:
    if config["latent_channels"] != unet_config["in_channels"]:
        raise ValueError(f"has {config['latent_channels']} latent channels, the denoiser {unet_config['in_channels']}")
