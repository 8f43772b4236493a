#!/usr/bin/env python
"""Teach a Stable Diffusion model a portrait attribute as a LoRA, without moving anything else (SPF-Portrait).

Reads top to bottom: inputs (checked before any model is loaded), models, alignment portraits and their SFCMs, batches,
the losses of each stage, pictures and files, and the loop. The flags are in training_arguments.py.

Legend: B batch, C channels, H/W latent size, T text tokens, P base phrases, K matched tokens, N training portraits,
M alignment portraits.
Paper: arXiv 2504.00396; `[ours]` marks what it leaves open.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, init_empty_weights
from accelerate.logging import get_logger
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from PIL import Image, ImageDraw
from safetensors import SafetensorError
from tqdm.auto import tqdm
from transformers import AutoConfig, CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from attention_processors import (
    CrossAttentionFeatures,
    active_adapters,
    adapters_per_sample,
    capture_cross_attention,
    dual_path,
    find_cross_attention_layers,
    phrase_map_resolution,
)
from conditioning import BASE, EMPTY, FULL, PromptTable, clip_phrase_distances, embed_pixels, make_prompt_table
from data import PortraitRow, batch_indices, check_images, draw_latents, load_image, load_rows, preprocess_image
from losses import (
    ENHANCEMENT_LOSSES,
    compose_prediction,
    diffusion_loss,
    fine_grained_loss,
    predict_original_sample,
    text_consistent_loss,
)
from pipeline_spf_portrait import SPFPortraitPipeline, overlay_heat_map
from prompts import PromptPair, PromptTokens, make_prompt_pair, tokenize_prompt_pair
from sfcm import SFCM_MODES, noise_difference, phrase_attention_maps
from training_arguments import parse_args


logger = get_logger(__name__)

STAGE1_ADAPTER = "stage1"


# --------------------------------------------------------------------------------------------------------- inputs


@dataclass(frozen=True)
class Inputs:
    """What is known before a model is loaded, all checked.

    Attributes:
        rows: the N training portraits.
        pairs: their prompts, then those of the portraits that will be drawn for the alignment.
        tokens: the tokens of `pairs`.
        tokenizer: the diffusion model's.
        validation_pair: the prompts of the validation pictures.
    """

    rows: list[PortraitRow]
    pairs: list[PromptPair]
    tokens: list[PromptTokens]
    tokenizer: CLIPTokenizer
    validation_pair: PromptPair


def check_inputs(args: argparse.Namespace) -> Inputs:
    """Read the data and everything about the model that needs no weights.

    Raises:
        ValueError, OSError: one line that names the flag, the file and its line, or the value.
    """
    hub = {"revision": args.revision, "cache_dir": args.cache_dir}
    model = args.pretrained_model_name_or_path
    with naming_flag("pretrained_model_name_or_path", f"{model}, unet"):
        unet_config = UNet2DConditionModel.load_config(model, subfolder="unet", **hub)
    with naming_flag("pretrained_model_name_or_path", f"{model}, vae"):
        vae_config = AutoencoderKL.load_config(model, subfolder="vae", **hub)
    with naming_flag("pretrained_model_name_or_path", f"{model}, scheduler"):
        scheduler = DDPMScheduler.from_pretrained(model, subfolder="scheduler", **hub)
    with naming_flag("pretrained_model_name_or_path", f"{model}, tokenizer"):
        tokenizer = load_tokenizer(model, subfolder="tokenizer", **hub)
    with naming_flag("clip_model_name_or_path", args.clip_model_name_or_path):
        config = AutoConfig.from_pretrained(args.clip_model_name_or_path, cache_dir=args.cache_dir)
        if not isinstance(config, CLIPConfig):
            raise ValueError("not a CLIP model of texts and pictures")
        load_tokenizer(args.clip_model_name_or_path, cache_dir=args.cache_dir)
    if args.stage1_lora_path is not None:
        with naming_flag("stage1_lora_path", args.stage1_lora_path):
            check_lora(args.stage1_lora_path, unet_config)
    if scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"--pretrained_model_name_or_path {model}: no training for prediction_type "
            f"{scheduler.config.prediction_type!r}"
        )
    if args.sfcm_timesteps[1] > scheduler.config.num_train_timesteps:
        raise ValueError(
            f"--sfcm_timesteps: HIGH is {args.sfcm_timesteps[1]}, above the model's "
            f"{scheduler.config.num_train_timesteps} timesteps"
        )
    multiple = 2 ** (len(vae_config["block_out_channels"]) - 1) * 2 ** (len(unet_config["block_out_channels"]) - 1)
    if args.resolution % multiple:
        raise ValueError(f"--resolution must be a multiple of {multiple} for {model!r}, got {args.resolution}")

    rows = load_rows(
        train_data_dir=args.train_data_dir,
        dataset_name=args.dataset_name,
        dataset_config_name=args.dataset_config_name,
        cache_dir=args.cache_dir,
        image_column=args.image_column,
        base_prompt_column=args.base_prompt_column,
        target_prompt_column=args.target_prompt_column,
        full_prompt_column=args.full_prompt_column,
        base_phrases_column=args.base_phrases_column,
        target_prompt=args.target_prompt,
        max_train_samples=args.max_train_samples,
        seed=args.seed,
    )
    pairs, tokens = [], []
    for row in rows:
        try:
            pairs.append(make_prompt_pair(row.base_prompt, row.target_prompt, row.full_prompt, row.base_phrases))
            tokens.append(tokenize_prompt_pair(pairs[-1], tokenizer))
        except ValueError as error:
            raise ValueError(f"{row.source}: {error}") from error
    check_images(rows)
    drawn = alignment_pairs(args, pairs) if args.stage2_steps and args.alignment_source != "data" else []
    tokens += [tokenize_prompt_pair(pair, tokenizer) for pair in drawn]
    return Inputs(rows, pairs + drawn, tokens, tokenizer, _validation_pair(args, pairs[0], tokenizer))


def alignment_pairs(args: argparse.Namespace, pairs: Sequence[PromptPair]) -> list[PromptPair]:
    """Prompts of the portraits to be drawn: the data's in a random order, each with some phrases left out [ours].

    What the data never varies (one background for all) is drawn in many forms once its phrase is gone.
    """
    rng = np.random.default_rng(args.seed)
    different = list(dict.fromkeys(pairs))
    order = np.concatenate(
        [rng.permutation(len(different)) for _ in range(0, args.num_alignment_images, len(different))]
    )
    return [thin_out(different[i], args.alignment_phrase_dropout, rng) for i in order[: args.num_alignment_images]]


def thin_out(pair: PromptPair, dropout: float, rng: np.random.Generator) -> PromptPair:
    """The pair with each base phrase left out by chance, one at least kept; a replaced phrase always stays."""
    keep = rng.random(len(pair.base_phrases)) >= dropout
    if keep.all():
        return pair
    keep[rng.integers(len(keep))] |= not keep.any()
    kept = [phrase for phrase, stays in zip(pair.base_phrases, keep) if stays]
    replaced = [target.replaces for target in pair.target_prompts if target.replaces is not None]
    words = sorted([*kept, *replaced], key=lambda phrase: pair.base_prompt.lower().find(phrase.lower()))
    return make_prompt_pair(", ".join(words), pair.target_prompts, base_phrases=kept)


@contextmanager
def naming_flag(flag: str, value: str) -> Iterator[None]:
    """Put a flag and its value before what a library says of them, in one line."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"--{flag} {value}: {' '.join(str(error).split())}") from error


def load_tokenizer(name: str, **kwargs: str | None) -> CLIPTokenizer:
    """A CLIP tokenizer; a ValueError where its files are missing and transformers makes up an empty one."""
    tokenizer = CLIPTokenizer.from_pretrained(name, **kwargs)
    if len(tokenizer) < 256:
        raise ValueError(f"a tokenizer of {len(tokenizer)} tokens, so its files are missing")
    return tokenizer


def check_lora(path: str, unet_config: dict) -> None:
    """Compare names and shapes in a LoRA with the UNet, of whose weights none are loaded.

    Raises:
        ValueError, OSError, SafetensorError: there is no LoRA, or it does not fit.
    """
    state_dict, _, _ = SPFPortraitPipeline.lora_state_dict(path, return_lora_metadata=True, use_safetensors=True)
    with init_empty_weights():
        modules = dict(UNet2DConditionModel.from_config(unet_config).named_modules())
    for name, weight in state_dict.items():
        match = re.fullmatch(r"unet\.(.+)\.(lora_A|lora_B|lora\.down|lora\.up)\.weight", name)
        layer = modules.get(match[1]) if match else None
        if not isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
            raise ValueError(f"{name!r} belongs to no layer of this UNet")
        side = 1 if match[2] in ("lora_A", "lora.down") else 0
        if weight.ndim != layer.weight.ndim or weight.shape[side] != layer.weight.shape[side]:
            raise ValueError(f"{name!r} is {tuple(weight.shape)}, and this UNet's layer {tuple(layer.weight.shape)}")


def _validation_pair(args: argparse.Namespace, first: PromptPair, tokenizer: CLIPTokenizer) -> PromptPair:
    """The prompts of the validation pictures: what the flags give, the first portrait's for what they do not."""
    if args.validation_base_prompt is None and args.validation_target_prompt is None:
        return first
    base_prompt = first.base_prompt if args.validation_base_prompt is None else args.validation_base_prompt
    targets = list(first.target_prompts)
    if args.validation_target_prompt is not None:
        targets = [args.validation_target_prompt]
    try:
        pair = make_prompt_pair(base_prompt, targets)
        tokenize_prompt_pair(pair, tokenizer)
    except ValueError as error:
        raise ValueError(f"--validation_base_prompt / --validation_target_prompt: {error}") from error
    return pair


def print_dry_run(inputs: Inputs, distances: torch.Tensor) -> None:
    """Print each different pair of prompts, its phrases, their token positions and CLIP distances to the target."""
    seen = set()
    for row, pair, tokens, row_distances in zip(inputs.rows, inputs.pairs, inputs.tokens, distances.tolist()):
        if pair in seen:
            continue
        seen.add(pair)
        print(f"{row.source}\n  base prompt  {pair.base_prompt}\n  full prompt  {pair.full_prompt}")
        print(f"  target       {pair.target_text}  (tokens {_ranges(tokens.target_positions)} of the full prompt)")
        for phrase, positions, distance in zip(pair.base_phrases, tokens.phrase_positions, row_distances):
            print(f"  phrase       {phrase}  (tokens {_ranges(positions)}, CLIP distance {distance:.3f})")
    print(f"{len(inputs.rows)} portraits, {len(seen)} different pairs of prompts. Nothing was trained (--dry_run).")


def _ranges(positions: Sequence[int]) -> str:
    return ", ".join(map(str, positions)) or "none, cut off"


# --------------------------------------------------------------------------------------------- models and portraits


@dataclass
class Portraits:
    """Portraits a step draws its batch from, as latents on the device.

    Attributes:
        latents: (M, C, H, W) float32, scaled as the UNet expects them.
        pair_index: (M,) which of the N pairs of prompts belongs to each.
        sfcm: (M, 1, H, W) float32 in [0, 1], once the bank is filled.
        image_embeds: (M, E') CLIP image embeddings, where the enhancement loss asks for them.
    """

    latents: torch.Tensor
    pair_index: torch.Tensor
    sfcm: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None


@dataclass
class Run:
    """All that a training step needs. `response_unet` is the distributed wrapper of `unet`, or `unet` itself."""

    args: argparse.Namespace
    accelerator: Accelerator
    inputs: Inputs
    pipeline: SPFPortraitPipeline
    unet: UNet2DConditionModel
    response_unet: torch.nn.Module
    noise_scheduler: DDPMScheduler
    clip: CLIPModel
    clip_processor: CLIPImageProcessorPil
    table: PromptTable
    training: Portraits
    alignment: Portraits | None = None

    @property
    def device(self) -> torch.device:
        return self.accelerator.device


def lora_config(args: argparse.Namespace, unet: UNet2DConditionModel) -> LoraConfig:
    """LoRA on the projections of the cross-attention layers, or of all attention layers."""
    names = list(find_cross_attention_layers(unet))
    if args.lora_target == "all":
        names += [name.removesuffix("attn2") + "attn1" for name in names]
    return LoraConfig(
        r=args.rank,
        lora_alpha=args.lora_alpha,
        init_lora_weights="gaussian",
        target_modules=[
            f"{name}.{projection}" for name in names for projection in ("to_q", "to_k", "to_v", "to_out.0")
        ],
    )


def prepare_run(args: argparse.Namespace, inputs: Inputs, accelerator: Accelerator) -> Run:
    """Load the models, add the LoRA, and turn prompts and portraits into tensors on the device."""
    device = accelerator.device
    weight_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    pipeline = SPFPortraitPipeline.from_pretrained(
        args.pretrained_model_name_or_path,
        revision=args.revision,
        variant=args.variant,
        cache_dir=args.cache_dir,
        safety_checker=None,
        requires_safety_checker=False,
        dtype=weight_dtype,
    ).to(device)
    pipeline.set_progress_bar_config(disable=True)
    noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    clip, clip_tokenizer, clip_processor = load_clip(args, device)
    for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder, clip):
        module.requires_grad_(False)

    unet = pipeline.unet
    if args.stage1_lora_path is not None:
        state_dict, network_alphas, metadata = SPFPortraitPipeline.lora_state_dict(
            args.stage1_lora_path, return_lora_metadata=True, use_safetensors=True
        )
        SPFPortraitPipeline.load_lora_into_unet(
            state_dict, network_alphas, unet, adapter_name="default", metadata=metadata
        )
        unet.set_adapter("default")
        for name, parameter in unet.named_parameters():
            parameter.requires_grad_(".lora_" in name)
    else:
        unet.add_adapter(lora_config(args, unet))
    cast_training_params(unet, dtype=torch.float32)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()

    table = make_prompt_table(
        inputs.pairs, inputs.tokens, inputs.tokenizer, pipeline.text_encoder, clip, clip_tokenizer
    )
    run = Run(
        args=args,
        accelerator=accelerator,
        inputs=inputs,
        pipeline=pipeline,
        unet=unet,
        response_unet=unet,
        noise_scheduler=noise_scheduler,
        clip=clip,
        clip_processor=clip_processor,
        table=table,
        training=encode_training_portraits(args, inputs, pipeline.vae, device),
    )
    if uses_enhancement(args):
        run.training.image_embeds = embed_training_portraits(run)
    return run


def load_clip(
    args: argparse.Namespace, device: torch.device
) -> tuple[CLIPModel, CLIPTokenizer, CLIPImageProcessorPil]:
    """The CLIP model of --clip_model_name_or_path in float32, its tokenizer and its image processor."""
    name = args.clip_model_name_or_path
    clip = CLIPModel.from_pretrained(name, cache_dir=args.cache_dir, dtype=torch.float32).to(device).eval()
    tokenizer = load_tokenizer(name, cache_dir=args.cache_dir)
    return clip, tokenizer, CLIPImageProcessorPil.from_pretrained(name, cache_dir=args.cache_dir)


@torch.no_grad()
def encode_training_portraits(
    args: argparse.Namespace, inputs: Inputs, vae: AutoencoderKL, device: torch.device
) -> Portraits:
    """The training pictures as latents, encoded once; nothing in them is random."""
    latents = []
    for start in range(0, len(inputs.rows), args.train_batch_size):
        rows = inputs.rows[start : start + args.train_batch_size]
        pixels = torch.stack([preprocess_image(load_image(row), args.resolution) for row in rows])
        latents.append(vae.encode(pixels.to(device, vae.dtype)).latent_dist.mode().float() * vae.config.scaling_factor)
    return Portraits(torch.cat(latents), torch.arange(len(inputs.rows), device=device))


def draw_alignment_portraits(run: Run) -> Portraits:
    """Portraits of the original model from base prompts, shared between the processes, each from a seed of its own."""
    args, accelerator = run.args, run.accelerator
    pair_index = list(range(len(run.inputs.rows), len(run.inputs.pairs)))
    share = -(-len(pair_index) // accelerator.num_processes)
    first = accelerator.process_index * share
    # Every process draws as many, the last ones perhaps some too many, which are cut off again.
    own = [min(i, len(pair_index) - 1) for i in range(first, first + share)]
    with active_adapters(run.unet, None):
        drawn = draw_latents(
            run.pipeline,
            [run.inputs.pairs[pair_index[i]].base_prompt for i in own],
            seed=args.seed + 1_000_000 + first,
            num_inference_steps=args.alignment_inference_steps,
            guidance_scale=args.alignment_guidance_scale,
            height=args.resolution,
            width=args.resolution,
            batch_size=2 * args.train_batch_size,
        )
    latents = accelerator.gather(drawn.to(run.device))[: len(pair_index)]
    return Portraits(latents, torch.tensor(pair_index, device=run.device))


def prepare_alignment(run: Run) -> Portraits:
    """The portraits both paths are aligned on, with their SFCMs where the mode averages over noise samples."""
    source = run.args.alignment_source
    if source == "data":
        alignment = Portraits(run.training.latents, run.training.pair_index)
    else:
        alignment = draw_alignment_portraits(run)
        if source == "both":
            latents = torch.cat([alignment.latents, run.training.latents])
            alignment = Portraits(latents, torch.cat([alignment.pair_index, run.training.pair_index]))
    if SFCM_MODES[run.args.sfcm_mode].averaged:
        alignment.sfcm = fill_sfcm_bank(run, alignment)
    return alignment


@torch.no_grad()
def fill_sfcm_bank(run: Run, portraits: Portraits) -> torch.Tensor:
    """The SFCM of each portrait, its noise difference averaged over several noise samples at high timesteps.

    Returns:
        (M, 1, H, W) float32 in [0, 1].

    Source: [ours].
    """
    args, maps = run.args, []
    low, high = args.sfcm_timesteps
    size = 2 * args.train_batch_size
    for start in range(0, len(portraits.latents), size):
        latents, rows = portraits.latents[start : start + size], portraits.pair_index[start : start + size]
        # Each portrait has its own generator, so that the size of a batch does not change its map.
        generators = [torch.Generator().manual_seed(args.seed + 2_000_000 + start + i) for i in range(len(latents))]
        difference, probs, resolutions = 0, [], []
        for sample in range(args.sfcm_noise_samples):
            noise = torch.stack([torch.randn(latents.shape[1:], generator=own) for own in generators]).to(run.device)
            # One timestep from each part of the range, so that few samples cover it.
            offsets = torch.cat([torch.rand(1, generator=own) for own in generators])
            place = (sample + offsets) / args.sfcm_noise_samples
            timesteps = (low + place * (high - low)).long().to(run.device)
            noisy_latents = run.noise_scheduler.add_noise(latents, noise, timesteps)
            reference_embeds, response_embeds = prompt_embeds(run, rows)
            with (
                capture_cross_attention(run.unet) as store,
                dual_path(run.unet, noisy_latents, timesteps, reference_embeds, response_embeds, store=store) as paths,
            ):
                features = paths.reference.at_resolution(phrase_map_resolution(paths.reference.resolutions))
            start_pred = paths.reference_pred
            if SFCM_MODES[args.sfcm_mode].target_only:
                start_pred = run.unet(noisy_latents, timesteps, reference_embeds, return_dict=False)[0]
            difference = difference + noise_difference(paths.response_pred, start_pred)
            probs += features.attention_probs.values()
            resolutions += features.resolutions.values()
        maps.append(make_sfcm(run, rows, difference, probs, resolutions))
    return torch.cat(maps)


def make_sfcm(
    run: Run,
    rows: torch.Tensor,
    difference: torch.Tensor,
    attention_probs: Sequence[torch.Tensor],
    resolutions: Sequence[tuple[int, int]],
) -> torch.Tensor:
    """The SFCM (B, 1, H, W) of pairs `rows` (B,) from a noise difference and reference attention, by --sfcm_mode."""
    table = run.table
    maps = phrase_attention_maps(attention_probs, resolutions, table.phrase_weights[rows], difference.shape[-2:])
    mode = SFCM_MODES[run.args.sfcm_mode]
    return mode.compute(difference, maps, table.distances[rows], table.phrase_mask[rows])


def prompt_embeds(run: Run, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Text embeddings (B, T, E) of the reference and of the response prompt of table rows (B,)."""
    table = run.table
    return table.prompt_embeds[table.reference_rows[rows]], table.prompt_embeds[table.response_rows[rows]]


# ---------------------------------------------------------------------------------------------------------- batches


@dataclass(frozen=True)
class Batch:
    """One step's rows on this process.

    Attributes:
        index: (B,) the portraits.
        kinds: (B,) FULL, BASE or EMPTY.
        pairs: (B,) their pairs of prompts; `rows` (B,) the rows of the prompt table.
        noise, noisy_latents: (B, C, H, W) float32; timesteps: (B,).
    """

    index: torch.Tensor
    kinds: torch.Tensor
    pairs: torch.Tensor
    rows: torch.Tensor
    noise: torch.Tensor
    noisy_latents: torch.Tensor
    timesteps: torch.Tensor


def draw_batch(
    run: Run,
    portraits: Portraits,
    micro_step: int,
    stream: int,
    unchanged_share: float = 0.0,
    timestep_power: float = 0.0,
) -> Batch:
    """Draw a batch as a pure function of seed, step and stream, cut into the processes' shares.

    Args:
        portraits: what to draw from.
        micro_step: counts batches, from 0.
        stream: keeps apart what one step draws twice.
        unchanged_share: share of BASE and EMPTY rows, in [0, 1).
        timestep_power: timesteps are drawn with density (noise/signal)^power; 0 is uniform.
    """
    args, accelerator = run.args, run.accelerator
    size = args.train_batch_size * accelerator.num_processes
    own = slice(
        accelerator.process_index * args.train_batch_size, (accelerator.process_index + 1) * args.train_batch_size
    )
    generator = torch.Generator().manual_seed((args.seed * 1_000_003 + micro_step) * 4 + stream)
    index = torch.tensor(batch_indices(micro_step, size, len(portraits.latents), args.seed + stream))[own]
    # Stratified, so that a batch has its share of each kind however small the share is.
    place = (torch.randperm(size, generator=generator) + torch.rand(size, generator=generator)) / size
    kinds = torch.where(place < unchanged_share / 3, EMPTY, torch.where(place < unchanged_share, BASE, FULL))[own]
    noise = torch.randn(size, *portraits.latents.shape[1:], generator=generator)[own].to(run.device)
    density = timestep_density(run.noise_scheduler.alphas_cumprod.cpu(), timestep_power)
    timesteps = torch.multinomial(density, size, replacement=True, generator=generator)[own]
    index, kinds, timesteps = (values.to(run.device) for values in (index, kinds, timesteps))
    pairs = portraits.pair_index[index]
    noisy_latents = run.noise_scheduler.add_noise(portraits.latents[index], noise, timesteps)
    return Batch(index, kinds, pairs, kinds * len(run.inputs.pairs) + pairs, noise, noisy_latents, timesteps)


def timestep_density(alphas_cumprod: torch.Tensor, power: float) -> torch.Tensor:
    """Weights of the timesteps, (noise/signal)^power of the variances.

    Where a head is, and how large, is decided at high timesteps, where errors of the predicted noise are small numbers
    and move the portrait most.

    Source: [ours].
    """
    density = ((1 - alphas_cumprod) / alphas_cumprod) ** power
    # A schedule that ends in pure noise has no signal at its last timestep.
    return torch.where(density.isfinite(), density, density[density.isfinite()].max())


# ----------------------------------------------------------------------------------------------------------- losses
# Each context below is one forward of a step and yields its losses by name. The caller runs backward inside it, since
# a recomputation under gradient checkpointing has to find hooks and processors as the forward saw them.


def uses_enhancement(args: argparse.Namespace) -> bool:
    """Whether any step computes the enhancement loss."""
    return args.stage2_steps > 0 and args.stage2_objective != "composed" and args.enhancement_loss != "none"


def loss_weights(args: argparse.Namespace) -> dict[str, float]:
    """Weight of each loss by name."""
    return {
        "diffusion": 1.0,
        "enhancement": args.lambda_enh,
        "text_consistent": args.lambda_text,
        "fine_grained": args.lambda_fine,
        "base_prompt": args.lambda_base,
        "composed": 1.0,
    }


@contextmanager
def diffusion_terms(run: Run, micro_step: int, enhance: bool) -> Iterator[dict[str, torch.Tensor]]:
    """`L_diffusion` on the training portraits with the full prompt, and `L_enh` if asked for."""
    batch = draw_batch(run, run.training, micro_step, stream=0)
    _, response_embeds = prompt_embeds(run, batch.rows)
    model_pred = run.response_unet(batch.noisy_latents, batch.timesteps, response_embeds, return_dict=False)[0]
    target = batch.noise
    if run.noise_scheduler.config.prediction_type == "v_prediction":
        target = run.noise_scheduler.get_velocity(run.training.latents[batch.index], batch.noise, batch.timesteps)
    parts = {"diffusion": diffusion_loss(model_pred, target).mean()}
    if enhance:
        parts["enhancement"] = enhancement_loss(run, batch, model_pred)
    yield parts


@contextmanager
def alignment_terms(run: Run, micro_step: int) -> Iterator[dict[str, torch.Tensor]]:
    """`L_text` and `L_fine` outside the SFCM, and predictions kept for unchanged prompts [ours]."""
    args, table = run.args, run.table
    batch = draw_batch(run, run.alignment, micro_step, stream=1, unchanged_share=args.base_prompt_share)
    with ExitStack() as stack:
        store = stack.enter_context(capture_cross_attention(run.unet))
        paths = stack.enter_context(
            dual_path(
                run.unet,
                batch.noisy_latents,
                batch.timesteps,
                *prompt_embeds(run, batch.rows),
                mode=args.dual_path,
                store=store,
                response_unet=run.response_unet,
            )
        )
        reference, response = paths.reference, paths.response
        sfcm = alignment_sfcm(run, batch, paths.response_pred.detach(), paths.reference_pred, reference)
        resolutions = list(reference.resolutions.values())
        unchanged = (batch.kinds != FULL).float()
        base_error = diffusion_loss(paths.response_pred, paths.reference_pred)
        yield {
            "text_consistent": text_consistent_loss(
                list(response.attention_probs.values()),
                list(reference.attention_probs.values()),
                resolutions,
                sfcm,
                table.base_positions[batch.rows],
                table.full_positions[batch.rows],
                table.position_mask[batch.rows],
                table.base_padding[batch.rows],
                table.full_padding[batch.rows],
            ).mean(),
            "fine_grained": fine_grained_loss(
                list(response.queries.values()), list(reference.queries.values()), resolutions, sfcm
            ).mean(),
            "base_prompt": (base_error * unchanged).mean(),
        }


@contextmanager
def composed_terms(run: Run, micro_step: int) -> Iterator[dict[str, torch.Tensor]]:
    """`L_composed`: the stage-1 adapter's change inside the SFCM, the original model's prediction elsewhere [ours]."""
    args = run.args
    batch = draw_batch(
        run,
        run.alignment,
        micro_step,
        stream=2,
        unchanged_share=args.base_prompt_share,
        timestep_power=args.composed_timestep_power,
    )
    reference_embeds, response_embeds = prompt_embeds(run, batch.rows)
    reference_pred, full_pred, base_pred, features = composed_predictions(
        run, batch, reference_embeds, response_embeds
    )
    sfcm = alignment_sfcm(run, batch, full_pred, reference_pred, features)
    target = compose_prediction(
        reference_pred, full_pred, base_pred, sfcm, args.sfcm_gamma, args.teacher_scale, args.teacher_base_weight
    )
    response_pred = run.response_unet(batch.noisy_latents, batch.timesteps, response_embeds, return_dict=False)[0]
    yield {"composed": diffusion_loss(response_pred, target).mean()}


@torch.no_grad()
def composed_predictions(
    run: Run, batch: Batch, reference_embeds: torch.Tensor, response_embeds: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, CrossAttentionFeatures | None]:
    """Predictions (B, C, H, W) of the original model, and of the stage-1 adapter with the full and the base prompt.

    With them come the original model's features, if the map asks for them.

    The teacher sees FULL rows alone; elsewhere its predictions are the reference's, which the composition keeps.
    """
    full = (batch.kinds == FULL).nonzero().flatten()
    teacher_rows, teacher_embeds = full.repeat(2), torch.cat([response_embeds[full], reference_embeds[full]])
    with ExitStack() as stack:
        store = None
        if not SFCM_MODES[run.args.sfcm_mode].averaged:
            store = stack.enter_context(capture_cross_attention(run.unet))
        recording = store.record() if store is not None else nullcontext()
        if run.args.dual_path == "single_pass":
            rows = torch.cat([torch.arange(len(batch.kinds), device=run.device), teacher_rows])
            embeds = torch.cat([reference_embeds, teacher_embeds])
            names = ["__base__"] * len(batch.kinds) + [STAGE1_ADAPTER] * len(teacher_rows)
            with adapters_per_sample(run.unet, names), recording:
                preds = run.unet(batch.noisy_latents[rows], batch.timesteps[rows], embeds, return_dict=False)[0]
            reference_pred, teacher_preds = preds[: len(batch.kinds)], preds[len(batch.kinds) :]
        else:
            with active_adapters(run.unet, None), recording:
                reference_pred = run.unet(batch.noisy_latents, batch.timesteps, reference_embeds, return_dict=False)[0]
            teacher_preds = reference_pred[teacher_rows]
            if len(full):
                with active_adapters(run.unet, STAGE1_ADAPTER):
                    teacher_preds = run.unet(
                        batch.noisy_latents[teacher_rows],
                        batch.timesteps[teacher_rows],
                        teacher_embeds,
                        return_dict=False,
                    )[0]
        features = store.pop().rows(0, len(batch.kinds)) if store is not None else None
    full_pred, base_pred = (reference_pred.index_copy(0, full, preds) for preds in teacher_preds.chunk(2))
    return reference_pred, full_pred, base_pred, features


def alignment_sfcm(
    run: Run,
    batch: Batch,
    response_pred: torch.Tensor,
    reference_pred: torch.Tensor,
    reference: CrossAttentionFeatures | None,
) -> torch.Tensor:
    """The SFCM (B, 1, H, W) of a batch, from the bank or this step's predictions; zero where nothing may change."""
    if SFCM_MODES[run.args.sfcm_mode].averaged:
        sfcm = run.alignment.sfcm[batch.index]
    else:
        features = reference.at_resolution(phrase_map_resolution(reference.resolutions))
        difference = noise_difference(response_pred, reference_pred)
        probs, resolutions = list(features.attention_probs.values()), list(features.resolutions.values())
        sfcm = make_sfcm(run, batch.pairs, difference, probs, resolutions)
    return sfcm * (batch.kinds == FULL)[:, None, None, None]


def enhancement_loss(run: Run, batch: Batch, model_pred: torch.Tensor) -> torch.Tensor:
    """`L_enh` of the one-step prediction, weighed by alpha_bar_t [ours]: at high t the prediction is noise."""
    scheduler = run.noise_scheduler
    latents = predict_original_sample(
        batch.noisy_latents, model_pred, batch.timesteps, scheduler.alphas_cumprod, scheduler.config.prediction_type
    )
    vae = run.pipeline.vae
    pixels = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
    losses = ENHANCEMENT_LOSSES[run.args.enhancement_loss](
        embed_pixels(run.clip, run.clip_processor, pixels),
        run.training.image_embeds[batch.index],
        run.table.target_embeds[batch.pairs],
    )
    return (scheduler.alphas_cumprod.to(run.device)[batch.timesteps] * losses).mean()


@torch.no_grad()
def embed_training_portraits(run: Run) -> torch.Tensor:
    """CLIP image embeddings (N, E') of the training pictures."""
    embeds = []
    for row in run.inputs.rows:
        pixels = preprocess_image(load_image(row), run.args.resolution)[None].to(run.device)
        embeds.append(embed_pixels(run.clip, run.clip_processor, pixels))
    return torch.cat(embeds)


def step_terms(run: Run, stage: int) -> list[Callable[[Run, int], AbstractContextManager[dict[str, torch.Tensor]]]]:
    """The forwards of a step.

    The diffusion term comes last: under DDP only the last backward is reduced, and the alignment terms leave some LoRA
    weights without a gradient.
    """
    objective = run.args.stage2_objective
    if stage == 1:
        return [partial(diffusion_terms, enhance=False)]
    terms = [composed_terms] if objective != "paper" else []
    if objective != "composed":
        terms = [alignment_terms, *terms, partial(diffusion_terms, enhance=run.args.enhancement_loss != "none")]
    return terms


def check_finite(parts: dict[str, torch.Tensor], global_step: int) -> None:
    """Stop before the update at the first loss, or norm of the gradient, that is not finite."""
    for name, value in parts.items():
        if not torch.isfinite(value):
            raise FloatingPointError(
                f"{name!r} is {value.item()} at step {global_step}; nothing was updated, and what was saved "
                "before is whole. A lower --learning_rate or --mixed_precision bf16 instead of fp16 usually helps."
            )


def train_step(
    run: Run, stage: int, global_step: int, optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter]
) -> dict[str, float]:
    """One update of the LoRA; returns its losses by name, averaged over the batches of the step."""
    accelerator, accumulation = run.accelerator, run.args.gradient_accumulation_steps
    weights, terms, means = loss_weights(run.args), step_terms(run, stage), {}
    for k in range(accumulation):
        for i, term in enumerate(terms):
            reduces = k == accumulation - 1 and i == len(terms) - 1
            with nullcontext() if reduces else accelerator.no_sync(run.response_unet):
                with term(run, global_step * accumulation + k) as parts:
                    check_finite(parts, global_step)
                    accelerator.backward(sum(weights[name] * value for name, value in parts.items()) / accumulation)
            for name, value in parts.items():
                means[name] = means.get(name, 0.0) + value.detach() / accumulation
    norm = accelerator.clip_grad_norm_(parameters, run.args.max_grad_norm)
    if accelerator.scaler is None:  # a scaler skips such an update by itself
        check_finite({"gradient": norm}, global_step)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {name: accelerator.reduce(value, "mean").item() for name, value in means.items()}


# ------------------------------------------------------------------------------------------------- pictures and files


def draw_validation(run: Run, global_step: int) -> None:
    """Write one picture: rows are seeds; columns are the original model and the adapted one with the base prompt, the
    adapted one with the full prompt, and the SFCM over it."""
    args, accelerator = run.args, run.accelerator
    if args.num_validation_images == 0 or not accelerator.is_main_process:
        return
    pair = run.inputs.validation_pair
    targets = [(t.replaces, t.text) if t.replaces is not None else t.text for t in pair.target_prompts]
    shared = {
        "prompt": pair.base_prompt,
        "num_inference_steps": args.validation_inference_steps,
        "guidance_scale": args.validation_guidance_scale,
        "height": args.resolution,
        "width": args.resolution,
    }
    rows = []
    # accelerate's UNet answers in float32; autocast brings that to the dtype of the other models.
    with active_adapters(run.unet, "default"), accelerator.autocast():
        for seed in range(args.num_validation_images):
            base = run.pipeline(**shared, compare=True, generator=torch.Generator().manual_seed(args.seed + seed))
            full = run.pipeline(
                **shared,
                target_prompt=targets,
                base_phrases=list(pair.base_phrases),
                return_sfcm=True,
                generator=torch.Generator().manual_seed(args.seed + seed),
            )
            overlay = overlay_heat_map(full.images[0], full.sfcm[0, 0])
            rows.append([base.reference_images[0], base.images[0], full.images[0], overlay])
    headers = ("original, base prompt", "adapted, base prompt", f"adapted, {pair.target_text}", "SFCM")
    grid = picture_grid(rows, headers)
    path = Path(args.output_dir) / "validation" / f"step_{global_step:06d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    grid.save(path)
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({"validation": np.asarray(grid)[None]}, step=global_step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({"validation": [grid]}, step=global_step)


@torch.no_grad()
def draw_alignment(run: Run) -> None:
    """Write the first alignment portraits and the SFCM over each, so that one sees what stage 2 will protect."""
    args, accelerator, alignment = run.args, run.accelerator, run.alignment
    if args.num_validation_images == 0 or alignment.sfcm is None or not accelerator.is_main_process:
        return
    vae, processor, rows = run.pipeline.vae, run.pipeline.image_processor, []
    for latents, sfcm in zip(alignment.latents[: args.num_validation_images], alignment.sfcm):
        pixels = vae.decode(latents[None].to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
        portrait = processor.postprocess(pixels.float(), output_type="pil")[0]
        rows.append([portrait, overlay_heat_map(portrait, sfcm[0].cpu())])
    path = Path(args.output_dir) / "validation" / "alignment.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    picture_grid(rows, ("alignment portrait", "SFCM")).save(path)


def picture_grid(rows: Sequence[Sequence[Image.Image]], headers: Sequence[str]) -> Image.Image:
    """Pictures of one size in rows, each at least 192 pixels wide, under a line of headers."""
    factor = max(1, -(-192 // rows[0][0].width))
    width, height = rows[0][0].width * factor, rows[0][0].height * factor
    margin, top = 6, 22
    grid = Image.new(
        "RGB", (len(headers) * (width + margin) + margin, len(rows) * (height + margin) + margin + top), "white"
    )
    for column, header in enumerate(headers):
        ImageDraw.Draw(grid).text((margin + column * (width + margin), 6), header, fill="black")
    for i, row in enumerate(rows):
        for column, picture in enumerate(row):
            place = (margin + column * (width + margin), top + i * (height + margin))
            grid.paste(picture.resize((width, height), Image.Resampling.LANCZOS), place)
    return grid


def save_lora(run: Run, folder: Path) -> None:
    """Write the LoRA in diffusers' format with its metadata, whole or not at all."""
    if not run.accelerator.is_main_process:
        return
    folder.mkdir(parents=True, exist_ok=True)
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(run.unet, adapter_name="default"))
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
        SPFPortraitPipeline.save_lora_weights(
            temporary,
            unet_lora_layers=state,
            safe_serialization=True,
            unet_lora_adapter_metadata=run.unet.peft_config["default"].to_dict(),
        )
        for file in Path(temporary).iterdir():
            os.replace(file, folder / file.name)


def add_teacher(run: Run) -> None:
    """Keep the LoRA as it is after stage 1 as a second, frozen adapter, and bring the trained one to its start.

    Started from zero, the trained LoRA has nothing to unlearn: it is the original model until it is shown more.
    """
    unet, config = run.unet, run.unet.peft_config["default"]
    starts_from_zero = run.args.stage2_objective == "composed" and run.args.composed_init == "zero"
    state = get_peft_model_state_dict(unet, adapter_name="default")
    unet.add_adapter(config, STAGE1_ADAPTER)
    set_peft_model_state_dict(unet, state, adapter_name=STAGE1_ADAPTER)
    unet.set_adapter("default")
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(".lora_" in name and f".{STAGE1_ADAPTER}." not in name)
        if ".lora_B.default." in name and starts_from_zero:
            parameter.data.zero_()


# ------------------------------------------------------------------------------------------------------------- loop


def train(args: argparse.Namespace, inputs: Inputs) -> None:
    """Both stages, from checked inputs to the LoRA in --output_dir."""
    output_dir = Path(args.output_dir)
    accelerator = Accelerator(
        gradient_accumulation_steps=1,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(project_dir=output_dir, logging_dir=output_dir / args.logging_dir),
    )
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != accelerator.num_processes:
        raise SystemExit(
            f"train_spf_portrait_lora.py: error: launched as {launched} processes, of which accelerate makes "
            f"{accelerator.num_processes}; on a machine without a GPU set ACCELERATE_USE_CPU=true"
        )
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO)
    set_seed(args.seed)
    if args.dry_run:
        clip, clip_tokenizer, _ = load_clip(args, accelerator.device)
        print_dry_run(inputs, clip_phrase_distances(clip, clip_tokenizer, inputs.pairs)[0])
        return

    run = prepare_run(args, inputs, accelerator)
    run.response_unet = accelerator.prepare(run.unet)
    if accelerator.is_main_process:
        accelerator.init_trackers("spf-portrait", config=tracker_config(args))
    logger.info(
        "%d portraits, %d processes, %d steps of stage 1, %d of stage 2",
        len(inputs.rows),
        accelerator.num_processes,
        args.stage1_steps,
        args.stage2_steps,
    )

    draw_validation(run, 0)
    total_steps = args.stage1_steps + args.stage2_steps
    with tqdm(total=total_steps, disable=not accelerator.is_local_main_process) as progress:
        if args.stage1_steps > 0:
            train_stage(run, 1, range(args.stage1_steps), args.lr_scheduler, progress)
        if args.stage2_steps > 0:
            start_stage2(run, output_dir)
            train_stage(run, 2, range(args.stage1_steps, total_steps), args.stage2_lr_scheduler, progress)

    save_lora(run, output_dir)
    draw_validation(run, total_steps)
    # The distributed wrapper goes before the group of processes it talks to, and no process before the others.
    accelerator.wait_for_everyone()
    run.response_unet = run.unet
    accelerator.free_memory()
    accelerator.end_training()
    logger.info("The LoRA is %s", output_dir / "pytorch_lora_weights.safetensors")


def start_stage2(run: Run, output_dir: Path) -> None:
    """Save stage 1's LoRA, prepare the alignment portraits and their maps, and keep stage 1 as the teacher."""
    if run.args.stage1_steps > 0:
        save_lora(run, output_dir / "stage1")
    logger.info("Preparing %s alignment portraits and their maps", run.args.alignment_source)
    run.alignment = prepare_alignment(run)
    draw_alignment(run)
    if run.args.stage2_objective != "paper":
        add_teacher(run)


def train_stage(run: Run, stage: int, steps: range, lr_scheduler_name: str, progress: tqdm) -> None:
    """The steps of one stage, with an optimizer and a learning rate of its own."""
    args, accelerator = run.args, run.accelerator
    parameters = [parameter for parameter in run.unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )
    lr_scheduler = get_scheduler(
        lr_scheduler_name, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=len(steps)
    )
    optimizer = accelerator.prepare(optimizer)
    progress.set_description(f"stage {stage}")
    for global_step in steps:
        done = global_step - steps.start
        if stage == 2 and args.sfcm_refresh_steps and done and done % args.sfcm_refresh_steps == 0:
            run.alignment.sfcm = fill_sfcm_bank(run, run.alignment)
        losses = train_step(run, stage, global_step, optimizer, parameters)
        lr_scheduler.step()
        progress.set_postfix({name: f"{value:.4f}" for name, value in losses.items()}, refresh=False)
        progress.update()
        accelerator.log({f"loss/{name}": value for name, value in losses.items()}, step=global_step + 1)
        last = global_step + 1 == progress.total
        if args.validation_steps and (global_step + 1) % args.validation_steps == 0 and not last:
            draw_validation(run, global_step + 1)


def tracker_config(args: argparse.Namespace) -> dict[str, bool | int | float | str]:
    """The flags as values a tracker can show."""
    return {
        name: value if isinstance(value, bool | int | float | str) else str(value)
        for name, value in vars(args).items()
        if value is not None
    }


def main(input_args: Sequence[str] | None = None) -> None:
    """Check everything first, so that a mistake in the input ends at once with one line."""
    args = parse_args(input_args)
    try:
        inputs = check_inputs(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"train_spf_portrait_lora.py: error: {error}") from error
    train(args, inputs)


if __name__ == "__main__":
    main()
