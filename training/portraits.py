"""The portraits that a run learns from and is aligned on: encoded, drawn, and taken by a step. [ours]

Legend: B batch, C channels, H/W latent size, N training portraits, M alignment portraits.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from torch.utils.data import DataLoader

from families.pipelines import denoiser_of
from programs.console import phase_bar
from programs.interruption import leave_stop_signals
from programs.loading import InputError
from programs.picture_files import upright_size
from training.arguments import Flags
from training.caches import TensorCache, fingerprint, module_fingerprint
from training.inputs import Inputs
from training.models import Models
from training.pixels import whole_picture
from training.prompt_table import PromptTable
from training.training_set import Sample, TrainingSet, derive_seed


@dataclass
class Portraits:
    """M portraits that both paths are aligned on, or whose predictions are kept."""

    latents: Sequence[torch.Tensor]  # (C, H, W) float32 on the device, scaled as the denoiser expects them
    pair_index: torch.Tensor  # (M,) which pair of prompts belongs to each, on the CPU
    time_ids: torch.Tensor  # (M, 6) float32, size and crop, on the device
    buckets: tuple[int, ...]  # which size each has
    sfcm: Sequence[torch.Tensor] | None = None  # (1, H, W) float32 in [0, 1], once the bank is filled


class Taken(NamedTuple):
    """A batch of portraits, before it is noised."""

    index: torch.Tensor  # (B,) places among their latents
    latents: torch.Tensor  # (B, C, H, W)
    time_ids: torch.Tensor  # (B, 6)
    pixels: torch.Tensor | None = None  # where they are read now


class TrainingPortraits:
    """The training portraits: encoded once, or read and encoded in each step.

    `latents` are of each of `samples`, (C, H, W) float32 on the device; None where each step encodes its own.
    """

    def __init__(self, flags: Flags, inputs: Inputs, models: Models, accelerator: Accelerator) -> None:
        count, size = len(inputs.rows), flags.loop.train_batch_size
        first = accelerator.process_index * size
        self.training_set = TrainingSet(
            rows=inputs.rows, keys=inputs.keys, sizes=inputs.sizes, buckets=inputs.buckets[:count],
            image_sizes=[upright_size(row.image, row.source) for row in inputs.rows],
            batch_size=size * accelerator.num_processes, share=slice(first, first + size),
            seed=flags.loop.seed, repeats=flags.data.repeats, random_flip=flags.pictures.random_flip,
            center_crop=flags.pictures.center_crop, interpolation=flags.pictures.image_interpolation_mode,
        )  # fmt: skip
        self.pair_index, self.latents = torch.arange(count), None
        self._models, self._workers, self._pixels = models, flags.data.dataloader_num_workers, None

    @property
    def samples(self) -> list[Sample]:
        """Every form in which a training portrait can come: as it is, then mirrored where that is asked for."""
        mirrored = (False, True) if self.training_set.random_flip else (False,)
        return [Sample(i, flip) for flip in mirrored for i in range(len(self.training_set.rows))]

    def read(self, numbers: Sequence[Sample] | range, read: Callable[[Sample | int], torch.Tensor]) -> DataLoader:
        """What `read` makes of each of them, in order, by --dataloader_num_workers processes."""
        return DataLoader(
            numbers, batch_size=None, collate_fn=read, num_workers=self._workers, worker_init_fn=leave_stop_signals
        )

    def encode(self, cache: TensorCache, shown: bool) -> None:
        """Encode each of `samples` once, or look it up."""
        own, samples = self.training_set, self.samples
        # Only a file outlives the model that made it.
        model = None if cache.folder is None else module_fingerprint(self._models.pipeline.vae)
        sizes = [own.sizes[own.buckets[sample.index]] for sample in samples]
        keys = [
            fingerprint("latents", model, own.keys[sample.index], size, sample.flip, own.interpolation)
            for sample, size in zip(samples, sizes, strict=True)
        ]

        def compute(missing: Sequence[int]) -> Iterator[torch.Tensor]:
            pictures = self.read([samples[i] for i in missing], own.pixels)
            with phase_bar("latents", len(missing), "portrait", shown) as bar:
                for pixels in pictures:
                    yield self._models.to_latents(pixels[None])[0]
                    bar.update()

        self.latents = [latents.to(self._models.device) for latents in cache.get_or_compute(keys, compute)]
        for sample, latents in zip(samples, self.latents, strict=True):
            if not latents.isfinite().all():
                raise FloatingPointError(
                    f"{own.rows[sample.index].source}: the VAE makes numbers of it that are not finite, as many do in "
                    "fp16: give --mixed_precision bf16, or another --pretrained_vae_model_name_or_path"
                )

    def start_reading(self, micro_steps: range) -> None:
        """Have the pictures of these batches read ahead, where latents are not cached."""
        if self.latents is None:
            self._pixels = iter(self.read(micro_steps, self.training_set.batch_pixels))

    def take(self, micro_step: int) -> Taken:
        """A batch."""
        samples = self.training_set.samples(micro_step)
        places = [sample.index + len(self.training_set.rows) * sample.flip for sample in samples]
        index, time_ids = torch.tensor(places), self.training_set.time_ids(samples)
        if self.latents is not None:
            return Taken(index, torch.stack([self.latents[i] for i in places]), time_ids)
        pixels = next(self._pixels).to(self._models.device)
        return Taken(index, self._models.to_latents(pixels), time_ids, pixels)

    def as_alignment(self) -> Portraits:
        """The training portraits to be aligned on: as they are, never mirrored, for each has one map."""
        own, samples = self.training_set, [*map(Sample, range(len(self.training_set.rows)))]
        latents = self.latents or [
            self._models.to_latents(pixels[None])[0] for pixels in self.read(samples, own.pixels)
        ]
        time_ids = own.time_ids(samples).to(self._models.device)
        return Portraits(latents[: len(samples)], self.pair_index, time_ids, own.buckets)


def draw_latents(
    pipeline: DiffusionPipeline, prompts: Sequence[str], *, seeds: Sequence[int], num_inference_steps: int,
    guidance_scale: float, height: int, width: int, batch_size: int,
    advance: Callable[[int], object] = lambda count: None,
    encoded: Callable[[slice], Mapping[str, torch.Tensor]] | None = None,
) -> torch.Tensor:  # fmt: skip
    """Draw one portrait per prompt, `batch_size` at once, by the adapters that are active, and keep its latents.

    Args:
        encoded: the pipeline's arguments in place of some of the prompts, where they are encoded already.
        seeds: of each portrait's noise, drawn on the CPU, so that neither the batch size nor the device changes it.
        height, width: in pixels.
        advance: told how many were drawn, each time some are.

    Returns: (len(prompts), C, H, W) float32 on the CPU, scaled as the denoiser takes them, without gradient.
    """
    scale, latents = pipeline.vae_scale_factor, []
    denoiser = denoiser_of(pipeline)
    shape = (denoiser.config.in_channels, height // scale, width // scale)
    for start in range(0, len(prompts), batch_size):
        rows = slice(start, start + batch_size)
        asked = {"prompt": list(prompts[rows])} if encoded is None else encoded(rows)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[rows]]
        # In half precision some versions of torch draw other and much coarser noise.
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        output = pipeline(
            **asked, height=height, width=width, num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale, latents=noise.to(denoiser.device, denoiser.dtype), generator=generators,
            output_type="latent",
        )  # fmt: skip
        latents.append(output.images.float().cpu())
        advance(len(generators))
    return torch.cat(latents)


def draw_portraits(
    flags: Flags, inputs: Inputs, models: Models, table: PromptTable, accelerator: Accelerator
) -> Portraits:
    """Portraits of the original model from base prompts, shared between the processes, each from a seed of its own.

    The prompts' embeddings are the table's where text encoders are too large to come and go for each batch.
    """
    first, processes = len(inputs.rows), accelerator.num_processes
    pairs, buckets, own_flags = inputs.pairs[first:], inputs.buckets[first:], flags.alignment
    # The places of those of one size, and how many of them a process draws: each as many, the last ones perhaps some
    # too many, which are cut off again.
    groups = [list(group) for _, group in groupby(range(len(pairs)), buckets.__getitem__)]
    shares, latents = [-(-len(group) // processes) for group in groups], []
    with (
        phase_bar("alignment portraits", sum(shares), "portrait", accelerator.is_local_main_process) as bar,
        models.adapters.only(None),
        models.drawing(),
    ):
        for group, share in zip(groups, shares, strict=True):
            start = accelerator.process_index * share
            own = [group[min(i, len(group) - 1)] for i in range(start, start + share)]
            height, width = inputs.sizes[buckets[group[0]]]
            rows = torch.tensor(own) + first
            drawn = draw_latents(
                models.pipeline, [pairs[i].base_prompt for i in own],
                seeds=[derive_seed(flags.loop.seed, f"alignment portrait {i}") for i in own],
                num_inference_steps=own_flags.alignment_inference_steps,
                guidance_scale=own_flags.alignment_guidance_scale, height=height, width=width,
                batch_size=2 * flags.loop.train_batch_size, advance=bar.update,
                encoded=partial(table.drawn, rows) if models.family.large_embeds else None,
            )  # fmt: skip
            latents += accelerator.gather(drawn.to(models.device))[: len(group)]
    time_ids = torch.tensor([whole_picture(inputs.sizes[bucket]) for bucket in buckets], device=models.device)
    return Portraits(latents, torch.arange(first, len(inputs.pairs)), time_ids, buckets)


def portraits_of(state: Mapping[str, Any], device: torch.device) -> Portraits | None:
    """The alignment portraits and their maps as a checkpoint holds them, if it has some."""
    if state["alignment"] is None:
        return None
    own = dict(state["alignment"])
    if "time_ids" not in own:
        raise InputError("--resume_from_checkpoint: an earlier version wrote it, which this one cannot go on from")
    for name in ("latents", "sfcm"):
        if own[name] is not None:
            own[name] = [tensor.to(device) for tensor in own[name]]
    places = {"pair_index": own["pair_index"].cpu(), "time_ids": own["time_ids"].to(device)}
    return Portraits(**own | places)
