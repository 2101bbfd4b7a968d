"""This module gives each rank of a host a device of its own, or says why it cannot.

nccl refuses two ranks on one GPU, and one GPU for several ranks would be slower and hold less than
one rank alone. So `hybrid` counts the GPUs before it starts ranks (`check_gpus`). Ranks that any
launcher started settle at their rendezvous who has which (`announce`, `settle`): in the order of
their local ranks, each takes the first GPU which it sees and which none before it has taken. That
is LOCAL_RANK's GPU where all ranks see all, and device 0 where a scheduler shows each rank its own,
as SLURM's `--gpus-per-task=1` does.
The module imports torch only there."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..job.errors import JobError, Refused
from .placement import Placement

if TYPE_CHECKING:
    import torch.distributed as dist

# A driver of NVIDIA's, of AMD's, and of NVIDIA's below Windows makes these: without any of them
# torch sees no GPU, and need not be imported to say so.
DRIVERS = tuple(map(Path, ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")))
HIDDEN = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
COUNT = "import torch; print(torch.cuda.device_count())"
OWN_GPU = "each rank needs a GPU of its own"
# Keys of the store.
_HOST, _KIND = "hybrid/host/", "hybrid/ranks_on_"
_PLACED, _REFUSED = "hybrid/placed/", "hybrid/refused"


def count_gpus() -> int:
    """Return how many GPUs a rank that starts now would see.

    torch counts them by NVML, which makes no context; where this process has not imported it, one
    of its own does so, and only where there is a driver."""
    if not any(path.exists() for path in DRIVERS):
        return 0
    if torch := sys.modules.get("torch"):
        return int(torch.cuda.device_count())
    done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True)
    return int(done.stdout) if done.returncode == 0 else 0  # the doctor says what torch lacks


def check_gpus(asked: str, ranks: int, degrees: bool = False) -> None:
    """Raise JobError unless each of so many ranks can have a device here, before any starts.

    asked: the job's `launch.device`. degrees: `[parallel]` has some, which fewer ranks would not
    multiply to."""
    if asked == "cpu":
        return
    gpus = count_gpus()
    if gpus == 0 and asked == "cuda":
        raise JobError(_none())
    if 0 < gpus < ranks:
        option = None if degrees else "--nproc"
        raise JobError(f"--nproc {ranks}: {_too_few('this host has', gpus, option)}")


def device_for(ranks: int) -> str:
    """Return the `launch.device` with which so many ranks can run here."""
    return "cpu" if 0 < count_gpus() < ranks else "auto"


def hides_gpus(asked: str) -> bool:
    """Tell whether the GPUs of this host are to be kept from the processes of a run."""
    return asked == "cpu" and any(path.exists() for path in DRIVERS)


@contextlib.contextmanager
def gpus_hidden(asked: str) -> Iterator[None]:
    """Have the processes that start meanwhile see no GPU, where a job on a host with some asks so.

    Accelerate and DeepSpeed look for GPUs themselves, also while they are imported. On a host
    without a GPU nothing changes."""
    hidden = HIDDEN if hides_gpus(asked) else {}
    found = {key: os.environ.get(key) for key in hidden}
    os.environ.update(hidden)
    try:
        yield
    finally:
        for key, value in found.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})


def announce(store: dist.Store, placement: Placement) -> None:
    """Tell the other ranks where this one is and which GPUs it sees; before it says it has come."""
    kind = _kind(placement)
    gpus = _seen() if kind == "cuda" else []
    local = placement.local_rank if placement.local_known else None
    line = json.dumps({"rank": placement.rank, "local": local, "gpus": gpus})
    store.append(_HOST + placement.host_id, line + "\n")  # type: ignore[attr-defined]
    mine = f"{placement.rank} on {placement.host}\n"
    store.append(_KIND + kind, mine)  # type: ignore[attr-defined]


def settle(store: dist.Store, placement: Placement) -> tuple[Placement, int]:
    """Return this rank's place once all ranks have announced theirs, and how many are on its host.

    Raises Refused, the same on every rank of the run, where some cannot have devices."""
    _require_one_kind(store, placement)
    require_device(placement)
    lines = map(json.loads, store.get(_HOST + placement.host_id).decode().splitlines())
    ranks = {one["rank"]: one for one in lines}  # one that has come twice counts once
    here = sorted(ranks.values(), key=_order)
    order = [one["rank"] for one in here]
    if not placement.local_known:
        local = order.index(placement.rank)
        placement = dataclasses.replace(placement, local_rank=local, local_known=True)
    if placement.device.type == "cuda":
        try:
            found = assign({one["rank"]: one["gpus"] for one in here}, placement.host)
        except Refused as error:
            store.append(_REFUSED, f"{order[0]} {error}\n")  # type: ignore[attr-defined]
        _require_all_placed(store, placement)
        placement = dataclasses.replace(placement, gpu=found[placement.rank])
    return placement, len(here)


def require_device(placement: Placement) -> None:
    """Raise Refused where the job asks for a GPU and this rank sees none."""
    if placement.device_asked == "cuda" and _kind(placement) == "cpu":
        raise Refused(_none())


def assign(seen: Mapping[int, list[str]], host: str) -> dict[int, int]:
    """Return the index of each rank's GPU among those that it sees; raises Refused.

    seen: the identifiers of the GPUs that each rank of a host sees, in the order of local ranks."""
    different = {gpu for gpus in seen.values() for gpu in gpus}
    if len(different) < len(seen):
        ranks = f"{len(seen)} ranks on {host}"
        raise Refused(f"{ranks}: {_too_few('they see', len(different), '--nproc')}")
    taken, found = set[str](), dict[int, int]()
    for rank, gpus in seen.items():
        free = next((gpu for gpu in gpus if gpu not in taken), None)
        if free is None:
            raise Refused(
                f"rank {rank} on {host} sees only GPUs that other ranks have: {OWN_GPU}; valid: "
                "show all ranks all GPUs, or each rank its own (CUDA_VISIBLE_DEVICES)"
            )
        taken.add(free)
        found[rank] = gpus.index(free)
    return found


def _kind(placement: Placement) -> str:
    try:
        return placement.device.type
    except JobError:  # no GPU where the job asks for one: all ranks have to be told
        return "cpu"


def _order(one: Mapping[str, Any]) -> tuple[int, int]:
    return (one["rank"] if one["local"] is None else one["local"]), one["rank"]


def _seen() -> list[str]:
    """Return what identifies each GPU that this process sees, wherever it stands in the list."""
    import torch

    indices = range(torch.cuda.device_count())
    return [str(torch.cuda.get_device_properties(index).uuid) for index in indices]


def _require_one_kind(store: dist.Store, placement: Placement) -> None:
    """Raise Refused on every rank where some ranks have GPUs and others have none."""
    mine = _kind(placement)
    other = "cpu" if mine == "cuda" else "cuda"
    if not store.check([_KIND + other]):
        return
    ranks = {kind: store.get(_KIND + kind).decode().splitlines() for kind in (mine, other)}
    with_gpu, without = min(ranks["cuda"], key=_rank_of), min(ranks["cpu"], key=_rank_of)
    raise Refused(
        f"rank {without} sees no GPU, and rank {with_gpu} does; valid: GPUs for all ranks, or "
        "launch.device = 'cpu'"
    )


def _require_all_placed(store: dist.Store, placement: Placement) -> None:
    """Wait until all ranks have tried, and raise Refused on every one if one could not."""
    store.set(f"{_PLACED}{placement.rank}", "")
    store.wait([f"{_PLACED}{rank}" for rank in range(placement.world_size)])
    if store.check([_REFUSED]):
        first = min(store.get(_REFUSED).decode().splitlines(), key=_rank_of)
        raise Refused(first.partition(" ")[2])


def _rank_of(words: str) -> int:
    return int(words.split()[0])


def _none() -> str:
    return "launch.device = 'cuda': torch sees no GPU on this host; valid: auto, cpu"


def _too_few(who: str, gpus: int, option: str | None) -> str:
    seen = f"{who} {gpus} GPU{'' if gpus == 1 else 's'}"
    fewer = f"{option} {gpus}, or " if option else ""
    return f"{seen}, and {OWN_GPU}; valid: {fewer}launch.device = 'cpu'"


def main() -> None:
    """Print the `launch.device` with which as many ranks as the first argument says run here."""
    ranks = int(sys.argv[1])
    device = device_for(ranks)
    if device == "cpu":
        print(f"hybrid: fewer GPUs than the {ranks} ranks: they run on the CPU", file=sys.stderr)
    print(device)


if __name__ == "__main__":
    main()
