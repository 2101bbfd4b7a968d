"""This module seeds the random numbers that a data set draws: a sample's are always the same.

They hang on the job's seed, the epoch and the sample alone. So a data set that augments its samples
gives the same ones under every strategy, for any number of processes and of loading workers."""

import contextlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy
import torch

from .permutation import splitmix64

STREAMS = ("train", "test")


def sample_seed(seed: int, stream: str, epoch: int, sample: int) -> int:
    """Return a seed below 2**64; stream: one of `STREAMS`."""
    start = splitmix64(splitmix64(seed) + STREAMS.index(stream))
    return splitmix64(splitmix64(start + epoch) + sample)


def seed_generators(seed: int) -> None:
    """Seed the generators of torch (on the CPU), numpy and Python.

    `torch.manual_seed` would queue a call for each GPU as well, for as long as none is used."""
    torch.default_generator.manual_seed(seed)
    numpy.random.seed(seed % 2**32)
    random.seed(seed)


def generator_states() -> Sequence[Any]:
    """Return the states of the three generators."""
    return torch.get_rng_state(), numpy.random.get_state(), random.getstate()


def same_states(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Tell whether nothing was drawn between two calls of `generator_states`."""
    a, b = one[1], other[1]
    drawn = not numpy.array_equal(a[1], b[1]) or a[2:] != b[2:]
    return bool(torch.equal(one[0], other[0])) and not drawn and one[2] == other[2]


@contextlib.contextmanager
def kept_generators() -> Iterator[None]:
    """Give the three generators their states back at the end."""
    states = generator_states()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        numpy.random.set_state(states[1])
        random.setstate(states[2])
