"""Stable Diffusion 3 and 3.5: a transformer with joint attention, flow matching, and three text encoders.

The text is told twice, one behind the other: by two CLIPs on channels, and by T5, which a model may be without.

Legend: B batch, C latent channels, H/W latent size, H'/W' size in pixels, T tokens of a CLIP, L tokens of T5.
Source: Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", arXiv 2403.03206.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DiffusionPipeline,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, PreTrainedTokenizerBase, T5EncoderModel, T5Tokenizer

from families import hub_names
from families.noise_process import FlowMatching
from families.prompt_embeds import PromptEmbeds
from families.stable_diffusion import MODEL, ModelFacts, StableDiffusion
from joint_attention import JointAttentionCapture
from pipeline_spf_portrait_3 import SPFPortrait3Pipeline
from programs.loading import naming_flag
from prompts import PromptPair, PromptTokens, locate_in_two_parts
from sfcm import clip_distances


T5_TOKENS = 256  # as many as the pipeline draws with
# Projections of a block's attention: of the image's tokens, and of the text's, which the last block has not all of.
_OF_IMAGE, _OF_TEXT = ("to_q", "to_k", "to_v", "to_out.0"), ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


class StableDiffusion3(StableDiffusion):
    """What it has of its own; it has no state, and is used without an instance."""

    title = "Stable Diffusion 3"
    pipeline_class = SPFPortrait3Pipeline
    stock_class = StableDiffusion3Pipeline
    training_options = drawing_options = {}
    sliced_vae = True  # two of 1024 x 1024 would take more memory than a step
    large_embeds = True  # a few megabytes a prompt
    large_text_encoders = ("text_encoder_3",)
    objectives = ("composed",)
    has_self_attention = has_kohya_names = False
    noise_process = FlowMatching
    hub = hub_names.STABLE_DIFFUSION_3
    denoiser = "transformer"
    denoiser_class = SD3Transformer2DModel
    text_encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    tokenizers = ("tokenizer", "tokenizer_2", "tokenizer_3")
    tokenizer_classes = {"tokenizer_3": T5Tokenizer}
    text_models = (CLIPTextModelWithProjection, CLIPTextModelWithProjection, T5EncoderModel)
    optional = ("text_encoder_3",)

    @classmethod
    def check(
        cls, model: str, denoiser_config: Mapping[str, Any], *, prediction_type: str | None = None, **options: Any
    ) -> ModelFacts:
        """As of Stable Diffusion; there is one prediction, and the text has the widths that the transformer takes."""
        if prediction_type is not None:
            with naming_flag("prediction_type", prediction_type):
                raise ValueError(f"{model} is of flow matching, which has one prediction: leave the flag out")
        facts = super().check(model, denoiser_config, **options)
        *clips, t5 = facts.text_configs
        with naming_flag(MODEL, f"{model}, transformer"):
            pooled, config = sum(clip.projection_dim for clip in clips), facts.denoiser_config
            if pooled != (told := config["pooled_projection_dim"]):
                raise ValueError(f"takes {told} pooled numbers of a prompt, and its text encoders have {pooled}")
            width = config["joint_attention_dim"]
            if t5 is not None and t5.d_model != width:
                raise ValueError(f"takes text of width {width}, and text_encoder_3 has {t5.d_model}")
        return facts

    @staticmethod
    def latent_multiple(denoiser_config: Mapping[str, Any]) -> int:
        """The side of a patch, which is one token."""
        return denoiser_config["patch_size"]

    @classmethod
    def vae_dtype(cls, vae: AutoencoderKL, dtype: torch.dtype) -> torch.dtype:
        """Float32 in the place of float16, unless its configuration says otherwise."""
        return torch.float32 if dtype == torch.float16 and vae.config.force_upcast else dtype

    @staticmethod
    def locate(pair: PromptPair, tokenizers: Sequence[PreTrainedTokenizerBase | None]) -> PromptTokens:
        """Where words and padding of both prompts lie among the T + L tokens of the text."""
        *clips, t5 = tokenizers
        return locate_in_two_parts(pair, clips, t5, t5_length(t5))

    @classmethod
    def tokenize(
        cls, tokenizers: Sequence[PreTrainedTokenizerBase | None], prompts: Sequence[str]
    ) -> list[tuple[int, ...]]:
        """As of Stable Diffusion: 2T tokens, and L more with T5."""
        *clips, t5 = tokenizers
        rows = super().tokenize(clips, prompts)
        if t5 is None:
            return rows
        more = t5(list(prompts), padding="max_length", max_length=t5_length(t5), truncation=True).input_ids
        return [own + tuple(behind) for own, behind in zip(rows, more, strict=True)]

    @classmethod
    def encode(cls, pipeline: DiffusionPipeline, ids: Tensor) -> PromptEmbeds:
        """Prompts, as `tokenize` gives them (B, 2T + L or 2T), for the transformer; zeros in the place of T5."""
        length, width = pipeline.tokenizer.model_max_length, pipeline.transformer.config.joint_attention_dim
        outputs = [
            encoder(own, output_hidden_states=True)
            for encoder, own in zip((pipeline.text_encoder, pipeline.text_encoder_2), ids.split(length, dim=1))
        ]
        clips = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        if pipeline.text_encoder_3 is None:
            behind = clips.new_zeros(len(ids), t5_length(None), width)
        else:
            behind = pipeline.text_encoder_3(ids[:, 2 * length :])[0]
        states = torch.cat([F.pad(clips, (0, width - clips.shape[-1])), behind.to(clips.dtype)], dim=1)
        return PromptEmbeds(states, torch.cat([output.text_embeds for output in outputs], dim=-1))

    @staticmethod
    def pooled_dim(pipeline: DiffusionPipeline) -> int:
        return sum(encoder.config.projection_dim for encoder in (pipeline.text_encoder, pipeline.text_encoder_2))

    @staticmethod
    def distances(
        pipeline: DiffusionPipeline, pairs: Sequence[PromptPair], tokens: Sequence[PromptTokens]
    ) -> list[Tensor]:
        """As of Stable Diffusion, by the larger CLIP."""
        encoder = pipeline.text_encoder_2
        return clip_distances(encoder, pipeline.tokenizer_2, pairs, tokens, encoder.device)

    @staticmethod
    def predict(denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, embeds: PromptEmbeds) -> Tensor:
        """What the transformer, or its distributed wrapper, predicts, (B, C, H, W): a velocity."""
        return denoiser(
            hidden_states=noisy_latents, timestep=timesteps, encoder_hidden_states=embeds.states,
            pooled_projections=embeds.pooled, return_dict=False,
        )[0]  # fmt: skip

    @staticmethod
    @torch.no_grad()
    def to_latents(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
        latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode().float()
        return (latents - vae.config.shift_factor) * vae.config.scaling_factor

    @staticmethod
    def to_pixels(vae: AutoencoderKL | AutoencoderTiny, latents: Tensor) -> Tensor:
        latents = latents / vae.config.scaling_factor + vae.config.shift_factor
        return vae.decode(latents.to(vae.dtype), return_dict=False)[0]

    @staticmethod
    def capture(denoiser: nn.Module) -> JointAttentionCapture:
        return JointAttentionCapture(denoiser)

    @staticmethod
    def lora_targets(denoiser: nn.Module, kind: Literal["cross", "all"]) -> list[str]:
        """Names of the layers that a LoRA is on: the image's projections in joint attention, or those of the text and
        of the image's own attention too.
        """
        projections = (*_OF_IMAGE, *_OF_TEXT) if kind == "all" else _OF_IMAGE
        names = [f"{name}.attn.{part}" for name in _blocks(denoiser) for part in projections]
        if kind == "all":
            names += [f"{name}.attn2.{part}" for name in _blocks(denoiser) for part in _OF_IMAGE]
        layers = dict(denoiser.named_modules())
        return [name for name in names if name in layers]


def t5_length(tokenizer: PreTrainedTokenizerBase | None) -> int:
    """L, the tokens that a prompt has behind CLIP's, with T5 or without, as the pipeline draws by default."""
    return T5_TOKENS if tokenizer is None else min(T5_TOKENS, tokenizer.model_max_length)


def _blocks(denoiser: nn.Module) -> list[str]:
    return [f"transformer_blocks.{i}" for i in range(len(denoiser.transformer_blocks))]
