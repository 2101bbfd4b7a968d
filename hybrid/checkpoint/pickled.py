"""Reads the pickled weights of other tools, by torch's loader that runs no code they name.

`torch.load(weights_only=True)` builds tensors and plain containers alone. What it refuses is
refused here too, with its reason. https://docs.pytorch.org/docs/stable/notes/serialization.html"""
