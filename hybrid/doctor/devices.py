"""Whether torch works here, with which backends and devices. Imports torch, inside functions."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

from ..environment import package_version
from .finding import Finding


def torch_problem() -> Finding | None:
    """Why torch cannot be imported; None where it can. A package that is not there at all has its
    finding with the packages."""
    if package_version("torch") is None:
        return Finding("devices", "error", "not known without torch", "install torch, see above")
    try:
        import torch.distributed
    except (ImportError, OSError, RuntimeError) as error:  # a library that it links to is missing
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return Finding("devices", "error", f"torch cannot be imported: {reason}", "reinstall torch")
    if not torch.distributed.is_available():
        found = "this torch was built without torch.distributed"
        return Finding("backends", "error", found, "install a build with it, such as from pip")
    return None


def check_devices() -> Iterator[Finding]:
    """Backends of torch.distributed, GPUs, and GPUs that torch does not see."""
    if problem := torch_problem():
        yield problem
        return
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    yield _backends(gpus)
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 0))
    if gpus:
        yield check_gpus([torch.cuda.get_device_name(i) for i in range(gpus)], ranks)
    elif shutil.which("nvidia-smi") and os.path.exists("/dev/nvidiactl"):
        found = f"there is an NVIDIA GPU, and torch {torch.__version__} sees none: runs use the CPU"
        mend = "install a CUDA build of torch that fits the driver; see CUDA_VISIBLE_DEVICES"
        yield Finding("devices", "warning", found, mend)
    else:
        yield Finding("devices", "ok", "no GPU: runs use the CPU")


def _backends(gpus: int) -> Finding:
    import torch.distributed as dist

    there = {
        "gloo": dist.is_gloo_available(),
        "nccl": dist.is_nccl_available(),
        "mpi": dist.is_mpi_available(),
    }
    found = ", ".join(name if has else f"no {name}" for name, has in there.items())
    needed = "nccl" if gpus else "gloo"
    if not there[needed]:
        mend = f"install a build of torch with {needed}"
        return Finding("backends", "error", f"{found}; {needed} is needed here", mend)
    return Finding("backends", "ok", found)


def check_gpus(names: list[str], ranks: int) -> Finding:
    """GPUs by name against the ranks of this host, 0 where no launcher started any."""
    kinds = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    if ranks > len(names):
        found = f"{kinds} for {ranks} ranks: nccl refuses two ranks on one GPU"
        return Finding("devices", "error", found, f"start at most {len(names)} ranks on this host")
    return Finding("devices", "ok", kinds)
