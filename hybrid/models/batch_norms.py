"""This module finds the layers whose result depends on how a batch is cut into micro-batches."""

from torch.nn.modules.batchnorm import _BatchNorm

from .layers import Layers


def find_batch_norms(layers: Layers) -> list[str]:
    """Names the batch norms of a model, such as `0.norm (BatchNorm1d)`.

    In training they normalise each sample by the statistics of the samples beside it."""
    names = {id(tensor): name for name, tensor in layers.tensors().items()}
    found = []
    for module in layers.modules():
        if isinstance(module, _BatchNorm):
            held = (module.running_mean, module.weight)
            own = next((names[id(t)] for t in held if id(t) in names), "")
            found.append(f"{own.rpartition('.')[0]} ({type(module).__name__})".strip())
    return found
