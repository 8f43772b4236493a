"""Tests of which portraits a step takes."""

import random
from collections import Counter

import pytest

from training.training_set import batch_indices, bucketed_batch_indices


@pytest.mark.parametrize(("batch_size", "count"), [(1, 5), (2, 5), (5, 5), (4, 6), (7, 3), (3, 1)])
def test_every_sample_comes_once_an_epoch(batch_size, count):
    steps = 4 * count
    stream = [i for step in range(steps) for i in batch_indices(step, batch_size, count, seed=3)]
    assert len(stream) == steps * batch_size
    epochs = [stream[start : start + count] for start in range(0, len(stream), count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)


def test_the_order_is_new_each_epoch_and_for_each_seed():
    def epoch(number, seed):
        return batch_indices(number, 50, 50, seed)

    orders = [epoch(number, seed) for number in range(3) for seed in (-1, 0, 1)]
    assert len({tuple(order) for order in orders}) == len(orders)
    assert list(range(50)) not in orders


def test_a_batch_depends_on_its_step_alone():
    forward = [batch_indices(step, 3, 7, seed=0) for step in range(20)]
    backward = [batch_indices(step, 3, 7, seed=0) for step in reversed(range(20))]
    assert forward == backward[::-1]


def test_a_batch_does_not_touch_the_global_random_state():
    random.seed(0)
    expected = random.random()
    random.seed(0)
    batch_indices(0, 3, 7, seed=5)
    assert random.random() == expected


@pytest.mark.parametrize("bucket", [0, 3])
@pytest.mark.parametrize(("batch_size", "count"), [(1, 5), (4, 6), (7, 3), (3, 1)])
def test_one_bucket_changes_nothing(bucket, batch_size, count):
    for seed in (0, 7):
        for step in (*range(30), 10**12):
            expected = batch_indices(step, batch_size, count, seed)
            assert bucketed_batch_indices(step, batch_size, [bucket] * count, seed) == expected


BUCKETS = [1, 0, 1, 1, 4, 0, 1, 1, 4, 0, 1]  # of 11 samples: six, three and two


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
@pytest.mark.parametrize("first_cycle", [0, 10**9])
def test_every_bucket_and_sample_has_its_share(batch_size, first_cycle):
    count = len(BUCKETS)
    for cycle in range(first_cycle, first_cycle + 4):
        batches = [bucketed_batch_indices(cycle * count + i, batch_size, BUCKETS, seed=3) for i in range(count)]
        assert all(len(batch) == batch_size and len({BUCKETS[i] for i in batch}) == 1 for batch in batches)
        turns = [BUCKETS[batch[0]] for batch in batches]
        assert [turns.count(bucket) for bucket in (0, 1, 4)] == [3, 6, 2]
        assert Counter(i for batch in batches for i in batch) == dict.fromkeys(range(count), batch_size)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_no_sample_comes_again_before_the_others_of_its_bucket(batch_size):
    stream = [i for step in range(66) for i in bucketed_batch_indices(step, batch_size, BUCKETS, seed=3)]
    for bucket in (0, 1, 4):
        own = [i for i, other in enumerate(BUCKETS) if other == bucket]
        drawn = [i for i in stream if BUCKETS[i] == bucket]
        epochs = [drawn[start : start + len(own)] for start in range(0, len(drawn), len(own))]
        assert all(sorted(epoch) == own for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 1


def test_the_turns_of_the_buckets_are_new_each_cycle_and_for_each_seed():
    buckets = [0, 1, 2] * 20
    turns = {
        tuple(buckets[bucketed_batch_indices(60 * cycle + i, 1, buckets, seed)[0]] for i in range(60))
        for cycle in range(3)
        for seed in (-1, 0, 1)
    }
    assert len(turns) == 9


def test_buckets_of_one_size_have_orders_of_their_own():
    """Else the batches of one would be told by those of the other."""
    buckets = [0] * 40 + [1] * 40
    stream = [bucketed_batch_indices(step, 1, buckets, seed=0)[0] for step in range(80)]
    assert [i for i in stream if i < 40] != [i - 40 for i in stream if i >= 40]


def test_a_bucketed_batch_depends_on_its_arguments_alone():
    random.seed(0)
    expected = random.random()
    random.seed(0)
    forward = [bucketed_batch_indices(step, 3, BUCKETS, seed=0) for step in range(40)]
    backward = [bucketed_batch_indices(step, 3, tuple(BUCKETS), seed=0) for step in reversed(range(40))]
    assert forward == backward[::-1]
    assert random.random() == expected
