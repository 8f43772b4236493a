"""The SFCM of a portrait: averaged once for a bank, or of one step's predictions.

Legend: B batch, C channels, H/W latent size, M alignment portraits.
Paper: arXiv 2504.00396; what names no source is [ours].
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from attention_processors import CrossAttentionFeatures, phrase_map_resolution
from families.noise_process import NoiseProcess
from programs.console import phase_bar
from region_guidance import noise_difference
from sfcm import SFCM_MODES, free_regions, phrase_attention_maps
from training.batches import Batch, send
from training.dual_path import dual_path
from training.flags import AlignmentFlags
from training.models import Models
from training.portraits import Portraits
from training.prompt_table import FULL, PromptTable
from training.training_set import derive_seed


class MapMaker:
    """Makes the SFCMs of portraits, or of a batch; with `has_bank` each portrait has one map, else one anew in each
    step.
    """

    def __init__(self, models: Models, table: PromptTable, flags: AlignmentFlags, seed: int) -> None:
        self._models, self._table, self._flags, self._seed = models, table, flags, seed
        self._mode = SFCM_MODES[flags.sfcm_mode]
        self.has_bank = self._mode.averaged or flags.sfcm_dir is not None

    @torch.no_grad()
    def fill_bank(self, portraits: Portraits, chunk_size: int, shown: bool) -> list[Tensor]:
        """The SFCMs of M portraits, (1, H, W) float32 in [0, 1], `chunk_size` of them made together.

        Noise differences are averaged over samples at high timesteps.
        """
        maps = {}
        with phase_bar("maps", len(portraits.buckets), "map", shown) as bar:
            for bucket in sorted(set(portraits.buckets)):
                members = [i for i, own in enumerate(portraits.buckets) if own == bucket]
                for start in range(0, len(members), chunk_size):
                    chunk = members[start : start + chunk_size]
                    maps |= zip(chunk, self._averaged(portraits, chunk), strict=True)
                    bar.update(len(chunk))
        return [maps[i] for i in range(len(portraits.buckets))]

    def _averaged(self, portraits: Portraits, members: Sequence[int]) -> Tensor:
        """The SFCMs (B, 1, H, W) of portraits of one size."""
        models, flags, places = self._models, self._flags, portraits.pair_index[list(members)]
        latents = torch.stack([portraits.latents[i] for i in members])
        low, high = flags.sfcm_timesteps or timesteps_at(latents.shape[-2:], models.noise)
        count = flags.sfcm_noise_samples
        asked = places, portraits.time_ids[list(members)]
        reference_embeds, response_embeds = self._table.reference(*asked), self._table.response(*asked)
        # Each portrait has its own generator, so that the size of a batch does not change its map.
        generators = [torch.Generator().manual_seed(derive_seed(self._seed, f"map {i}")) for i in members]
        difference, probs, resolutions = 0, [], []
        for sample in range(count):
            noise = torch.stack([torch.randn(latents.shape[1:], generator=own) for own in generators])
            # One timestep from each part of the range, so that few samples cover it.
            place = (sample + torch.cat([torch.rand(1, generator=own) for own in generators])) / count
            timesteps = models.noise.between(low, high, place).to(models.device)
            noisy_latents = models.noise.add_noise(latents, noise.to(models.device), timesteps)
            with (
                models.capture.store() as store,
                dual_path(
                    models.adapters, models.predict, noisy_latents, timesteps, reference_embeds, response_embeds,
                    store=store,
                ) as paths,
            ):  # fmt: skip
                features = phrase_map_layers(paths.reference)
            starts, scale = {"paths": paths.reference_pred}, models.noise.epsilon_scale(timesteps)
            if "words" in self._mode.differences:
                starts["words"] = models.predict(noisy_latents, timesteps, reference_embeds)
            each = [noise_difference(paths.response_pred, starts[own], scale) for own in self._mode.differences]
            difference = difference + torch.cat(each, 1)
            probs += features.attention_probs.values()
            resolutions += features.resolutions.values()
        return self._make(send(places, models.device), difference, probs, resolutions)

    def _make(
        self, rows: Tensor, difference: Tensor, attention_probs: Sequence[Tensor],
        resolutions: Sequence[tuple[int, int]],
    ) -> Tensor:  # fmt: skip
        """The SFCM (B, 1, H, W) of pairs `rows` (B,) from noise differences (B, D, H, W) and reference attention.

        Free phrases are not protected, and their regions are open whatever the mode.
        """
        table, free = self._table, self._table.free_mask[rows]
        maps = phrase_attention_maps(attention_probs, resolutions, table.phrase_weights[rows], difference.shape[-2:])
        sfcm = self._mode.compute(difference, maps, table.distances[rows], table.phrase_mask[rows] & ~free)
        return free_regions(sfcm, maps, free)

    def of_batch(
        self, batch: Batch, portraits: Portraits, response_pred: Tensor, reference_pred: Tensor,
        reference: CrossAttentionFeatures | None,
    ) -> Tensor:  # fmt: skip
        """The SFCM (B, 1, H, W) of a batch; zero where nothing may change.

        It is that of the portraits' bank; without one, made of both predictions (B, C, H, W) and of the original
        model's features.
        """
        if self.has_bank:
            sfcm = torch.stack([portraits.sfcm[i] for i in batch.index.tolist()])
        else:
            features, scale = phrase_map_layers(reference), self._models.noise.epsilon_scale(batch.timesteps)
            difference = noise_difference(response_pred, reference_pred, scale)
            probs, resolutions = list(features.attention_probs.values()), list(features.resolutions.values())
            sfcm = self._make(batch.pairs, difference, probs, resolutions)
        return sfcm * send(batch.kinds == FULL, sfcm.device)[:, None, None, None]


def timesteps_at(size: tuple[int, int], noise: NoiseProcess) -> tuple[int, int]:
    """The range of timesteps for latents of (H, W) where no flag gives one.

    With twice the side a region has four times the latents, and is seen through twice the noise: so above the size
    that the range was measured at, noise over signal grows with the side, as far as the schedule goes. (Toy
    portraits enlarged to twice the side: a target changes the VAE's latents by 1.7 to 2.2 times the norm. No map was
    compared.)
    Source: [ours].
    """
    factor = math.sqrt(math.prod(size)) / 64
    if factor <= 1:
        return noise.map_timesteps
    low, high = (noise.scaled(timestep, factor) for timestep in noise.map_timesteps)
    return low, high


def phrase_map_layers(features: CrossAttentionFeatures) -> CrossAttentionFeatures:
    """Of the layers that phrase maps are made of."""
    return features.at_resolution(phrase_map_resolution(features.resolutions))
