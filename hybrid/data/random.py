"""This module draws random samples of the shapes of an image classifier from a seed."""

import torch
from torch.utils.data import TensorDataset

from ..job.reading import show
from ..launch.limits import check_memory


def random(
    samples: int = 1000,
    test_samples: int = 200,
    features: int = 784,
    classes: int = 10,
    seed: int = 0,
) -> tuple[TensorDataset, TensorDataset]:
    """Draws train and test sets: normal `input` float32 [features], uniform `target` int64 [].

    Raises ValueError where a size is below 1."""
    if min(samples, test_samples, features, classes) < 1:
        raise ValueError("samples, test_samples, features and classes must be at least 1")
    check_memory(4 * features * (samples + test_samples), f"samples = {show(samples)} in fp32")
    draw = torch.Generator().manual_seed(seed)

    def one_set(size: int) -> TensorDataset:
        inputs = torch.randn(size, features, generator=draw)
        return TensorDataset(inputs, torch.randint(classes, (size,), generator=draw))

    return one_set(samples), one_set(test_samples)
