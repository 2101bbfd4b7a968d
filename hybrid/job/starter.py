"""This module writes a job of one's own to start from: `hybrid init NAME`. It needs no torch."""

import importlib.util
import keyword
import os
import sys
from pathlib import Path

from .errors import JobError
from .outputs import makes

MODEL = '''"""The model, the loss and the data that NAME.toml names: put your own in their place."""

import torch
from torch import nn
from torch.utils.data import Subset, TensorDataset


class Block(nn.Module):
    """A residual block. Repeated blocks are what sharding and pipelines divide a model by."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x):
        return x + torch.tanh(self.linear(self.norm(x)))


class Net(nn.Module):
    """Any module of torch may stand here."""

    def __init__(self, width, num_blocks):
        super().__init__()
        self.first = nn.Linear(20, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(num_blocks))
        self.last = nn.Linear(width, 3)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def build_model(width, num_blocks):
    """Return the module and its loss. The keyword arguments are `options` in NAME.toml."""
    return Net(width, num_blocks), nn.CrossEntropyLoss()


def build_data(samples):
    """Return the train set and the test set: a point near one of three centers, and which."""
    draw = torch.Generator().manual_seed(0)
    centers = torch.randn(3, 20, generator=draw)
    targets = torch.randint(3, (samples + 200,), generator=draw)
    inputs = centers[targets] + torch.randn(len(targets), 20, generator=draw)
    points = TensorDataset(inputs, targets)
    return Subset(points, range(samples)), Subset(points, range(samples, len(points)))
'''
JOB = """# A job of your own: what is trained, on what, and how. Compare the strategies on it:
#   hybrid compare NAME.toml --nproc 2
[model]
name = "NAME:build_model"     # the function build_model in NAME.py
options = { width = 32, num_blocks = 4 }

[data]
name = "NAME:build_data"
options = { samples = 1000 }

[optimizer]
name = "adamw"
lr = 0.001

[train]
global_batch = 60             # samples in one optimizer step, over all ranks
micro_batches = 2             # pieces that each data-parallel rank cuts its share into
steps = 30
clip_norm = 1.0               # of the gradient, before each step
"""


def write_starter(name: str, folder: Path | None = None) -> list[Path]:
    """Write NAME.toml and NAME.py in a folder, this one if it is left out, and return their paths.

    Raises JobError, and writes nothing, where a file of that name is there or the name is none that
    Python can import as this module."""
    folder = folder or Path()
    files = {folder / f"{name}.toml": JOB, folder / f"{name}.py": MODEL}
    given = f"NAME = {name!r}"
    if not (name.isascii() and name.isidentifier()) or keyword.iskeyword(name):
        valid = "letters, digits and _, no digit first, no word of Python's"
        raise JobError(f"{given}: is no name of a Python module; valid: {valid}")
    for file in files:
        if os.path.lexists(file):
            raise JobError(f"{given}: {file} is there already; valid: a name that is not taken")
    if found := _other_module(name):
        raise JobError(f"{given}: {found} has this name; valid: a name that is not taken")
    written = list[Path]()
    try:
        with makes(
            folder / name, "NAME", "valid: a name that is not taken, of a file that can be made"
        ):
            for file, text in files.items():
                with file.open("x") as opened:
                    written.append(file)
                    opened.write(text.replace("NAME", name))
    except BaseException:  # half of the two is of no use
        for file in written:
            file.unlink(missing_ok=True)
        raise
    return list(files)


def _other_module(name: str) -> str:
    """Return which module one of this name would hide, or be hidden by; empty: none."""
    if name in sys.stdlib_module_names or name == "__main__":
        return "a module of Python's own"
    spec = importlib.util.find_spec(name)
    where = (spec.origin or next(iter(spec.submodule_search_locations or []), "")) if spec else ""
    # A folder without __init__.py gives way to a file of its name beside it.
    bare = spec is not None and spec.origin is None
    return "" if not where or (bare and Path(where).parent == Path.cwd()) else where
