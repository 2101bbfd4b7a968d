"""Puts together the fp32 weights in a folder of DeepSpeed's `save_checkpoint`, ZeRO 0 to 3.

It follows deepspeed/utils/zero_to_fp32.py, which reads the pickles without restriction."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..job.errors import JobError
from .pickled import Makers, load, of_tensor
from .sources import Form

Maker = Callable[[], torch.Tensor]
_RANK = re.compile(r"_pp_rank_(\d+)_")


def open_zero(folder: Path) -> Makers:
    """Return a maker of each tensor in the folder of one step; raises JobError."""
    models = [load(file) for file in _sorted(folder.glob("*_model_states.pt"))]
    if len({str(m.get("mp_world_size", 1)) for m in models}) > 1 or models[0]["mp_world_size"] > 1:
        raise JobError(f"{folder}: is of a model that was cut into pipeline or tensor stages")
    files = _sorted(folder.glob("*_optim_states.pt"))
    first = models[0]
    found = {k: of_tensor(v) for k, v in first["module"].items() if isinstance(v, torch.Tensor)}
    if not files:  # without ZeRO the module is whole
        return found
    states = [load(file)["optimizer_state_dict"] for file in files]
    count = states[0]["partition_count"]
    count = max(count) if isinstance(count, list) else count
    if count != len(files):
        raise JobError(f"{folder}: has {len(files)} of {count} *_optim_states.pt")
    groups = _groups(first["param_shapes"])
    stage = _number(states[0]["zero_stage"])
    if stage == 3:  # whose module has placeholders for its parameters
        found = {name: maker for name, maker in found.items() if name in first["buffer_names"]}
        flats = [_flat(state["fp32_flat_groups"]) for state in states]
        found |= _of_stage_3(groups, flats)
        frozen = [model.get("frozen_param_fragments") or {} for model in models]
        found |= _frozen_of_3(first.get("frozen_param_shapes") or {}, frozen)
    else:
        parts = [state["single_partition_of_fp32_groups"] for state in states]
        paddings = states[0].get("param_alignment_paddings")
        found |= _of_stages_1_2(groups, parts, paddings)
        found |= {k: of_tensor(v) for k, v in (first.get("frozen_param_fragments") or {}).items()}
    for name, other in first.get("shared_params", {}).items():
        if other in found:
            found[name] = found[other]
    return found


def _sorted(files: Iterator[Path]) -> list[Path]:
    """Return files by their data-parallel rank."""

    def rank(path: Path) -> int:
        number = _RANK.search(path.name)
        return int(number[1]) if number else 0

    return sorted(files, key=rank)


def _groups(shapes: Any) -> list[Mapping[str, Sequence[int]]]:
    return list(shapes) if isinstance(shapes, (list, tuple)) else [shapes]


def _number(stage: Any) -> int:
    """Return ZeRO's stage, which DeepSpeed pickles as an enumeration of its own."""
    return int(getattr(stage, "args", (stage,))[0])


def _flat(groups: Any) -> torch.Tensor:
    """Return a rank's partitions of all groups, one behind the other."""
    groups = groups if isinstance(groups, (list, tuple)) else [groups]
    return torch.cat([group.reshape(-1) for group in groups]) if len(groups) > 1 else groups[0]


def _of_stages_1_2(
    groups: Sequence[Mapping[str, Sequence[int]]],
    parts: Sequence[Sequence[torch.Tensor]],
    paddings: Any,
) -> dict[str, tuple[Form, Maker]]:
    """Cut parameters out of each group, which the ranks' equal partitions make up in order."""
    found: dict[str, tuple[Form, Maker]] = {}
    for g, shapes in enumerate(groups):
        ranks, first = [part[g].reshape(-1) for part in parts], 0
        for i, (name, shape) in enumerate(shapes.items()):
            size = torch.Size(shape).numel()
            maker = _Range(ranks, first, size)
            found[name] = Form(ranks[0].dtype, tuple(shape)), maker
            first += size + (int(paddings[g][i]) if paddings else 0)
    return found


class _Range:
    """Makes a range of what several tensors hold one behind the other."""

    def __init__(self, parts: Sequence[torch.Tensor], first: int, size: int) -> None:
        self.parts, self.first, self.size = parts, first, size

    def __call__(self) -> torch.Tensor:
        found, begin = [], 0
        for part in self.parts:
            low = max(self.first, begin)
            high = min(self.first + self.size, begin + len(part))
            if low < high:
                found.append(part[low - begin : high - begin])
            begin += len(part)
        return torch.cat(found) if found else torch.empty(0)


def _of_stage_3(
    groups: Sequence[Mapping[str, Sequence[int]]], flats: Sequence[torch.Tensor]
) -> dict[str, tuple[Form, Maker]]:
    """Join each parameter's partitions: one a rank, of equal size, the last one padded."""
    found: dict[str, tuple[Form, Maker]] = {}
    first = 0
    for shapes in groups:
        for name, shape in shapes.items():
            size = torch.Size(shape).numel()
            each = -(-size // len(flats))
            slices = [flat[first : first + each] for flat in flats]
            found[name] = Form(flats[0].dtype, tuple(shape)), _Range(slices, 0, size)
            first += each
    return found


def _frozen_of_3(
    shapes: Mapping[str, Sequence[int]], ranks: Sequence[Mapping[str, torch.Tensor]]
) -> dict[str, tuple[Form, Maker]]:
    found: dict[str, tuple[Form, Maker]] = {}
    for name, shape in shapes.items():
        parts = [rank[name].reshape(-1) for rank in ranks]
        size = torch.Size(shape).numel()
        found[name] = Form(parts[0].dtype, tuple(shape)), _Range(parts, 0, size)
    return found
