#!/usr/bin/env python
"""Teach a Stable Diffusion model a portrait attribute as a LoRA, without moving anything else (SPF-Portrait).

Reads top to bottom: models, portraits and their SFCMs, batches, the losses of each stage, pictures and files, and the
loop. The flags are in training/arguments.py, what is read before any model is loaded in training/inputs.py.

Legend: B batch, C channels, H/W latent size, T text tokens, P base phrases, K matched tokens, N training portraits,
M alignment portraits.
Paper: arXiv 2504.00396; `[ours]` marks what it leaves open.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

from programs.console import import_libraries, phase_bar, without_warning
from training.arguments import WITH_KEPT_ROWS, has_sfcm_bank, parse_args, uses_enhancement


if __name__ == "__main__":
    # Flags are read before the libraries are imported, which takes seconds: --help and a wrong flag answer at once.
    ARGS = parse_args()
    import_libraries()

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers import AutoencoderKL, AutoencoderTiny, DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from PIL import Image
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import CLIPImageProcessorPil, CLIPModel

from adapters import Adapters, active_adapters
from attention_processors import CrossAttentionFeatures, capture_cross_attention, phrase_map_resolution
from families.noise_process import DDPM
from families.prompt_embeds import PromptEmbeds
from loras.files import adapter_metadata, sort_header
from loras.hub import CARD, LORA_WEIGHTS
from pictures import picture_grid
from pipeline_spf_portrait import SPFPortraitPipeline, overlay_heat_map
from programs.interruption import Interrupted, StopRequest, catch_stop_signals, leave_stop_signals
from programs.loading import InputError
from sfcm import SFCM_MODES, free_regions, noise_difference, phrase_attention_maps
from training.caches import TensorCache, fingerprint, module_fingerprint
from training.checkpoints import (
    HIDDEN_PREFIX,
    CheckpointError,
    find_checkpoints,
    lock_folder,
    remove_leftovers,
    save_checkpoint,
    what_is_safe,
)
from training.data import bucketed_batch_indices, derive_seed, draw_latents, revisited_batch
from training.dual_path import dual_path
from training.inputs import (
    Inputs,
    Sample,
    TrainingSet,
    check_inputs,
    check_nothing_came,
    check_record,
    print_dry_run,
    resume_record,
)
from training.losses import (
    ENHANCEMENT_LOSSES,
    compose_prediction,
    diffusion_loss,
    fine_grained_loss,
    masked_diffusion_loss,
    text_consistent_loss,
)
from training.models import (
    keep_in_float32,
    load_adapter,
    load_base_model,
    load_clip,
    load_decoder,
    load_text_part,
    lora_config,
    use_xformers,
)
from training.optimizers import make_optimizer
from training.prompt_table import (
    BASE,
    EMPTY,
    FULL,
    PromptTable,
    embed_pixels,
    embed_targets,
    encode_prompts,
    make_prompt_table,
)
from training.sharing import make_repository, share


logger = get_logger(__name__)

STAGE1_ADAPTER = "stage1"
# Batches whose composed targets are kept at a time: latents, a few megabytes for Stable Diffusion.
KEPT_TARGETS = 16
# A scaler that starts at 2^16 and is halved each time has come down to 1 by then.
MAX_SKIPPED_IN_A_ROW = 16


# --------------------------------------------------------------------------------------------- models and portraits


@dataclass
class Portraits:
    """Portraits a step draws its batch from.

    Attributes:
        latents: M of (C, H, W) float32 on the device, scaled as the UNet expects them; of training portraits their
            mirror images come after them with --random_flip. None where each step encodes its own.
        pair_index: (M,) which pair of prompts belongs to each.
        buckets: which size each has.
        sfcm: M of (1, H, W) float32 in [0, 1], once the bank is filled.
        image_embeds: (M, E') CLIP image embeddings, where the enhancement loss asks for them.
    """

    latents: Sequence[torch.Tensor] | None
    pair_index: torch.Tensor
    buckets: tuple[int, ...]
    sfcm: Sequence[torch.Tensor] | None = None
    image_embeds: torch.Tensor | None = None


@dataclass
class Run:
    """All that a training step needs.

    Attributes:
        response_unet: the distributed wrapper of `unet`, or `unet` itself.
        alignment: what both paths are aligned on in stage 2, or what --preservation prior keeps.
        unrelated_embeds: (U, T, E) of the prompts that --preservation cat keeps.
        decoder: decodes for the enhancement loss.
        released: the pipeline's models that no step uses; they lie on the CPU while nothing is drawn.
        pixels: the batches of the stage, where latents are not cached.
        targets: composed targets (B, C, H, W) by the number of their batch, at most `KEPT_TARGETS`.
        stage, global_step: where the run is: in stage 1 or 2, after so many updates.
        skipped_updates, skipped_in_a_row: updates that a gradient scaler left out, in all and since the last one made.
        saved_step: of the last checkpoint.
        repo_id: where the LoRA will be pushed, on the main process, if it will.
    """

    args: argparse.Namespace
    accelerator: Accelerator
    inputs: Inputs
    pipeline: SPFPortraitPipeline
    unet: UNet2DConditionModel
    response_unet: torch.nn.Module
    noise_scheduler: DDPMScheduler
    clip: CLIPModel | None
    clip_processor: CLIPImageProcessorPil | None
    target_embeds: torch.Tensor | None
    decoder: AutoencoderKL | AutoencoderTiny
    table: PromptTable
    training_set: TrainingSet
    training: Portraits
    alignment: Portraits | None = None
    unrelated_embeds: torch.Tensor | None = None
    released: tuple[str, ...] = ()
    pixels: Iterator[torch.Tensor] | None = None
    targets: dict[int, torch.Tensor] = field(default_factory=dict)
    optimizer: torch.optim.Optimizer | None = None
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None = None
    stop: StopRequest = field(default_factory=StopRequest)
    stage: int = 1
    global_step: int = 0
    skipped_updates: int = 0
    skipped_in_a_row: int = 0
    saved_step: int | None = None
    repo_id: str | None = None

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def total_steps(self) -> int:
        return self.args.stage1_steps + self.args.stage2_steps


def prepare_run(args: argparse.Namespace, inputs: Inputs, accelerator: Accelerator) -> Run:
    """Load the models, add the LoRA, and turn prompts and portraits into tensors on the device.

    Raises:
        InputError: weights are missing, damaged or a pickle.
    """
    device = accelerator.device
    weight_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    pipeline = load_base_model(SPFPortraitPipeline, args, weight_dtype, inputs.references).to(device)
    noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    clip, clip_tokenizer, clip_processor = load_clip(args, device) if uses_enhancement(args) else (None, None, None)
    decoder = load_decoder(args, pipeline, weight_dtype, device)
    for module in filter(None, (pipeline.unet, pipeline.vae, pipeline.text_encoder, clip, decoder)):
        module.requires_grad_(False)

    unet, earlier = pipeline.unet, args.stage1_lora_path if inputs.resume is None else inputs.resume.folder
    if earlier is None:
        unet.add_adapter(lora_config(args, unet))
    else:
        load_adapter(pipeline, earlier)
    keep_in_float32(unet, "default")
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if args.enable_xformers_memory_efficient_attention:
        use_xformers(unet)
    unet.eval()  # the LoRA's dropout is on in the training forward alone

    cache = None if args.cache_dir is None else Path(args.cache_dir) / "spf-portrait"
    table = make_prompt_table(
        inputs.family,
        pipeline,
        inputs.pairs,
        inputs.tokens,
        encode=args.cache_text_embeddings,
        cache=TensorCache(cache),
        shown=accelerator.is_local_main_process,
    )
    training_set = make_training_set(args, inputs, accelerator)
    count = len(inputs.rows)
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
        target_embeds=None if clip is None else embed_targets(clip, clip_tokenizer, inputs.pairs),
        decoder=decoder,
        table=table,
        training_set=training_set,
        training=Portraits(None, torch.arange(count, device=device), inputs.buckets[:count]),
    )
    if args.cache_latents:
        run.training.latents = encode_training_portraits(run, TensorCache(cache))
        if uses_enhancement(args):
            run.training.image_embeds = embed_training_portraits(run)
    if args.preservation == "cat":
        with torch.no_grad():
            run.unrelated_embeds = inputs.family.encode(pipeline, inputs.unrelated_ids.to(device))
    if inputs.resume is not None:
        run.stage, run.global_step = inputs.resume.state["stage"], inputs.resume.state["global_step"]
        run.saved_step = run.global_step
    release_unused(run)
    return run


def make_training_set(args: argparse.Namespace, inputs: Inputs, accelerator: Accelerator) -> TrainingSet:
    """The training portraits, of whose batches this process has its share."""
    first = accelerator.process_index * args.train_batch_size
    return TrainingSet(
        rows=inputs.rows,
        keys=inputs.keys,
        sizes=inputs.sizes,
        buckets=inputs.buckets[: len(inputs.rows)],
        batch_size=args.train_batch_size * accelerator.num_processes,
        share=slice(first, first + args.train_batch_size),
        seed=args.seed,
        repeats=args.repeats,
        random_flip=args.random_flip,
        center_crop=args.center_crop,
        interpolation=args.image_interpolation_mode,
    )


@torch.no_grad()
def encode_pixels(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """Latents (B, C, H, W) float32 of pictures (B, 3, H', W') in [-1, 1]; nothing in them is random."""
    return vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode().float() * vae.config.scaling_factor


def training_samples(run: Run) -> list[Sample]:
    """Every form in which a training portrait can come: as it is, then mirrored where that is asked for."""
    mirrored = (False, True) if run.args.random_flip else (False,)
    return [Sample(i, flip) for flip in mirrored for i in range(len(run.inputs.rows))]


def read_pixels(
    run: Run, numbers: Sequence[Sample] | range, read: Callable[[Sample | int], torch.Tensor]
) -> DataLoader:
    """What `read` makes of each of them, in order, by --dataloader_num_workers processes."""
    workers = run.args.dataloader_num_workers
    return DataLoader(
        numbers, batch_size=None, collate_fn=read, num_workers=workers, worker_init_fn=leave_stop_signals
    )


def encode_training_portraits(run: Run, cache: TensorCache) -> list[torch.Tensor]:
    """Latents (C, H, W) of each of `training_samples`, each encoded once."""
    vae, training_set, samples = run.pipeline.vae, run.training_set, training_samples(run)
    # Only a file outlives the model that made it.
    model = None if cache.folder is None else module_fingerprint(vae)
    keys = [
        fingerprint(
            "latents",
            model,
            training_set.keys[sample.index],
            training_set.sizes[training_set.buckets[sample.index]],
            sample.flip,
            training_set.interpolation,
        )
        for sample in samples
    ]

    def compute(missing: Sequence[int]) -> Iterator[torch.Tensor]:
        pictures = read_pixels(run, [samples[i] for i in missing], training_set.pixels)
        with phase_bar("latents", len(missing), "portrait", run.accelerator.is_local_main_process) as bar:
            for pixels in pictures:
                yield encode_pixels(vae, pixels[None])[0]
                bar.update()

    return [latents.to(run.device) for latents in cache.get_or_compute(keys, compute)]


def release_unused(run: Run) -> None:
    """Take what no step uses off the device: it comes back for the pictures, see `resident`."""
    args, released = run.args, []
    if args.cache_latents and not (uses_enhancement(args) and args.tiny_vae_model_name_or_path is None):
        released.append("vae")
    if args.cache_text_embeddings:
        released.append("text_encoder")
    run.released = tuple(released)
    for name in released:
        getattr(run.pipeline, name).to("cpu")
    if run.device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def resident(run: Run) -> Iterator[None]:
    """Inside, all of the pipeline's models lie on the device."""
    try:
        for name in run.released:
            getattr(run.pipeline, name).to(run.device)
        yield
    finally:
        for name in run.released:
            getattr(run.pipeline, name).to("cpu")


def draw_alignment_portraits(run: Run) -> Portraits:
    """Portraits of the original model from base prompts, shared between the processes, each from a seed of its own."""
    inputs, count = run.inputs, len(run.inputs.rows)
    pair_index, buckets, latents = list(range(count, len(inputs.pairs))), inputs.buckets[count:], []
    accelerator, sizes = run.accelerator, runs_of_equal(buckets)
    own = sum(-(-(stop - first) // accelerator.num_processes) for first, stop in sizes)
    with (
        phase_bar("alignment portraits", own, "portrait", accelerator.is_local_main_process) as bar,
        active_adapters(run.unet, None),
        resident(run),
    ):
        for first, stop in sizes:
            latents += draw_one_size(run, pair_index[first:stop], first, inputs.sizes[buckets[first]], bar)
    return Portraits(latents, torch.tensor(pair_index, device=run.device), buckets)


def draw_one_size(
    run: Run, pair_index: Sequence[int], first: int, size: tuple[int, int], bar: tqdm
) -> list[torch.Tensor]:
    """Latents of one (H, W) in pixels for the base prompts of these pairs; `first` counts the seeds."""
    args, accelerator = run.args, run.accelerator
    share = -(-len(pair_index) // accelerator.num_processes)
    start = accelerator.process_index * share
    # Every process draws as many, the last ones perhaps some too many, which are cut off again.
    own = [min(i, len(pair_index) - 1) for i in range(start, start + share)]
    drawn = draw_latents(
        run.pipeline,
        [run.inputs.pairs[pair_index[i]].base_prompt for i in own],
        seeds=[derive_seed(args.seed, f"alignment portrait {first + i}") for i in own],
        num_inference_steps=args.alignment_inference_steps,
        guidance_scale=args.alignment_guidance_scale,
        height=size[0],
        width=size[1],
        batch_size=2 * args.train_batch_size,
        advance=bar.update,
    )
    return list(accelerator.gather(drawn.to(run.device))[: len(pair_index)])


def runs_of_equal(values: Sequence[int]) -> list[tuple[int, int]]:
    """Start and end of each stretch of equal values."""
    starts = [i for i, value in enumerate(values) if i == 0 or value != values[i - 1]]
    return list(zip(starts, [*starts[1:], len(values)], strict=True))


def prepare_alignment(run: Run) -> Portraits:
    """The portraits both paths are aligned on, with their SFCMs where the mode averages over noise samples."""
    source, parts = run.args.alignment_source, []
    if source != "data":
        parts.append(draw_alignment_portraits(run))
    if source != "generated":
        parts.append(own_portraits(run))
    alignment = Portraits(
        [latents for part in parts for latents in part.latents],
        torch.cat([part.pair_index for part in parts]),
        tuple(bucket for part in parts for bucket in part.buckets),
    )
    if run.inputs.sfcm is not None:
        alignment.sfcm = maps_as_given(run, alignment)
    elif has_sfcm_bank(run.args):
        alignment.sfcm = fill_sfcm_bank(run, alignment)
    return alignment


def maps_as_given(run: Run, portraits: Portraits) -> list[torch.Tensor]:
    """The maps of --sfcm_dir at the size of each portrait's latents: M of (1, H, W) in [0, 1]."""
    return [
        F.interpolate(sfcm[None].to(run.device), latents.shape[-2:], mode="area")[0]
        for sfcm, latents in zip(run.inputs.sfcm, portraits.latents, strict=True)
    ]


def own_portraits(run: Run) -> Portraits:
    """The training portraits to be aligned on: as they are, never mirrored, for each has one map."""
    training, count = run.training, len(run.inputs.rows)
    if training.latents is not None:
        return Portraits(training.latents[:count], training.pair_index, training.buckets)
    samples = [Sample(i) for i in range(count)]
    latents = [
        encode_pixels(run.pipeline.vae, pixels[None])[0]
        for pixels in read_pixels(run, samples, run.training_set.pixels)
    ]
    return Portraits(latents, training.pair_index, training.buckets)


@torch.no_grad()
def fill_sfcm_bank(run: Run, portraits: Portraits) -> list[torch.Tensor]:
    """The SFCM of each portrait, its noise difference averaged over several noise samples at high timesteps.

    Returns:
        M of (1, H, W) float32 in [0, 1].

    Source: [ours].
    """
    size, maps = 2 * run.args.train_batch_size, {}
    with phase_bar("maps", len(portraits.buckets), "map", run.accelerator.is_local_main_process) as bar:
        for bucket in sorted(set(portraits.buckets)):
            members = [i for i, own in enumerate(portraits.buckets) if own == bucket]
            for start in range(0, len(members), size):
                chunk = members[start : start + size]
                maps |= zip(chunk, averaged_sfcm(run, portraits, chunk), strict=True)
                bar.update(len(chunk))
    return [maps[i] for i in range(len(portraits.buckets))]


def averaged_sfcm(run: Run, portraits: Portraits, members: Sequence[int]) -> torch.Tensor:
    """The SFCMs (B, 1, H, W) of portraits of one size."""
    args, rows = run.args, portraits.pair_index[list(members)]
    latents = torch.stack([portraits.latents[i] for i in members])
    low, high = args.sfcm_timesteps
    # Each portrait has its own generator, so that the size of a batch does not change its map.
    generators = [torch.Generator().manual_seed(derive_seed(args.seed, f"map {i}")) for i in members]
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
            dual_path(
                Adapters(run.unet),
                partial(run.inputs.family.predict, run.unet),
                noisy_latents,
                timesteps,
                reference_embeds,
                response_embeds,
                store=store,
            ) as paths,
        ):
            features = paths.reference.at_resolution(phrase_map_resolution(paths.reference.resolutions))
        start_pred = paths.reference_pred
        if SFCM_MODES[args.sfcm_mode].target_only:
            start_pred = run.inputs.family.predict(run.unet, noisy_latents, timesteps, reference_embeds)
        difference = difference + noise_difference(paths.response_pred, start_pred, to_epsilon(run, timesteps))
        probs += features.attention_probs.values()
        resolutions += features.resolutions.values()
    return make_sfcm(run, rows, difference, probs, resolutions)


def make_sfcm(
    run: Run,
    rows: torch.Tensor,
    difference: torch.Tensor,
    attention_probs: Sequence[torch.Tensor],
    resolutions: Sequence[tuple[int, int]],
) -> torch.Tensor:
    """The SFCM (B, 1, H, W) of pairs `rows` (B,) from a noise difference and reference attention, by --sfcm_mode.

    Free phrases are not protected, and their regions are open whatever the mode [ours].
    """
    table, free = run.table, run.table.free_mask[rows]
    maps = phrase_attention_maps(attention_probs, resolutions, table.phrase_weights[rows], difference.shape[-2:])
    mode = SFCM_MODES[run.args.sfcm_mode]
    sfcm = mode.compute(difference, maps, table.distances[rows], table.phrase_mask[rows] & ~free)
    return free_regions(sfcm, maps, free)


def prompt_embeds(run: Run, rows: torch.Tensor) -> tuple[PromptEmbeds, PromptEmbeds]:
    """Text embeddings of the reference and of the response prompt of table rows (B,)."""
    table, encode = run.table, partial(run.inputs.family.encode, run.pipeline)
    return (
        encode_prompts(table, table.reference_rows[rows], encode),
        encode_prompts(table, table.response_rows[rows], encode),
    )


# ---------------------------------------------------------------------------------------------------------- batches


@dataclass(frozen=True)
class Batch:
    """One step's rows on this process.

    Index and kinds lie on the CPU, where reading them waits for no GPU; all else lies on the device.

    Attributes:
        index: (B,) the portraits, as places in their latents.
        kinds: (B,) FULL, BASE or EMPTY.
        pairs: (B,) their pairs of prompts; `rows` (B,) the rows of the prompt table.
        latents, noise, noisy_latents: (B, C, H, W) float32; timesteps: (B,).
        pixels: (B, 3, H', W') in [-1, 1], where the batch was encoded in this step.
    """

    index: torch.Tensor
    kinds: torch.Tensor
    pairs: torch.Tensor
    rows: torch.Tensor
    latents: torch.Tensor
    noise: torch.Tensor
    noisy_latents: torch.Tensor
    timesteps: torch.Tensor
    pixels: torch.Tensor | None = None


def draw_batch(
    run: Run,
    portraits: Portraits,
    micro_step: int,
    stream: int,
    unchanged_share: float = 0.0,
    timestep_power: float = 0.0,
    noise_offset: float = 0.0,
    bucket: int | None = None,
) -> Batch:
    """Draw a batch as a pure function of seed, step and stream, cut into the processes' shares.

    Args:
        portraits: what to draw from.
        micro_step: counts batches, from 0.
        stream: keeps apart what one step draws twice.
        unchanged_share: share of BASE and EMPTY rows, in [0, 1).
        timestep_power: timesteps are drawn with density (noise/signal)^power; 0 is uniform.
        noise_offset: standard deviation of an offset that all noise of one channel shares.
        bucket: of the drawn portraits take those of this size alone.
    """
    args, accelerator = run.args, run.accelerator
    size = args.train_batch_size * accelerator.num_processes
    own = slice(
        accelerator.process_index * args.train_batch_size, (accelerator.process_index + 1) * args.train_batch_size
    )
    index, latents, pixels = take_portraits(run, portraits, micro_step, size, own, stream, bucket)
    generator = torch.Generator().manual_seed((args.seed * 1_000_003 + micro_step) * 4 + stream)
    # Stratified, so that a batch has its share of each kind however small the share is.
    place = (torch.randperm(size, generator=generator) + torch.rand(size, generator=generator)) / size
    kinds = torch.where(place < unchanged_share / 3, EMPTY, torch.where(place < unchanged_share, BASE, FULL))[own]
    noise = torch.randn(size, *latents.shape[1:], generator=generator)
    density = noise_process(run.noise_scheduler).timestep_density(timestep_power)
    timesteps = torch.multinomial(density, size, replacement=True, generator=generator)[own]
    if noise_offset:
        noise = noise + noise_offset * torch.randn(size, latents.shape[1], 1, 1, generator=generator)
    timesteps, noise = send(timesteps, run.device), send(noise[own], run.device)
    pairs = portraits.pair_index[send(index % len(portraits.pair_index), run.device)]
    rows = send(kinds * len(run.inputs.pairs), run.device) + pairs
    noisy_latents = run.noise_scheduler.add_noise(latents, noise, timesteps)
    return Batch(index, kinds, pairs, rows, latents, noise, noisy_latents, timesteps, pixels)


def send(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the CPU on the device, without waiting for what a GPU still has to do."""
    return values.to(device, non_blocking=device.type == "cuda")


def take_portraits(
    run: Run, portraits: Portraits, micro_step: int, size: int, own: slice, stream: int, bucket: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """This process's portraits of a batch: places (B,), latents (B, C, H, W), and pixels where they are read now."""
    if portraits is not run.training:
        members = [i for i, other in enumerate(portraits.buckets) if bucket in (None, other)]
        buckets = [portraits.buckets[i] for i in members]
        places = bucketed_batch_indices(micro_step, size, buckets, derive_seed(run.args.seed, f"stream {stream}"))[own]
        index = [members[i] for i in places]
        return torch.tensor(index), torch.stack([portraits.latents[i] for i in index]), None
    samples = run.training_set.samples(micro_step)
    index = [sample.index + len(portraits.buckets) * sample.flip for sample in samples]
    if portraits.latents is not None:
        return torch.tensor(index), torch.stack([portraits.latents[i] for i in index]), None
    pixels = next(run.pixels).to(run.device)
    return torch.tensor(index), encode_pixels(run.pipeline.vae, pixels), pixels


def to_epsilon(run: Run, timesteps: torch.Tensor) -> torch.Tensor:
    """Factors (B,) that make a difference of two predictions one of predicted noise, whatever the UNet predicts."""
    return noise_process(run.noise_scheduler).epsilon_scale(timesteps)


# ----------------------------------------------------------------------------------------------------------- losses
# Each context below is one forward of a step and yields its losses by name. The caller runs backward inside it, since
# a recomputation under gradient checkpointing has to find hooks and processors as the forward saw them.


def loss_weights(args: argparse.Namespace) -> dict[str, float]:
    """Weight of each loss by name."""
    return {
        "diffusion": 1.0,
        # In the mean over the steps it weighs as much as if each of them computed it.
        "enhancement": args.lambda_enh * args.enhancement_every,
        "text_consistent": args.lambda_text,
        "fine_grained": args.lambda_fine,
        "base_prompt": args.lambda_base,
        "composed": 1.0,
        "preservation": args.preservation_weight,
    }


@contextmanager
def diffusion_terms(run: Run, micro_step: int, enhance: bool) -> Iterator[dict[str, torch.Tensor]]:
    """`L_diffusion` on the training portraits with the full prompt, `L_enh` if asked for, what --preservation adds.

    `mask` takes the loss inside the masks alone; `prior`, `dop` and `cat` have rows of their own in the same forward.
    """
    args, scheduler = run.args, run.noise_scheduler
    batch = draw_batch(run, run.training, micro_step, stream=0, noise_offset=args.noise_offset)
    noisy_latents, timesteps, (_, embeds) = batch.noisy_latents, batch.timesteps, prompt_embeds(run, batch.rows)
    kept = kept_rows(run, batch, micro_step) if args.preservation in WITH_KEPT_ROWS else None
    if kept is not None:
        noisy_latents = torch.cat([noisy_latents, kept.noisy_latents])
        timesteps, embeds = torch.cat([timesteps, kept.timesteps]), PromptEmbeds.cat([embeds, kept.embeds])
    preds = run.inputs.family.predict(run.response_unet, noisy_latents, timesteps, embeds)
    model_pred, target = preds[: len(batch.index)], diffusion_target(scheduler, batch)
    if args.preservation == "mask":
        losses = masked_diffusion_loss(model_pred, target, batch_masks(run, micro_step, target))
    else:
        losses = diffusion_loss(model_pred, target)
    if args.snr_gamma is not None:
        losses = losses * noise_process(scheduler).min_snr_weights(batch.timesteps, args.snr_gamma)
    parts = {"diffusion": losses.mean()}
    if enhance:
        parts["enhancement"] = enhancement_loss(run, batch, model_pred)
    if kept is not None:
        parts["preservation"] = diffusion_loss(preds[len(batch.index) :], kept.target).mean()
    yield parts


@cache
def noise_process(scheduler: DDPMScheduler) -> DDPM:
    return DDPM(type(scheduler).__name__, scheduler.config)


def diffusion_target(scheduler: DDPMScheduler, batch: Batch) -> torch.Tensor:
    """What the diffusion loss compares a batch's predictions with, (B, C, H, W): noise, or velocity."""
    return noise_process(scheduler).target(batch.latents, batch.noise, batch.timesteps)


def batch_masks(run: Run, micro_step: int, latents: torch.Tensor) -> torch.Tensor:
    """Where the target is in a batch of training portraits, (B, 1, H, W) in [0, 1] at the size of its latents."""
    return F.interpolate(run.training_set.batch_masks(micro_step).to(run.device), latents.shape[-2:], mode="area")


@dataclass(frozen=True)
class KeptRows:
    """Rows whose prediction is to stay: what the UNet is given, and what it should answer.

    Attributes:
        noisy_latents, target: (B, C, H, W); timesteps: (B,); embeds: (B, T, E).
    """

    noisy_latents: torch.Tensor
    timesteps: torch.Tensor
    embeds: torch.Tensor
    target: torch.Tensor


def kept_rows(run: Run, batch: Batch, micro_step: int) -> KeptRows:
    """The rows that --preservation sets beside a batch of training portraits, none of which asks for the target.

    `prior`: portraits of the original model with their base prompts, and their noise as the target. Else the same
    noised training portraits, and the original model's prediction as the target: `dop` with their base prompts, `cat`
    with unrelated ones.

    Source: DreamBooth's prior preservation, arXiv 2208.12242; differential output preservation as in ai-toolkit;
    contrastive adapter training, arXiv 2404.07554.
    """
    if run.args.preservation == "prior":
        # One forward has one size.
        bucket = run.training.buckets[int(batch.index[0]) % len(run.training.buckets)]
        drawn = draw_batch(run, run.alignment, micro_step, stream=1, bucket=bucket)
        embeds, _ = prompt_embeds(run, drawn.rows)
        return KeptRows(drawn.noisy_latents, drawn.timesteps, embeds, diffusion_target(run.noise_scheduler, drawn))
    if run.args.preservation == "dop":
        embeds, _ = prompt_embeds(run, batch.rows)
    else:
        embeds = run.unrelated_embeds[unrelated_choice(run, len(batch.index), micro_step)]
    with torch.no_grad(), active_adapters(run.unet, None):
        target = run.inputs.family.predict(run.unet, batch.noisy_latents, batch.timesteps, embeds)
    return KeptRows(batch.noisy_latents, batch.timesteps, embeds, target)


def unrelated_choice(run: Run, count: int, micro_step: int) -> torch.Tensor:
    """Which of the unrelated prompts each of this process's rows has: (B,), a function of seed and step."""
    accelerator = run.accelerator
    generator = torch.Generator().manual_seed((run.args.seed * 1_000_003 + micro_step) * 4 + 3)
    chosen = torch.randint(len(run.unrelated_embeds), (count * accelerator.num_processes,), generator=generator)[
        accelerator.process_index * count :
    ][:count]
    return chosen.to(run.device)


@contextmanager
def alignment_terms(run: Run, micro_step: int) -> Iterator[dict[str, torch.Tensor]]:
    """`L_text` and `L_fine` outside the SFCM, and predictions kept for unchanged prompts [ours]."""
    args, table = run.args, run.table
    batch = draw_batch(run, run.alignment, micro_step, stream=1, unchanged_share=args.base_prompt_share)
    with ExitStack() as stack:
        store = stack.enter_context(capture_cross_attention(run.unet))
        paths = stack.enter_context(
            dual_path(
                Adapters(run.unet),
                partial(run.inputs.family.predict, run.unet),
                batch.noisy_latents,
                batch.timesteps,
                *prompt_embeds(run, batch.rows),
                mode=args.dual_path,
                store=store,
                respond=partial(run.inputs.family.predict, run.response_unet),
            )
        )
        reference, response = paths.reference, paths.response
        sfcm = alignment_sfcm(run, batch, paths.response_pred.detach(), paths.reference_pred, reference)
        if args.alignment_layers == "phrase_map":
            resolution = phrase_map_resolution(reference.resolutions)
            reference, response = reference.at_resolution(resolution), response.at_resolution(resolution)
        resolutions = list(reference.resolutions.values())
        unchanged = send((batch.kinds != FULL).float(), run.device)
        base_error = diffusion_loss(paths.response_pred, paths.reference_pred) * to_epsilon(run, batch.timesteps) ** 2
        yield {
            "text_consistent": text_consistent_loss(
                list(response.attention_probs.values()),
                list(reference.attention_probs.values()),
                resolutions,
                sfcm,
                *table.positions.of(batch.rows),
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
    number = composed_batch(args, micro_step)
    batch = draw_batch(
        run,
        run.alignment,
        number,
        stream=2,
        unchanged_share=args.base_prompt_share,
        timestep_power=args.composed_timestep_power,
    )
    _, response_embeds = prompt_embeds(run, batch.rows)
    target = composed_target(run, batch, number, response_embeds)
    response_pred = run.inputs.family.predict(run.response_unet, batch.noisy_latents, batch.timesteps, response_embeds)
    losses = diffusion_loss(response_pred, target) * to_epsilon(run, batch.timesteps) ** 2
    yield {"composed": losses.mean()}


def composed_batch(args: argparse.Namespace, micro_step: int) -> int:
    """The batch that composed alignment learns from, among those of `draw_batch`: each is met several times [ours]."""
    first = args.stage1_steps * args.gradient_accumulation_steps
    return first + revisited_batch(micro_step - first, KEPT_TARGETS, args.composed_target_reuse, args.seed)


@torch.no_grad()
def composed_target(run: Run, batch: Batch, number: int, response_embeds: torch.Tensor) -> torch.Tensor:
    """What the predictions (B, C, H, W) of a batch should be, made once and kept as long as its cycle lasts [ours].

    All of it comes from frozen weights and the batch: what is not there, as in a run that goes on, is made again and
    is the same.
    """
    args = run.args
    if number in run.targets:
        return run.targets[number]
    reference_embeds, _ = prompt_embeds(run, batch.rows)
    reference_pred, full_pred, base_pred, features = composed_predictions(
        run, batch, reference_embeds, response_embeds
    )
    sfcm = alignment_sfcm(run, batch, full_pred, reference_pred, features)
    target = compose_prediction(
        reference_pred, full_pred, base_pred, sfcm, args.sfcm_gamma, args.teacher_scale, args.teacher_base_weight
    )
    if args.composed_target_reuse > 1:
        first = args.stage1_steps * args.gradient_accumulation_steps
        cycle = number - (number - first) % KEPT_TARGETS
        run.targets = {kept: value for kept, value in run.targets.items() if kept >= cycle} | {number: target}
    return target


@torch.no_grad()
def composed_predictions(
    run: Run, batch: Batch, reference_embeds: torch.Tensor, response_embeds: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, CrossAttentionFeatures | None]:
    """Predictions (B, C, H, W) of the original model, and of the stage-1 adapter with the full and the base prompt.

    With them come the original model's features, if the map asks for them.

    The teacher sees FULL rows alone, and with the base prompt only where that has a weight; elsewhere its predictions
    are the reference's, which the composition keeps.
    """
    full = send((batch.kinds == FULL).nonzero().flatten(), run.device)
    asked = [response_embeds, reference_embeds] if run.args.teacher_base_weight > 0 else [response_embeds]
    teacher_rows, teacher_embeds = full.repeat(len(asked)), PromptEmbeds.cat([embeds[full] for embeds in asked])
    with ExitStack() as stack:
        store = None
        if not has_sfcm_bank(run.args):
            store = stack.enter_context(capture_cross_attention(run.unet))
        recording = store.record() if store is not None else nullcontext()
        if run.args.dual_path == "single_pass":
            rows = torch.cat([torch.arange(len(batch.kinds), device=run.device), teacher_rows])
            embeds = PromptEmbeds.cat([reference_embeds, teacher_embeds])
            names = ["__base__"] * len(batch.kinds) + [STAGE1_ADAPTER] * len(teacher_rows)
            with Adapters(run.unet).per_sample(names), recording:
                preds = run.inputs.family.predict(run.unet, batch.noisy_latents[rows], batch.timesteps[rows], embeds)
            reference_pred, teacher_preds = preds[: len(batch.kinds)], preds[len(batch.kinds) :]
        else:
            with active_adapters(run.unet, None), recording:
                reference_pred = run.inputs.family.predict(
                    run.unet, batch.noisy_latents, batch.timesteps, reference_embeds
                )
            teacher_preds = reference_pred[teacher_rows]
            if len(full):
                with active_adapters(run.unet, STAGE1_ADAPTER):
                    teacher_preds = run.inputs.family.predict(
                        run.unet, batch.noisy_latents[teacher_rows], batch.timesteps[teacher_rows], teacher_embeds
                    )
        features = store.pop().rows(0, len(batch.kinds)) if store is not None else None
    teacher_preds = [reference_pred.index_copy(0, full, preds) for preds in teacher_preds.chunk(len(asked))]
    # Without a weight, what the teacher makes of the base prompt is nothing that counts.
    full_pred, base_pred = teacher_preds if len(asked) == 2 else (*teacher_preds, reference_pred)
    return reference_pred, full_pred, base_pred, features


def alignment_sfcm(
    run: Run,
    batch: Batch,
    response_pred: torch.Tensor,
    reference_pred: torch.Tensor,
    reference: CrossAttentionFeatures | None,
) -> torch.Tensor:
    """The SFCM (B, 1, H, W) of a batch, from the bank or this step's predictions; zero where nothing may change."""
    if has_sfcm_bank(run.args):
        sfcm = torch.stack([run.alignment.sfcm[i] for i in batch.index.tolist()])
    else:
        features = reference.at_resolution(phrase_map_resolution(reference.resolutions))
        difference = noise_difference(response_pred, reference_pred, to_epsilon(run, batch.timesteps))
        probs, resolutions = list(features.attention_probs.values()), list(features.resolutions.values())
        sfcm = make_sfcm(run, batch.pairs, difference, probs, resolutions)
    return sfcm * send(batch.kinds == FULL, run.device)[:, None, None, None]


def enhancement_loss(run: Run, batch: Batch, model_pred: torch.Tensor) -> torch.Tensor:
    """`L_enh` of the one-step prediction, weighed by alpha_bar_t [ours]: at high t the prediction is noise."""
    scheduler = run.noise_scheduler
    latents = noise_process(scheduler).original_sample(batch.noisy_latents, model_pred, batch.timesteps)
    if batch.pixels is None:
        image_embeds = run.training.image_embeds[send(batch.index, run.device)]
    else:
        with torch.no_grad():
            image_embeds = embed_pixels(run.clip, run.clip_processor, batch.pixels)
    losses = ENHANCEMENT_LOSSES[run.args.enhancement_loss](
        embed_pixels(run.clip, run.clip_processor, decode_for_clip(run, latents)),
        image_embeds,
        run.target_embeds[batch.pairs],
    )
    if run.args.enhancement_weighting == "alpha_bar":
        losses = scheduler.alphas_cumprod.to(run.device)[batch.timesteps] * losses
    return losses.mean()


def decode_for_clip(run: Run, latents: torch.Tensor) -> torch.Tensor:
    """Pixels (B, 3, H', W') of latents, with gradient, decoded no larger than CLIP looks at them [ours]."""
    decoder = run.decoder
    side = max(1, run.clip.config.vision_config.image_size // run.pipeline.vae_scale_factor)
    if min(latents.shape[-2:]) > side:
        latents = F.interpolate(latents, (side, side), mode="bilinear", antialias=True, align_corners=False)
    return decoder.decode(latents.to(decoder.dtype) / decoder.config.scaling_factor, return_dict=False)[0]


@torch.no_grad()
def embed_training_portraits(run: Run) -> torch.Tensor:
    """CLIP image embeddings (M, E') of each of `training_samples`."""
    samples, embeds = training_samples(run), []
    with phase_bar("image embeddings", len(samples), "portrait", run.accelerator.is_local_main_process) as bar:
        for pixels in read_pixels(run, samples, run.training_set.pixels):
            embeds.append(embed_pixels(run.clip, run.clip_processor, pixels[None].to(run.device)))
            bar.update()
    return torch.cat(embeds)


def step_terms(
    run: Run, stage: int, global_step: int
) -> list[Callable[[Run, int], AbstractContextManager[dict[str, torch.Tensor]]]]:
    """The forwards of a step.

    The diffusion term comes last: under DDP only the last backward is reduced, and the alignment terms leave some LoRA
    weights without a gradient.
    """
    args = run.args
    if stage == 1:
        return [partial(diffusion_terms, enhance=False)]
    terms = [composed_terms] if args.stage2_objective != "paper" else []
    if args.stage2_objective != "composed":
        enhance = uses_enhancement(args) and (global_step - args.stage1_steps) % args.enhancement_every == 0
        terms = [alignment_terms, *terms, partial(diffusion_terms, enhance=enhance)]
    return terms


@contextmanager
def lora_dropout(run: Run) -> Iterator[None]:
    """Inside, the dropout of the LoRA in training is on; the frozen one and the original model have none."""
    dropouts = [layer.lora_dropout["default"] for layer in run.unet.modules() if isinstance(layer, BaseTunerLayer)]
    try:
        for dropout in dropouts:
            dropout.train()
        yield
    finally:
        for dropout in dropouts:
            dropout.eval()


def check_finite(values: dict[str, float], global_step: int) -> None:
    """Stop before the update at the first loss, or norm of the gradient, that is not finite."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise FloatingPointError(
                f"{name!r} is {value} at step {global_step}, before its update. A lower --learning_rate or "
                "--mixed_precision bf16 instead of fp16 usually helps"
            )


def train_step(
    run: Run, stage: int, global_step: int, optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter]
) -> dict[str, float]:
    """One update of the LoRA; returns its losses by name, averaged over the batches of the step."""
    accelerator, accumulation = run.accelerator, run.args.gradient_accumulation_steps
    weights, terms, means = loss_weights(run.args), step_terms(run, stage, global_step), {}
    # What is dropped is a function of the step, as all that is random is.
    torch.manual_seed(
        (run.args.seed * 1_000_003 + global_step) * accelerator.num_processes + accelerator.process_index
    )
    with lora_dropout(run):
        for k in range(accumulation):
            for i, term in enumerate(terms):
                reduces = k == accumulation - 1 and i == len(terms) - 1
                with nullcontext() if reduces else accelerator.no_sync(run.response_unet):
                    with term(run, global_step * accumulation + k) as parts:
                        loss = sum(weights[name] * value for name, value in parts.items())
                        accelerator.backward(loss / accumulation)
                for name, value in parts.items():
                    means[name] = means.get(name, 0.0) + value.detach() / accumulation
    # Of this stage's optimizer alone: accelerate's own clipping divides the gradients by a scaler's scale once for
    # each optimizer that was ever prepared.
    accelerator.unscale_gradients(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(parameters, run.args.max_grad_norm)
    # Read together: each reading waits until a GPU has done all that it was given.
    names = (*means, "gradient")
    values = accelerator.reduce(torch.stack([value.float() for value in (*means.values(), norm)]), "mean").tolist()
    values = dict(zip(names, values, strict=True))
    norm = values.pop("gradient")
    # A scaler leaves out an update whose gradient is not finite by itself, and tries again with a lower scale.
    if accelerator.scaler is None or math.isfinite(norm):
        check_finite(values | {"gradient": norm}, global_step)
    optimizer.step()
    count_skipped(run, optimizer.step_was_skipped, values, global_step)
    optimizer.zero_grad(set_to_none=True)
    return values


def count_skipped(run: Run, skipped: bool, losses: dict[str, float], global_step: int) -> None:
    """Count the updates that the gradient scaler left out; too many in a row are no matter of its scale."""
    if not skipped:
        run.skipped_in_a_row = 0
        return
    run.skipped_updates += 1
    run.skipped_in_a_row += 1
    if run.skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
        raise FloatingPointError(
            f"the gradient was not finite in {MAX_SKIPPED_IN_A_ROW} steps in a row, up to step {global_step}, and the "
            f"losses are {', '.join(f'{name} {value:.3g}' for name, value in losses.items())}. A lower "
            "--learning_rate or --mixed_precision bf16 instead of fp16 usually helps"
        )


# ------------------------------------------------------------------------------------------------- pictures and files


def draw_validation(run: Run) -> None:
    """Write one picture: rows are seeds; columns are the original model and the adapted one with the base prompt, the
    adapted one with the full prompt, and the SFCM over it."""
    args, accelerator = run.args, run.accelerator
    if args.num_validation_images == 0 or not accelerator.is_main_process:
        return
    pair = run.inputs.validation_pair
    height, width = run.inputs.sizes[run.inputs.buckets[0]]
    shared = {
        "prompt": pair.base_prompt,
        "num_inference_steps": args.validation_inference_steps,
        "guidance_scale": args.validation_guidance_scale,
        "height": height,
        "width": width,
    }
    rows = []
    # accelerate's UNet answers in float32; autocast brings that to the dtype of the other models.
    with (
        phase_bar("validation pictures", args.num_validation_images, "row") as bar,
        resident(run),
        active_adapters(run.unet, "default"),
        accelerator.autocast(),
    ):
        for seed in range(args.num_validation_images):
            base = run.pipeline(**shared, compare=True, generator=torch.Generator().manual_seed(args.seed + seed))
            full = run.pipeline(
                **shared,
                target_prompt=list(pair.target_argument),
                base_phrases=list(pair.base_phrases),
                free_phrases=list(pair.free_phrases) or None,
                return_sfcm=True,
                generator=torch.Generator().manual_seed(args.seed + seed),
            )
            overlay = overlay_heat_map(full.images[0], full.sfcm[0, 0])
            rows.append([base.reference_images[0], base.images[0], full.images[0], overlay])
            bar.update()
    headers = ("original, base prompt", "adapted, base prompt", f"adapted, {pair.target_text}", "SFCM")
    grid = picture_grid(rows, headers)
    path = Path(args.output_dir) / validation_picture(run.global_step)
    path.parent.mkdir(parents=True, exist_ok=True)
    grid.save(path)
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({"validation": np.asarray(grid)[None]}, step=run.global_step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({"validation": [grid]}, step=run.global_step)


def validation_picture(global_step: int) -> str:
    """Where the picture of a step is, in --output_dir."""
    return f"validation/step_{global_step:06d}.png"


@torch.no_grad()
def decode_portrait(run: Run, latents: torch.Tensor) -> Image.Image:
    """The portrait of latents (C, H, W)."""
    vae, processor = run.pipeline.vae, run.pipeline.image_processor
    pixels = vae.decode(latents[None].to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
    return processor.postprocess(pixels.float(), output_type="pil")[0]


def draw_alignment(run: Run) -> None:
    """Write the first alignment portraits and the SFCM over each, so that one sees what stage 2 will protect."""
    args, accelerator, alignment, rows = run.args, run.accelerator, run.alignment, []
    if args.num_validation_images == 0 or alignment.sfcm is None or not accelerator.is_main_process:
        return
    # A grid has pictures of one size: those of the first portrait's.
    chosen = [i for i, bucket in enumerate(alignment.buckets) if bucket == alignment.buckets[0]]
    with resident(run):
        for i in chosen[: args.num_validation_images]:
            portrait = decode_portrait(run, alignment.latents[i])
            rows.append([portrait, overlay_heat_map(portrait, alignment.sfcm[i][0].cpu())])
    path = Path(args.output_dir) / "validation" / "alignment.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    picture_grid(rows, ("alignment portrait", "SFCM")).save(path)


def save_alignment(run: Run) -> None:
    """Write each alignment portrait, and its map as --sfcm_dir reads it, if it has one."""
    if not run.accelerator.is_main_process:
        return
    folder = Path(run.args.output_dir) / "alignment"
    folder.mkdir(parents=True, exist_ok=True)
    with resident(run):
        for i, latents in enumerate(run.alignment.latents):
            portrait = decode_portrait(run, latents)
            portrait.save(folder / f"{i:05d}.png")
            if run.alignment.sfcm is not None:
                grey = (run.alignment.sfcm[i][0].cpu() * 255).round().byte().numpy()
                sfcm = Image.fromarray(grey).resize(portrait.size, Image.Resampling.BILINEAR)
                (folder / "sfcm").mkdir(exist_ok=True)
                sfcm.save(folder / "sfcm" / f"{i:05d}.png")


def save_lora(run: Run, folder: Path) -> None:
    """Write the LoRA in diffusers' format with its metadata, whole or not at all."""
    if not run.accelerator.is_main_process:
        return
    folder.mkdir(parents=True, exist_ok=True)
    # peft's names, for all layers: a loader tells the naming by the first one.
    state = get_peft_model_state_dict(run.unet, adapter_name="default")
    metadata = adapter_metadata(run.unet.peft_config["default"])
    with tempfile.TemporaryDirectory(dir=folder, prefix=f"{HIDDEN_PREFIX}lora-") as temporary:
        SPFPortraitPipeline.save_lora_weights(
            temporary,
            unet_lora_layers=state,
            safe_serialization=True,
            unet_lora_adapter_metadata=metadata,
        )
        sort_header(Path(temporary) / LORA_WEIGHTS)
        for file in Path(temporary).iterdir():
            os.replace(file, folder / file.name)


def save_result(run: Run, folder: Path) -> None:
    """Write the LoRA of a stage that is over.

    Raises:
        CheckpointError: it could not be written; one line that says what is safe.
    """
    try:
        save_lora(run, folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder / LORA_WEIGHTS} could not be written: {' '.join(str(error).split())}; "
            f"{what_is_safe(Path(run.args.output_dir))}"
        ) from error


def write_checkpoint(run: Run) -> None:
    """Write all that the run needs to go on exactly: batches, noise and timesteps are functions of seed and step."""
    if not run.accelerator.is_main_process or run.saved_step == run.global_step:
        return
    args, scaler = run.args, run.accelerator.scaler
    state = {
        "record": resume_record(
            args, run.inputs.references, run.training_set.batch_size, run.accelerator.mixed_precision
        ),
        "data": run.inputs.data_fingerprint,
        "stage": run.stage,
        "global_step": run.global_step,
        "optimizer": run.optimizer.state_dict(),
        "lr_scheduler": run.lr_scheduler.state_dict(),
        "scaler": None if scaler is None else scaler.state_dict(),
        "alignment": None if run.alignment is None else vars(run.alignment),
        "teacher": get_peft_model_state_dict(run.unet, adapter_name=STAGE1_ADAPTER) if has_teacher(run) else None,
    }
    save_checkpoint(
        Path(args.output_dir), run.global_step, state, partial(save_lora, run), args.checkpoints_total_limit
    )
    run.saved_step = run.global_step


def has_teacher(run: Run) -> bool:
    """Whether the LoRA of stage 1 is there as a second adapter."""
    return STAGE1_ADAPTER in run.unet.peft_config


# -------------------------------------------------------------------------------------------------------- stage 2


def start_stage2(run: Run) -> None:
    """Save stage 1's LoRA, prepare the alignment portraits and their maps, and keep stage 1 as the teacher."""
    args = run.args
    if args.stage1_steps > 0:
        save_result(run, Path(args.output_dir) / "stage1")
    logger.info("Stage 2: preparing %s alignment portraits and their maps", args.alignment_source)
    with run.stop.at_once():
        run.alignment = prepare_alignment(run)
        draw_alignment(run)
        if args.save_alignment:
            save_alignment(run)
    if args.stage2_objective != "paper":
        add_teacher(run, get_peft_model_state_dict(run.unet, adapter_name="default"))
        if args.stage2_objective == "composed" and args.composed_init == "zero":
            bring_to_zero(run.unet)
    run.stage = 2


def resume_portraits(run: Run, state: dict[str, Any]) -> None:
    """The drawn portraits, their maps and the teacher as a checkpoint holds them."""
    if state["alignment"] is not None:
        alignment = {name: to_device(value, run.device) for name, value in state["alignment"].items()}
        run.alignment = Portraits(**alignment)
    if state["teacher"] is not None:
        add_teacher(run, state["teacher"])


def to_device(value: Any, device: torch.device) -> Any:
    """A tensor, or a list of tensors, on the device; anything else as it is."""
    if isinstance(value, list):
        return [to_device(item, device) for item in value]
    return value.to(device) if isinstance(value, torch.Tensor) else value


def add_teacher(run: Run, state: dict[str, torch.Tensor]) -> None:
    """Add stage 1's LoRA as a second, frozen adapter beside the one in training."""
    unet = run.unet
    with without_warning("Already found a `peft_config` attribute"):  # a second adapter is what is meant
        unet.add_adapter(unet.peft_config["default"], STAGE1_ADAPTER)
    keep_in_float32(unet, STAGE1_ADAPTER)
    set_peft_model_state_dict(unet, state, adapter_name=STAGE1_ADAPTER)
    unet.set_adapter("default")
    unet.eval()  # the new adapter's dropout is on when it is made
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(".lora_" in name and f".{STAGE1_ADAPTER}." not in name)


@torch.no_grad()
def bring_to_zero(unet: UNet2DConditionModel) -> None:
    """Make the LoRA in training the original model again.

    Started from there it has nothing to unlearn: it is the original model until it is shown more.
    """
    for layer in unet.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.lora_B["default"].weight.zero_()
            if layer.use_dora.get("default", False):
                magnitude = layer.lora_magnitude_vector["default"].weight
                norms = layer.get_base_layer().weight.float().flatten(1).norm(dim=1)
                magnitude.copy_(norms.view_as(magnitude))  # that of a convolution has sides of 1 beside its outputs


# ------------------------------------------------------------------------------------------------------------- loop


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    """The processes, the precision and the trackers."""
    for engine in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() in ("true", "1"):
            raise InputError(
                f"accelerate is set to {engine}, which this script does not train with: a LoRA has little to be "
                "sharded; choose MULTI_GPU (DDP)"
            )
    output_dir = Path(args.output_dir)
    accelerator = Accelerator(
        gradient_accumulation_steps=1,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(project_dir=output_dir, logging_dir=output_dir / args.logging_dir),
    )
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != accelerator.num_processes:
        raise InputError(
            f"launched as {launched} processes, of which accelerate makes {accelerator.num_processes}; on a machine "
            "without a GPU set ACCELERATE_USE_CPU=true"
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise InputError("--mixed_precision fp16 needs a GPU; bf16 works on the CPU, too")
    return accelerator


def train(args: argparse.Namespace, inputs: Inputs) -> None:
    """Both stages, from checked inputs to the LoRA in --output_dir."""
    accelerator = make_accelerator(args)
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO)
    set_seed(args.seed)
    if args.allow_tf32:
        torch.set_float32_matmul_precision("high")
    if args.dry_run:
        text_part = load_text_part(inputs.family, args)
        print_dry_run(inputs, inputs.family.distances(text_part, inputs.pairs, inputs.tokens))
        return
    if inputs.resume is not None:
        batch_size = args.train_batch_size * accelerator.num_processes
        now = resume_record(args, inputs.references, batch_size, accelerator.mixed_precision)
        check_record(inputs.resume.folder, inputs.resume.state["record"], now)

    with keep_folder(args, accelerator), logging_redirect_tqdm():
        train_in_folder(args, inputs, accelerator)


def keep_folder(args: argparse.Namespace, accelerator: Accelerator) -> AbstractContextManager[None]:
    """Inside, no other run writes into --output_dir."""
    return lock_folder(Path(args.output_dir)) if accelerator.is_main_process else nullcontext()


def train_in_folder(args: argparse.Namespace, inputs: Inputs, accelerator: Accelerator) -> None:
    """Both stages, in a folder that is this run's alone."""
    repo_id = None
    if accelerator.is_main_process:
        check_nothing_came(args, inputs.resume)
    if args.push_to_hub and accelerator.is_main_process:
        repo_id = make_repository(args)
    logger.info("Loading %s", args.pretrained_model_name_or_path)
    run = prepare_run(args, inputs, accelerator)
    run.repo_id = repo_id
    run.response_unet = accelerator.prepare(run.unet)
    if accelerator.is_main_process:
        for folder in (Path(args.output_dir), Path(args.output_dir) / "stage1"):
            remove_leftovers(folder)
        accelerator.init_trackers("spf-portrait", config=tracker_config(args))
    logger.info(
        "%d portraits, %d processes, %d steps of stage 1, %d of stage 2",
        len(inputs.rows),
        accelerator.num_processes,
        args.stage1_steps,
        args.stage2_steps,
    )
    with catch_stop_signals() as run.stop:
        try:
            train_stages(run)
        except Interrupted as interruption:
            leave(run, interruption)
    finish(run)


def train_stages(run: Run) -> None:
    """Stage 1 and stage 2, or what is left of them."""
    args, resume = run.args, run.inputs.resume
    if resume is None:
        with run.stop.at_once():
            if args.preservation == "prior":
                run.alignment = draw_alignment_portraits(run)
            draw_validation(run)
    else:
        logger.info("Going on from %s", resume.folder)
        resume_portraits(run, resume.state)
    with tqdm(
        total=run.total_steps, initial=run.global_step, disable=not run.accelerator.is_local_main_process
    ) as progress:
        if run.global_step < args.stage1_steps:
            train_stage(run, range(args.stage1_steps), args.lr_scheduler, progress)
        if args.stage2_steps > 0:
            if run.stage == 1:
                start_stage2(run)
                progress.unpause()  # its clock counts steps alone
            train_stage(run, range(args.stage1_steps, run.total_steps), args.stage2_lr_scheduler, progress)


def train_stage(run: Run, steps: range, lr_scheduler_name: str, progress: tqdm) -> None:
    """The steps of one stage, or those that are left, with an optimizer and a learning rate of its own."""
    args, accelerator = run.args, run.accelerator
    parameters = [parameter for parameter in run.unet.parameters() if parameter.requires_grad]
    prepare_optimizer(run, parameters, len(steps), lr_scheduler_name)
    start_reading(run, steps.stop)
    progress.set_description(f"stage {run.stage}")
    for global_step in range(run.global_step, steps.stop):
        done = global_step - steps.start
        if run.stage == 2 and args.sfcm_refresh_steps and done and done % args.sfcm_refresh_steps == 0:
            run.alignment.sfcm = fill_sfcm_bank(run, run.alignment)
            run.targets = {}
            progress.unpause()
        losses = train_step(run, run.stage, global_step, run.optimizer, parameters)
        if not run.optimizer.step_was_skipped:
            run.lr_scheduler.step()
        run.global_step += 1
        progress.set_postfix({name: f"{value:.3g}" for name, value in losses.items()}, refresh=False)
        progress.update()
        accelerator.log({f"loss/{name}": value for name, value in losses.items()}, step=run.global_step)
        if args.checkpointing_steps and run.global_step % args.checkpointing_steps == 0:
            write_checkpoint(run)
        stop_if_asked(run)
        last = run.global_step == run.total_steps
        if args.validation_steps and run.global_step % args.validation_steps == 0 and not last:
            with run.stop.at_once():
                draw_validation(run)
            progress.unpause()


def start_reading(run: Run, stop: int) -> None:
    """Have the pictures of the batches up to a step read ahead, where latents are not cached."""
    if not run.args.cache_latents:
        accumulation = run.args.gradient_accumulation_steps
        micro_steps = range(run.global_step * accumulation, stop * accumulation)
        run.pixels = iter(read_pixels(run, micro_steps, run.training_set.batch_pixels))


def prepare_optimizer(run: Run, parameters: list[torch.nn.Parameter], num_steps: int, lr_scheduler_name: str) -> None:
    """An optimizer and a schedule for a stage of so many steps, as the checkpoint has them if the run goes on."""
    args, accelerator, resume = run.args, run.accelerator, run.inputs.resume
    learning_rate = args.learning_rate
    if args.scale_lr:
        learning_rate *= args.gradient_accumulation_steps * run.training_set.batch_size
    optimizer = make_optimizer(
        args.optimizer,
        parameters,
        learning_rate=learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        epsilon=args.adam_epsilon,
        use_8bit_adam=args.use_8bit_adam,
    )
    run.lr_scheduler = get_scheduler(
        lr_scheduler_name,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=num_steps,
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )
    if args.optimizer == "prodigy" and learning_rate <= 0.1:
        logger.warning("--learning_rate %g is a factor on the rate that prodigy finds; 1.0 is usual", learning_rate)
    run.optimizer = accelerator.prepare(optimizer)
    if resume is not None and resume.state["stage"] == run.stage and resume.state["global_step"] == run.global_step:
        run.optimizer.load_state_dict(resume.state["optimizer"])
        run.lr_scheduler.load_state_dict(resume.state["lr_scheduler"])
    # The scaler is one for both stages.
    if resume is not None and resume.state["global_step"] == run.global_step and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(resume.state["scaler"])


def stop_if_asked(run: Run) -> None:
    """Stop all processes after the same step, whichever of them was sent a signal."""
    asked = run.stop.signal_number
    if run.accelerator.num_processes > 1:
        asked = int(run.accelerator.gather(torch.tensor([asked], device=run.device)).max())
    if asked:
        raise Interrupted(asked)


def leave(run: Run, interruption: Interrupted) -> None:
    """Write a checkpoint, say how to go on, and end the program as its signal would have."""
    if run.global_step > 0:
        write_checkpoint(run)
        # Nothing lies in the output folder yet if the run came from another one and has done no step since.
        checkpoint = "latest" if find_checkpoints(Path(run.args.output_dir)) else run.inputs.resume.folder
        advice = f"go on with the same flags and --resume_from_checkpoint {checkpoint} ({run.args.output_dir})"
    else:
        advice = "before the first one there is nothing to keep: start again"
    if run.accelerator.is_main_process:
        logger.warning("%s after step %d of %d: %s", interruption, run.global_step, run.total_steps, advice)
    run.accelerator.end_training()
    sys.exit(128 + interruption.signal_number)


def finish(run: Run) -> None:
    """The LoRA, the last picture, the model card, and what else was asked for."""
    accelerator, output_dir = run.accelerator, Path(run.args.output_dir)
    save_result(run, output_dir)
    try:
        draw_validation(run)
    except OSError as error:
        raise CheckpointError(
            f"the last picture could not be written: {error}; {output_dir / LORA_WEIGHTS} is whole"
        ) from error
    # The distributed wrapper goes before the group of processes it talks to, and no process before the others.
    accelerator.wait_for_everyone()
    run.response_unet = run.unet
    accelerator.free_memory()
    accelerator.end_training()
    if run.skipped_updates:
        logger.warning("The gradient scaler left out %d updates that were not finite", run.skipped_updates)
    if accelerator.is_main_process:
        pictures = [validation_picture(run.global_step)] if run.args.num_validation_images else []
        share(
            run.args,
            run.inputs.pairs[: len(run.inputs.rows)],
            run.inputs.validation_pair,
            pictures,
            run.repo_id,
            run.unet.peft_config["default"].use_dora,
            run.inputs.references,
        )
    say_what_is_there(run)


def say_what_is_there(run: Run) -> None:
    """The last lines: what lies where, and how to draw with it."""
    args, folder, pair = run.args, Path(run.args.output_dir), run.inputs.validation_pair
    targets = list(pair.target_argument)
    logger.info("The LoRA: %s", folder / LORA_WEIGHTS)
    if args.num_validation_images:
        logger.info("Pictures: %s, the last one of them", folder / validation_picture(run.global_step))
    if args.report_to != "none":
        logger.info("Losses: %s", folder / args.logging_dir)
    logger.info("Model card: %s", folder / CARD)
    if run.inputs.references:
        logger.info("How to draw with it and the earlier LoRAs is in the model card")
        return
    logger.info(
        "Draw: pipe = DiffusionPipeline.from_pretrained(%r, custom_pipeline=%r, trust_remote_code=True); "
        "pipe.load_lora_weights(%r); pipe(%r, target_prompt=%r, compare=True)",
        args.pretrained_model_name_or_path,
        str(Path(__file__).with_name("pipeline_spf_portrait.py")),
        args.output_dir,
        pair.base_prompt,
        targets[0] if len(targets) == 1 else targets,
    )


def tracker_config(args: argparse.Namespace) -> dict[str, bool | int | float | str]:
    """The flags as values a tracker can show, without the token."""
    return {
        name: value if isinstance(value, bool | int | float | str) else str(value)
        for name, value in vars(args).items()
        if value is not None and name != "hub_token"
    }


def main(input_args: Sequence[str] | None = None) -> None:
    """The program, from its command line."""
    run_program(parse_args(input_args))


def run_program(args: argparse.Namespace) -> None:
    """Check everything first, so that a mistake in the input ends at once with one line."""
    try:
        inputs = check_inputs(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"train_spf_portrait_lora.py: error: {error}") from error
    try:
        train(args, inputs)
    except (InputError, CheckpointError) as error:
        raise SystemExit(f"train_spf_portrait_lora.py: error: {error}") from error
    except FloatingPointError as error:
        safe = what_is_safe(Path(args.output_dir))
        raise SystemExit(f"train_spf_portrait_lora.py: error: {error}; {safe}") from error
    except OSError as error:  # of a picture, a cache or a log, on a disk that is full or gone
        safe = what_is_safe(Path(args.output_dir))
        raise SystemExit(f"train_spf_portrait_lora.py: error: {' '.join(str(error).split())}; {safe}") from error


if __name__ == "__main__":
    run_program(ARGS)
