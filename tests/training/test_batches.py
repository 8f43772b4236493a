"""Tests of batches: which portraits, noise, timesteps and kinds a step has, on any number of processes."""

from copy import copy
from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler
from test_train import SMOOTH, difference, prepared, train

from families.noise_process import DDPM
from training.batches import Batch, BatchDrawer
from training.portraits import Portraits
from training.prompt_table import BASE, EMPTY, FULL


def drawer(process_index: int = 0, num_processes: int = 1, batch_size: int = 8, seed: int = 0) -> BatchDrawer:
    noise = DDPM("DDPMScheduler", DDPMScheduler().config)
    return BatchDrawer(seed, batch_size, process_index, num_processes, 5, noise, torch.device("cpu"))


@pytest.fixture(scope="module")
def portraits():
    generator = torch.Generator().manual_seed(0)
    pair_index = torch.tensor([0, 1, 2, 3, 4, 0, 1])
    latents, time_ids = (torch.randn(7, *shape, generator=generator) for shape in ((4, 4, 4), (6,)))
    return Portraits(latents, pair_index, time_ids, (0,) * 7)


def tensors(batch: Batch) -> dict[str, torch.Tensor]:
    return {name: value for name, value in vars(batch).items() if value is not None}


def test_a_batch_is_a_pure_function(portraits):
    torch.manual_seed(0)
    first = tensors(drawer().aligned(portraits, 3, stream=1, unchanged_share=0.375))
    state = torch.random.get_rng_state()
    torch.manual_seed(99)
    drawer().aligned(portraits, 4, stream=1)
    second = tensors(drawer().aligned(portraits, 3, stream=1, unchanged_share=0.375))
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.manual_seed(0)
    assert torch.equal(torch.random.get_rng_state(), state), "it drew from the global generator"


@pytest.mark.parametrize("other", [{"micro_step": 4}, {"stream": 2}, {"seed": 1}])
def test_steps_streams_and_seeds_draw_different_batches(portraits, other):
    def draw(micro_step=3, stream=1, seed=0):
        return drawer(seed=seed).aligned(portraits, micro_step, stream)

    first, second = draw(), draw(**other)
    assert not torch.equal(first.noise, second.noise) and not torch.equal(first.timesteps, second.timesteps)
    assert not torch.equal(first.index, second.index)


def test_processes_share_the_batch_of_one(portraits):
    for micro_step in range(5):
        whole = tensors(drawer(batch_size=8).aligned(portraits, micro_step, 2, 0.375))
        parts = [
            tensors(drawer(i, 4, batch_size=2).aligned(portraits, micro_step, 2, 0.375)) for i in range(4)
        ]
        for name, value in whole.items():
            assert torch.equal(torch.cat([part[name] for part in parts]), value), name


def test_the_rows_of_a_batch_belong_together(portraits):
    batch = drawer().aligned(portraits, 3, stream=1, unchanged_share=0.5)
    assert torch.equal(batch.pairs, portraits.pair_index[batch.index])
    assert torch.equal(batch.rows, batch.kinds * 5 + batch.pairs)
    noisy_latents = DDPMScheduler().add_noise(portraits.latents[batch.index], batch.noise, batch.timesteps)
    assert torch.equal(batch.noisy_latents, noisy_latents)


def test_every_portrait_comes_once_an_epoch(portraits):
    index = torch.cat([drawer(batch_size=4).aligned(portraits, i, 0).index for i in range(7)])
    assert torch.bincount(index).tolist() == [4] * 7


@pytest.mark.parametrize(
    "share, full, base, empty", [(0.375, {5}, {2}, {1}), (0.6, {3, 4}, {2, 3, 4}, {1, 2}), (0.25, {6}, {1, 2}, {0, 1})]
)
def test_every_batch_has_its_share_of_each_kind(portraits, share, full, base, empty):
    """Two thirds of the rows that ask for no change have the base prompt, one third the empty one."""
    counts, places = [], torch.zeros(8)
    for micro_step in range(400):
        kinds = drawer().aligned(portraits, micro_step, 2, share).kinds
        counts.append([(kinds == kind).sum().item() for kind in (FULL, BASE, EMPTY)])
        places += kinds != FULL
    counts = torch.tensor(counts)
    for column, allowed, mean in zip(
        counts.T, (full, base, empty), (8 * (1 - share), 8 * share * 2 / 3, 8 * share / 3), strict=True
    ):
        assert set(column.tolist()) == allowed and column.float().mean() == pytest.approx(mean, abs=0.1)
    # Each process has its share in the long run, too.
    assert (places / 400).sub(share).abs().max() < 0.1


def test_a_share_smaller_than_a_row_comes_in_some_batches(portraits):
    kinds = [drawer(batch_size=2).aligned(portraits, i, 2, 0.25).kinds for i in range(400)]
    assert (torch.cat(kinds) != FULL).float().mean() == pytest.approx(0.25, abs=0.04)


def test_without_a_share_every_row_asks_for_the_target(portraits):
    kinds = torch.cat([drawer().aligned(portraits, i, 0).kinds for i in range(20)])
    assert (kinds == FULL).all()


def drawn_timesteps(portraits, power: float) -> torch.Tensor:
    batches = [drawer().aligned(portraits, i, 2, timestep_power=power) for i in range(200)]
    return torch.cat([batch.timesteps for batch in batches])


def test_timesteps_cover_the_whole_range_evenly(portraits):
    timesteps = drawn_timesteps(portraits, 0.0)
    assert timesteps.min() < 10 and timesteps.max() in range(990, 1000)
    assert torch.histc(timesteps.float(), 4, 0, 1000).sub(400).abs().max() < 80


def test_timesteps_are_drawn_with_the_given_density(portraits):
    alphas_cumprod = DDPMScheduler().alphas_cumprod
    density = ((1 - alphas_cumprod) / alphas_cumprod).clamp(max=256) ** 0.5
    expected = 1600 * density.unflatten(0, (4, 250)).sum(1) / density.sum()
    counts = torch.histc(drawn_timesteps(portraits, 0.5).float(), 4, 0, 1000)
    assert (counts - expected).abs().max() < 80 and counts[3] > 3 * counts[1]


def test_the_noise_offset_is_one_a_channel(world):
    parts = prepared(world).parts
    plain, offset = (parts.batches.training(parts.training, 0, noise_offset) for noise_offset in (0, 0.5))
    added = offset.noise - plain.noise
    assert added.std((2, 3)).max() < 1e-6 < added.mean((2, 3)).std()
    assert torch.equal(plain.timesteps, offset.timesteps) and torch.equal(plain.index, offset.index)


def concatenated(draw, size: int):
    """`draw` for a batch of `size`, as the union of the `size` batches of one that accumulation would draw."""

    def draw_together(drawer, portraits, micro_step, *args, **kwargs):
        assert drawer.batch_size == size
        if not isinstance(portraits, Portraits):
            own, portraits = portraits.training_set, copy(portraits)
            portraits.training_set = replace(own, batch_size=1, share=slice(0, 1))
        small = replace(drawer, batch_size=1)
        parts = [tensors(draw(small, portraits, size * micro_step + k, *args, **kwargs)) for k in range(size)]
        return Batch(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})

    return draw_together


def test_accumulated_batches_are_one_batch(world, tmp_path, monkeypatch):
    flags = {"stage2_objective": "both", **SMOOTH}
    accumulated = train(world, tmp_path / "two", train_batch_size=1, gradient_accumulation_steps=2, **flags)
    for name in ("training", "aligned"):
        monkeypatch.setattr(BatchDrawer, name, concatenated(getattr(BatchDrawer, name), 2))
    one = train(world, tmp_path / "one", train_batch_size=2, **flags)
    assert difference(accumulated, one) < 1e-4 < difference(one, one / "stage1") / 10
