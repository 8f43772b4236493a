"""Stable Diffusion XL: a UNet that two text encoders tell a prompt, and that is told sizes and crops of pictures.

Legend: B batch, C latent channels, H/W latent size, H'/W' size in pixels, T text tokens.
Source: Podell et al., "SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis", arXiv 2307.01952.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from families import hub_names
from families.prompt_embeds import PromptEmbeds
from families.stable_diffusion import MODEL, ModelFacts, StableDiffusion
from pipeline_spf_portrait_xl import SPFPortraitXLPipeline
from programs.loading import naming_flag
from prompts import PromptPair, PromptTokens
from sfcm import clip_distances


_TIME_IDS = 6  # numbers of a picture's size and crop


class StableDiffusionXL(StableDiffusion):
    """What it has of its own; it has no state, and is used without an instance."""

    title = "Stable Diffusion XL"
    pipeline_class = SPFPortraitXLPipeline
    stock_class = StableDiffusionXLPipeline
    training_options = drawing_options = {"add_watermarker": False}  # else it changes the pixels that are compared
    sliced_vae = True  # two of 1024 x 1024 would take more memory than a step
    hub = hub_names.STABLE_DIFFUSION_XL
    text_encoders = ("text_encoder", "text_encoder_2")
    tokenizers = ("tokenizer", "tokenizer_2")
    text_models = (CLIPTextModel, CLIPTextModelWithProjection)

    @classmethod
    def check(cls, model: str, denoiser_config: Mapping[str, Any], **options: Any) -> ModelFacts:
        """As of Stable Diffusion, and what the UNet is told besides the prompt is SDXL's."""
        facts = super().check(model, denoiser_config, **options)
        unet, pooled = facts.denoiser_config, facts.text_configs[1].projection_dim
        with naming_flag(MODEL, f"{model}, unet"):
            size, width = unet["addition_time_embed_dim"], unet["projection_class_embeddings_input_dim"]
            if None in (size, width) or width != pooled + _TIME_IDS * size:
                raise ValueError(
                    f"is told {width} numbers besides the prompt, and not {pooled} of text_encoder_2 with {_TIME_IDS} "
                    f"of size and crop, {size} each: a model that there is no training for"
                )
        return facts

    @classmethod
    def vae_dtype(cls, vae: AutoencoderKL, dtype: torch.dtype) -> torch.dtype:
        """Float32 in the place of float16, where SDXL's own VAE overflows, unless its configuration says otherwise."""
        return torch.float32 if dtype == torch.float16 and vae.config.force_upcast else dtype

    @classmethod
    def encode(cls, pipeline: DiffusionPipeline, ids: Tensor) -> PromptEmbeds:
        """Prompts, as `tokenize` gives them (B, 2T), for the UNet.

        The empty prompt is what the model's own classifier-free guidance has for it: zeros, unless its configuration
        says otherwise.
        """
        encoders = [getattr(pipeline, name) for name in cls.text_encoders]
        outputs = [
            encoder(own, output_hidden_states=True)
            for encoder, own in zip(encoders, ids.chunk(len(encoders), dim=1), strict=True)
        ]
        states, pooled = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1), outputs[-1].text_embeds
        if pipeline.config.force_zeros_for_empty_prompt:
            empty = torch.tensor(cls.tokenize([getattr(pipeline, name) for name in cls.tokenizers], [""]))
            asked = (ids != empty.to(ids.device)).any(1)[:, None]
            states, pooled = torch.where(asked[..., None], states, 0), torch.where(asked, pooled, 0)
        return PromptEmbeds(states, pooled)

    @staticmethod
    def pooled_dim(pipeline: DiffusionPipeline) -> int:
        return pipeline.text_encoder_2.config.projection_dim

    @staticmethod
    def distances(
        pipeline: DiffusionPipeline, pairs: Sequence[PromptPair], tokens: Sequence[PromptTokens]
    ) -> list[Tensor]:
        """As of Stable Diffusion, by the text encoder that has CLIP's projection."""
        encoder = pipeline.text_encoder_2
        return clip_distances(encoder, pipeline.tokenizer_2, pairs, tokens, encoder.device)

    @staticmethod
    def predict(denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, embeds: PromptEmbeds) -> Tensor:
        added = {"text_embeds": embeds.pooled, "time_ids": embeds.time_ids}
        return denoiser(noisy_latents, timesteps, embeds.states, added_cond_kwargs=added, return_dict=False)[0]

    @staticmethod
    @torch.no_grad()
    def to_latents(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
        latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode().float()
        mean, std = _moments(vae, latents)
        return (latents - mean) * vae.config.scaling_factor / std

    @staticmethod
    def to_pixels(vae: AutoencoderKL | AutoencoderTiny, latents: Tensor) -> Tensor:
        mean, std = _moments(vae, latents)
        return vae.decode((latents * std / vae.config.scaling_factor + mean).to(vae.dtype), return_dict=False)[0]


def _moments(vae: AutoencoderKL | AutoencoderTiny, latents: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """Mean and deviation of each channel of latents, (C, 1, 1), where a VAE's configuration has them."""
    mean, std = (vae.config.get(name) for name in ("latents_mean", "latents_std"))
    if mean is None or std is None:
        return 0.0, 1.0
    return latents.new_tensor(mean).view(-1, 1, 1), latents.new_tensor(std).view(-1, 1, 1)
