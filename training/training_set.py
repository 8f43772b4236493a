"""The training portraits in batches, by functions of a step alone: a resumed run goes on exactly where it stopped.

Legend: N training portraits, R portraits of one process, H/W size in pixels.
Source: [ours].
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from programs.picture_files import load_picture
from training.data import PortraitRow, load_mask
from training.pixels import micro_conditioning, preprocess_image, preprocess_mask


@dataclass(frozen=True)
class Sample:
    """One training portrait as a step takes it: which, mirrored or not, and where the crop lies in it."""

    index: int
    flip: bool = False
    centering: tuple[float, float] = (0.5, 0.5)


@dataclass(frozen=True)
class TrainingSet:
    """The training portraits in batches; what a batch holds is a pure function of its number.

    Attributes:
        keys: of the rows' pictures' content.
        image_sizes: (width, height) of the rows' pictures.
        sizes, buckets: (H, W) of each bucket, and which of them each portrait belongs to.
        batch_size, share: portraits a batch over all processes, and this process's part of it.
    """

    rows: Sequence[PortraitRow]
    keys: Sequence[str]
    image_sizes: Sequence[tuple[int, int]]
    sizes: Sequence[tuple[int, int]]
    buckets: tuple[int, ...]
    batch_size: int
    share: slice
    seed: int
    repeats: int
    random_flip: bool
    center_crop: bool
    interpolation: str

    def samples(self, micro_step: int) -> list[Sample]:
        """This process's R portraits of batch `micro_step`, all of one size."""
        count = len(self.rows)
        index = bucketed_batch_indices(micro_step, self.batch_size, self.buckets * self.repeats, self.seed)
        random = np.random.default_rng((self.seed, micro_step))
        flips = random.random(self.batch_size) < 0.5 if self.random_flip else [False] * self.batch_size
        centres = [(0.5, 0.5)] * self.batch_size if self.center_crop else random.random((self.batch_size, 2))
        drawn = list(zip(index, flips, centres))[self.share]
        return [Sample(i % count, bool(flip), (float(x), float(y))) for i, flip, (x, y) in drawn]

    def pixels(self, sample: Sample) -> torch.Tensor:
        """(3, H, W) in [-1, 1]."""
        row, size = self.rows[sample.index], self.sizes[self.buckets[sample.index]]
        place = {"flip": sample.flip, "centering": sample.centering}
        return preprocess_image(load_picture(row.image, row.source), size, interpolation=self.interpolation, **place)

    def time_ids(self, samples: Sequence[Sample]) -> torch.Tensor:
        """(R, 6) float32: size and crop of these portraits, as `pixels.micro_conditioning` has them."""
        own = [
            micro_conditioning(
                self.image_sizes[one.index], self.sizes[self.buckets[one.index]], flip=one.flip,
                centering=one.centering,
            )
            for one in samples
        ]  # fmt: skip
        return torch.tensor(own)

    def mask(self, sample: Sample) -> torch.Tensor:
        """(1, H, W) in [0, 1]: where the target is in these pixels."""
        mask, size = load_mask(self.rows[sample.index]), self.sizes[self.buckets[sample.index]]
        return preprocess_mask(mask, size, flip=sample.flip, centering=sample.centering)

    def batch_masks(self, micro_step: int) -> torch.Tensor:
        """(R, 1, H, W): the masks of batch `micro_step`."""
        return torch.stack([self.mask(sample) for sample in self.samples(micro_step)])

    def batch_pixels(self, micro_step: int) -> torch.Tensor:
        """(R, 3, H, W): the pixels of batch `micro_step`."""
        return torch.stack([self.pixels(sample) for sample in self.samples(micro_step)])


def batch_indices(step: int, batch_size: int, count: int, seed: int) -> list[int]:
    """The `batch_size` samples of one training step, over all processes and accumulated batches, of a set of `count`.

    Each epoch has an order of its own; a batch at its end runs on into the next, so every sample comes exactly once an
    epoch.
    """
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [_epoch_order(position // count, count, seed)[position % count] for position in positions]


def bucketed_batch_indices(step: int, batch_size: int, buckets: Sequence[int], seed: int) -> list[int]:
    """The same, all of one bucket, from the bucket of each sample.

    Each bucket comes once per sample of its own in len(buckets) steps, in an order that differs each time, so that
    every sample comes exactly `batch_size` times in them, and no sample again before all others of its bucket.
    """
    count = len(buckets)
    if len(set(buckets)) == 1:
        return batch_indices(step, batch_size, count, seed)
    cycle, position = divmod(step, count)
    turns = [buckets[i] for i in _epoch_order(cycle, count, derive_seed(seed, "turns of buckets"))]
    bucket = turns[position]
    samples = [i for i, own in enumerate(buckets) if own == bucket]
    batch = cycle * len(samples) + turns[:position].count(bucket)
    chosen = batch_indices(batch, batch_size, len(samples), derive_seed(seed, f"bucket {bucket}"))
    return [samples[i] for i in chosen]


def revisited_batch(step: int, kept: int, visits: int, seed: int) -> int:
    """The number of the batch of a step, where each comes several times; there is no gap between cycles.

    A cycle has `kept * visits` steps, each at least 1: so many batches one after another, and then the same ones
    again, shuffled anew each time, so that steps side by side differ.
    """
    cycle, place = divmod(step, kept * visits)
    visit, place = divmod(place, kept)
    if visit > 0:
        place = _epoch_order(cycle * visits + visit, kept, derive_seed(seed, "revisited batches"))[place]
    return cycle * kept + place


def derive_seed(seed: int, purpose: str) -> int:
    """A seed of 64 bits that has nothing in common with those of other seeds or purposes."""
    return random.Random(f"{seed} {purpose}").getrandbits(64)


@lru_cache(maxsize=32)  # two epochs of each of several buckets
def _epoch_order(epoch: int, count: int, seed: int) -> tuple[int, ...]:
    # A text as seed is hashed, so neighbouring seeds and epochs have nothing in common.
    return tuple(random.Random(f"{seed} {epoch}").sample(range(count), count))
