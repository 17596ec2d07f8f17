import random

import numpy as np
import pytest
import torch

from resnet_backbone.data.sampler import (
    GROUP_WINDOW,
    BatchSampler,
    EvaluationSampler,
    WeightedDraw,
    sample_rng,
    seeded_globals,
)


def pairs(sampler):
    return [pair for batch in sampler for pair in batch]


@pytest.mark.parametrize("size, batch_size", [(10, 3), (10, 5), (7, 16), (1, 4)])
def test_every_epoch_holds_each_image_once(size, batch_size):
    epochs = 6
    taken = pairs(BatchSampler(size, batch_size, seed=3, iterations=-(-epochs * size // batch_size)))[: epochs * size]
    assert [position for position, _ in taken] == list(range(epochs * size))
    orders = np.array([index for _, index in taken]).reshape(epochs, size)
    assert (np.sort(orders, axis=1) == np.arange(size)).all()
    if size == 10:
        assert len(set(map(tuple, orders))) == epochs  # another order in each epoch


def test_without_shuffling_the_images_come_in_order():
    assert pairs(BatchSampler(4, 3, seed=0, iterations=2, shuffle=False)) == [(p, p % 4) for p in range(6)]


@pytest.mark.parametrize("groups", [None, np.arange(50) % 3])
def test_a_batch_depends_on_seed_and_iteration_alone(groups):
    size, batch_size = 50, 8
    whole = list(BatchSampler(size, batch_size, seed=5, iterations=200, groups=groups))
    late = BatchSampler(size, batch_size, seed=5, start_iteration=131, iterations=69, groups=groups)
    assert list(late) == whole[131:]
    anew = BatchSampler(size, batch_size, seed=5, groups=groups)
    for iteration in (180, 3, 64, 63, 3):
        assert anew.batch(iteration) == whole[iteration]
    other = list(BatchSampler(size, batch_size, seed=6, iterations=200, groups=groups))
    assert other != whole


@pytest.mark.parametrize("groups", [None, np.arange(30) % 2])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_in_order_equal_one_process(world_size, groups):
    whole = list(BatchSampler(30, 8, seed=1, iterations=70, groups=groups))
    ranks = [
        BatchSampler(30, 8, seed=1, iterations=70, rank=rank, world_size=world_size, groups=groups)
        for rank in range(world_size)
    ]
    assert [[pair for share in shares for pair in share] for shares in zip(*ranks, strict=True)] == whole


def test_without_a_number_of_iterations_there_is_no_end():
    sampler = BatchSampler(3, 2, seed=0)
    stream = iter(sampler)
    assert len([next(stream) for _ in range(1000)]) == 1000
    with pytest.raises(TypeError, match="without end"):
        len(sampler)
    assert len(BatchSampler(3, 2, seed=0, start_iteration=5, iterations=7)) == 7


def test_groups_fill_batches_and_use_each_position_once():
    rng = np.random.default_rng(0)
    size, batch_size = 1000, 16
    groups = (rng.random(size) < 0.3).astype(int)
    batches = list(BatchSampler(size, batch_size, seed=2, iterations=3 * GROUP_WINDOW, groups=groups))
    for window in range(3):
        inside = batches[window * GROUP_WINDOW : (window + 1) * GROUP_WINDOW]
        count = GROUP_WINDOW * batch_size
        positions = sorted(position for batch in inside for position, _ in batch)
        assert positions == list(range(window * count, (window + 1) * count))
        mixed = [batch for batch in inside if len({groups[index] for _, index in batch}) > 1]
        assert len(mixed) <= 1  # two groups leave less than two batches
    # Grouping moves positions between batches; it does not change which image a position shows.
    plain = dict(pairs(BatchSampler(size, batch_size, seed=2, iterations=3 * GROUP_WINDOW)))
    assert dict(pair for batch in batches for pair in batch) == plain
    # Both groups are spread over the window.
    first = [groups[batch[0][1]] for batch in batches[:GROUP_WINDOW]]
    assert 0 < np.mean(first[: GROUP_WINDOW // 2]) < 1


REPEATS = np.random.default_rng(1).choice([1.0, 1.0, 1.25, 2.6, 7.0], 50)


def test_an_epoch_repeats_each_image_by_its_factor_rounded_up_or_down():
    """On average by the factor itself, to within four standard deviations of the fraction's mean."""
    epochs, length = 400, round(REPEATS.sum())
    sampler = BatchSampler(50, length, seed=4, iterations=epochs, repeats=REPEATS)
    assert sampler.epoch_length == length
    batches = [[index for _, index in batch] for batch in sampler]
    counts = np.array([np.bincount(epoch, minlength=50) for epoch in batches])
    expected = REPEATS * length / REPEATS.sum()
    assert (counts >= np.floor(expected)).all() and (counts <= np.ceil(expected)).all()
    assert abs(counts.mean(axis=0) - expected).max() < 4 * 0.5 / epochs**0.5
    assert counts.std(axis=0)[expected % 1 > 0.2].min() > 0.1  # drawn anew for each epoch
    assert batches[0] != sorted(batches[0]) and len(set(map(tuple, batches))) == epochs


def test_equal_factors_repeat_nothing():
    for factor, length in ((1.0, 1000), (2.0, 2000)):
        sampler = BatchSampler(1000, 500, seed=7, iterations=3 * length // 500, repeats=np.full(1000, factor))
        counts = np.bincount([index for _, index in pairs(sampler)])
        assert sampler.epoch_length == length and (counts == 3 * factor).all()


def test_repeated_images_keep_position_groups_and_ranks():
    """Factors change which image a position shows, and nothing else."""
    arguments = dict(seed=5, iterations=200, repeats=REPEATS, groups=np.arange(50) % 2)
    whole = list(BatchSampler(50, 8, **arguments))
    late = BatchSampler(50, 8, **{**arguments, "iterations": 69}, start_iteration=131)
    assert list(late) == whole[131:]
    ranks = [BatchSampler(50, 8, **arguments, rank=rank, world_size=2) for rank in (0, 1)]
    assert [first + second for first, second in zip(*ranks, strict=True)] == whole
    ungrouped = dict(pairs(BatchSampler(50, 8, **{**arguments, "groups": None, "iterations": 3 * GROUP_WINDOW})))
    window = [pair for batch in whole[: 3 * GROUP_WINDOW] for pair in batch]
    assert dict(window) == ungrouped
    assert sum(len({index % 2 for _, index in batch}) > 1 for batch in whole[:GROUP_WINDOW]) <= 1
    in_order = [index for _, index in pairs(BatchSampler(50, 8, seed=5, iterations=9, repeats=REPEATS, shuffle=False))]
    assert in_order == sorted(in_order)


def test_draws_follow_their_weights():
    draw = WeightedDraw([1.0, 0.5, 2.5])
    assert [int(draw(u)) for u in (0.0, 0.249, 0.251, 0.374, 0.376, 1.0)] == [0, 0, 1, 1, 2, 2]


def test_shuffled_orders_are_uniform():
    """How often each image comes first, over 6000 epochs: a chi-square test at a level of about 1e-4."""
    size, epochs = 6, 6000
    taken = pairs(BatchSampler(size, size, seed=9, iterations=epochs))
    counts = np.bincount([index for position, index in taken if position % size == 0], minlength=size)
    assert ((counts - epochs / size) ** 2 / (epochs / size)).sum() < 25.7


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("size", [1, 10, 21])
def test_evaluation_takes_each_image_once_in_order(size, world_size):
    samplers = [EvaluationSampler(size, batch_size=4, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert [pair for sampler in samplers for pair in pairs(sampler)] == [(index, index) for index in range(size)]
    assert all(len(list(sampler)) == len(sampler) for sampler in samplers)
    shares = [len(pairs(sampler)) for sampler in samplers]
    assert max(shares) - min(shares) <= 1


def test_sample_rng_differs_by_seed_and_position():
    draws = {sample_rng(seed, position).integers(2**60) for seed in range(20) for position in range(20)}
    assert len(draws) == 400
    assert sample_rng(3, 4).integers(2**60) == sample_rng(3, 4).integers(2**60)


def test_seeded_globals_seeds_and_restores():
    def draw():
        return random.random(), np.random.random(), torch.rand(1).item()

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    expected = [draw(), draw()]
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    got = [draw()]
    with seeded_globals(1, 7):
        inside = draw()
    with pytest.raises(KeyError), seeded_globals(1, 8):
        other = draw()
        raise KeyError
    got.append(draw())
    assert got == expected
    with seeded_globals(1, 7):
        assert draw() == inside
    assert inside[0] != other[0] and inside[1] != other[1] and inside[2] != other[2]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(size=0, batch_size=1), "holds 0 images"),
        (dict(size=5, batch_size=6, world_size=4), "cannot be shared equally by 4 processes"),
        (dict(size=5, batch_size=0), "positive multiple"),
        (dict(size=5, batch_size=4, world_size=2, rank=2), "rank 2 lies outside 0...1"),
        (dict(size=5, batch_size=4, groups=[0, 1]), "one number for each of 5 images"),
        (dict(size=5, batch_size=4, repeats=[1.0, 2.0]), "one number for each of 5 images"),
        (dict(size=5, batch_size=4, seed=-1), "must not be negative"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        BatchSampler(**{"seed": 0, **arguments})
