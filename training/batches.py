"""The batch of a step: a pure function of seed, step and stream, cut into the processes' shares. [ours]

Legend: B batch, C channels, H/W latent size, H'/W' size in pixels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from families.noise_process import NoiseProcess
from training.portraits import Portraits, Taken, TrainingPortraits
from training.prompt_table import BASE, EMPTY, FULL
from training.training_set import bucketed_batch_indices, derive_seed


@dataclass(frozen=True)
class Batch:
    """One step's rows on this process.

    Index, kinds, rows and `cpu_timesteps` lie on the CPU, where reading them waits for no GPU; all else lies on the
    device.
    """

    index: Tensor  # (B,) the portraits, as places in their latents
    kinds: Tensor  # (B,) FULL, BASE or EMPTY
    pairs: Tensor  # (B,) their pairs of prompts
    rows: Tensor  # (B,) their rows of the prompt table
    latents: Tensor  # (B, C, H, W) float32, as the next two
    noise: Tensor
    noisy_latents: Tensor
    timesteps: Tensor  # (B,)
    cpu_timesteps: Tensor  # (B,), the same
    time_ids: Tensor  # (B, 6) float32, size and crop
    pixels: Tensor | None = None  # (B, 3, H', W') in [-1, 1], where the batch was encoded in this step


@dataclass(frozen=True)
class BatchDrawer:
    """Draws this process's batches."""

    seed: int
    batch_size: int  # of this process
    process_index: int
    num_processes: int
    pairs: int  # how many pairs of prompts the prompt table has
    noise: NoiseProcess
    device: torch.device

    @property
    def size(self) -> int:
        """Rows of a batch over all processes."""
        return self.batch_size * self.num_processes

    @property
    def own(self) -> slice:
        """This process's part of a batch."""
        return slice(self.process_index * self.batch_size, (self.process_index + 1) * self.batch_size)

    def generator(self, micro_step: int, stream: int) -> torch.Generator:
        """What is random in a batch; `stream` keeps apart what one step draws several times."""
        return torch.Generator().manual_seed((self.seed * 1_000_003 + micro_step) * 4 + stream)

    def training(self, portraits: TrainingPortraits, micro_step: int, noise_offset: float = 0.0) -> Batch:
        """A batch of training portraits, all asked for their target.

        `noise_offset` is the standard deviation of an offset that all noise of one channel shares.
        """
        return self._noised(portraits.pair_index, portraits.take(micro_step), micro_step, noise_offset=noise_offset)

    def aligned(
        self, portraits: Portraits, micro_step: int, stream: int, unchanged_share: float = 0.0,
        timestep_power: float = 0.0, bucket: int | None = None,
    ) -> Batch:  # fmt: skip
        """A batch of alignment portraits, all of one size.

        Args:
            unchanged_share: share of BASE and EMPTY rows, in [0, 1).
            timestep_power: timesteps are drawn with density (noise/signal)^power; 0 is uniform.
            bucket: take portraits of this size alone.
        """
        members = [i for i, other in enumerate(portraits.buckets) if bucket in (None, other)]
        buckets, seed = [portraits.buckets[i] for i in members], derive_seed(self.seed, f"stream {stream}")
        index = [members[i] for i in bucketed_batch_indices(micro_step, self.size, buckets, seed)[self.own]]
        latents, index = torch.stack([portraits.latents[i] for i in index]), torch.tensor(index)
        taken = Taken(index, latents, portraits.time_ids[send(index, self.device)])
        return self._noised(portraits.pair_index, taken, micro_step, stream, unchanged_share, timestep_power)

    def _noised(
        self, pair_index: Tensor, taken: Taken, micro_step: int, stream: int = 0, unchanged_share: float = 0.0,
        timestep_power: float = 0.0, noise_offset: float = 0.0,
    ) -> Batch:  # fmt: skip
        """Noise, timesteps and kinds for portraits."""
        index, latents, time_ids, pixels = taken
        size, own, generator = self.size, self.own, self.generator(micro_step, stream)
        # Stratified, so that a batch has its share of each kind however small the share is.
        place = (torch.randperm(size, generator=generator) + torch.rand(size, generator=generator)) / size
        kinds = torch.where(place < unchanged_share / 3, EMPTY, torch.where(place < unchanged_share, BASE, FULL))[own]
        noise = torch.randn(size, *latents.shape[1:], generator=generator)
        timesteps = self.noise.draw_timesteps(size, timestep_power, generator)[own]
        if noise_offset:
            noise = noise + noise_offset * torch.randn(size, latents.shape[1], 1, 1, generator=generator)
        cpu_timesteps, timesteps, noise = timesteps, send(timesteps, self.device), send(noise[own], self.device)
        pairs = pair_index[index % len(pair_index)]
        rows, pairs = kinds * self.pairs + pairs, send(pairs, self.device)
        noisy_latents = self.noise.add_noise(latents, noise, timesteps)
        time_ids = send(time_ids, self.device)
        return Batch(
            index, kinds, pairs, rows, latents, noise, noisy_latents, timesteps, cpu_timesteps, time_ids, pixels
        )


def send(values: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on the device, without waiting for what a GPU still has to do."""
    return values.to(device, non_blocking=device.type == "cuda")
