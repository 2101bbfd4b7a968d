"""Checks the cores, memory, limits, compiler, compiled ops and GPUs of this host."""

import os
import re
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from ..job.errors import first_line
from ..launch.ops_cache import (
    VARIABLE,
    ops_folder,
    package_version,
    private_ops_folder,
    stale_locks,
)
from ..launch.threads import CGROUP_QUOTA, cgroup_cores, num_cores, num_shared_cores
from .finding import Finding, warn_if

ENOUGH_SHARED = 2**30  # bytes; a container gets 64 MiB unless told otherwise
ENOUGH_FILES = 1024  # a rank has sockets to every peer in every group, and its libraries' files
BACKENDS = ("gloo", "nccl", "mpi")  # of torch.distributed
RDMA = Path("/sys/class/infiniband")


def check_machine() -> Iterator[Finding]:
    """Check what runs need of the host, whichever devices it has."""
    cores, ranks = num_cores(), int(os.environ.get("LOCAL_WORLD_SIZE", 0))
    yield check_cores(cores, cgroup_cores(CGROUP_QUOTA))
    shared = num_shared_cores() if ranks else cores
    yield check_threads(shared, ranks, os.environ.get("OMP_NUM_THREADS"))
    if Path("/dev/shm").is_dir():
        yield check_shared_memory(shutil.disk_usage("/dev/shm").total)
    if sys.platform != "win32":
        from resource import RLIM_INFINITY, RLIMIT_MEMLOCK, RLIMIT_NOFILE, getrlimit

        limits = [getrlimit(name)[0] for name in (RLIMIT_NOFILE, RLIMIT_MEMLOCK)]
        files, memory = (float("inf") if n == RLIM_INFINITY else n for n in limits)
        yield check_open_files(files)
        yield check_locked_memory(memory, RDMA.is_dir() and any(RDMA.iterdir()))
    compiler = next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)
    missing = "none: train.compile, and ops that DeepSpeed compiles when offloading, do not work"
    mend = "install g++, if a job needs these"
    yield warn_if(compiler is None, "c++ compiler", compiler or missing, mend)
    yield from check_jit_cache(ops_folder())


def check_cores(cores: int, quota: float | None) -> Finding:
    """Name the cores that runs count with; `quota` is the processor time that a container has."""
    limit = "" if quota is None else f", with the time of {quota:g} in this container"
    return Finding("cores", "ok", f"{cores}{limit}")


def check_threads(cores: int, ranks: int, setting: str | None) -> Finding:
    """Check OMP_NUM_THREADS for the ranks of this host, 0 where no launcher started any."""
    share = max(1, cores // max(1, ranks))
    shown = "OMP_NUM_THREADS is not set" if setting is None else f"OMP_NUM_THREADS={setting}"
    mend = f"OMP_NUM_THREADS={share}"
    if setting is not None and not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", setting):
        return Finding("threads", "warning", f"{shown}: not a number, and ignored", mend)
    if not ranks:
        note = "" if setting else ": each rank gets its share of the cores"
        return Finding("threads", "ok", f"{shown}{note}")
    threads = int(setting.split(",")[0]) if setting else share  # as `set_num_threads` does
    found = f"{ranks} ranks of {threads} threads on {cores} cores ({shown})"
    if ranks > cores and threads == 1:
        mend = f"start at most {cores} ranks on this host"
        return Finding("threads", "warning", f"{found}: ranks share cores", mend)
    if ranks * threads > max(cores, ranks):
        return Finding("threads", "warning", f"{found}: more than cores, many times slower", mend)
    return Finding("threads", "ok", found)


def check_shared_memory(size: int) -> Finding:
    """Check /dev/shm, through which nccl and data loaders pass data; `size` is in bytes."""
    mend = "start the container with --shm-size=1g or more, or --ipc=host"
    found = f"/dev/shm has {size / 2**20:,.0f} MiB"
    return warn_if(size < ENOUGH_SHARED, "shared memory", found, mend)


def check_open_files(limit: float) -> Finding:
    """Check how many files a process may open (RLIMIT_NOFILE)."""
    found, mend = f"a process may have {limit:,.0f} open", f"ulimit -n {ENOUGH_FILES} or more"
    return warn_if(limit < ENOUGH_FILES, "open files", found, mend)


def check_locked_memory(limit: float, rdma: bool) -> Finding:
    """Check how many bytes a process may lock (RLIMIT_MEMLOCK); RDMA locks its send buffers."""
    shown = "unlimited" if limit == float("inf") else f"{limit / 2**20:,.1f} MiB"
    if not rdma:
        return Finding("locked memory", "ok", f"{shown}; matters with RDMA only, and none is here")
    mend = "ulimit -l unlimited, in /etc/security/limits.conf or the scheduler's own settings"
    return warn_if(limit != float("inf"), "locked memory", f"{shown}, on a host with RDMA", mend)


def check_jit_cache(folder: Path) -> Iterator[Finding]:
    """Check for stale locks and for ops of other releases where torch compiles ops at first use."""
    ours, stale = folder == private_ops_folder(), stale_locks(folder)
    for lock in stale:
        mend = "nothing: the next run removes it" if ours else f"rm {lock}"
        found = f"{lock}: a build left it and is gone; what needs the op waits for ever"
        yield Finding("jit cache", "warning", found, mend)
    foreign = [] if ours else list(foreign_ops(folder))
    for op, why in foreign:
        mend = f"rm -r {op}, or unset {VARIABLE}"
        yield Finding("jit cache", "warning", f"{op}: {why}: loading it may crash", mend)
    if not stale and not foreign:
        made = "" if folder.exists() else ", not made yet"
        yield Finding("jit cache", "ok", f"{folder}{made}")


def foreign_ops(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield folders of DeepSpeed's ops that another installation or an earlier release built."""
    try:
        site = Path(str(metadata.distribution("deepspeed").locate_file(""))).resolve()
        installed = max(_install_time("torch"), _install_time("deepspeed"))
    except metadata.PackageNotFoundError:
        return
    for rules in [*folder.glob("*/build.ninja"), *folder.glob("*/*/build.ninja")]:
        found = re.search(r"(\S+)/deepspeed/ops/csrc/", rules.read_text(errors="replace"))
        if found and Path(found[1]).resolve() != site:
            yield rules.parent, f"built from another installation, {found[1]}"
        elif found and rules.stat().st_mtime < installed:
            yield rules.parent, "older than the installed torch and deepspeed"


def _install_time(package: str) -> float:
    """Return when a package was installed: the installer writes its list of files then."""
    found = metadata.distribution(package)
    record = Path(str(found.locate_file(f"{package}-{found.version}.dist-info/RECORD")))
    return record.stat().st_mtime if record.exists() else 0.0


def torch_problem() -> Finding | None:
    """Return why torch cannot be used here, or None where it can."""
    if package_version("torch") is None:
        return Finding("devices", "error", "not known without torch", "install torch, see above")
    try:
        import torch.distributed as dist
    except (ImportError, OSError, RuntimeError) as error:  # a library that it links to is missing
        found = f"torch cannot be imported: {first_line(error)}"
        return Finding("devices", "error", found, "reinstall torch")
    if not dist.is_available():
        found = "this torch was built without torch.distributed"
        return Finding("backends", "error", found, "install a build with it, such as from pip")
    return None


def check_devices() -> Iterator[Finding]:
    """Check the backends and GPUs of torch, and whether there are GPUs that it does not see."""
    if problem := torch_problem():
        yield problem
        return
    import torch
    from torch.distributed import is_backend_available

    gpus = len(names := gpu_names())
    found = ", ".join(f"{'' if is_backend_available(n) else 'no '}{n}" for n in BACKENDS)
    if is_backend_available(needed := "nccl" if gpus else "gloo"):
        yield Finding("backends", "ok", found)
    else:
        mend = f"install a build of torch with {needed}"
        yield Finding("backends", "error", f"{found}; {needed} is needed here", mend)
    if gpus:
        yield check_gpus(names, int(os.environ.get("LOCAL_WORLD_SIZE", 0)))
    elif shutil.which("nvidia-smi") and os.path.exists("/dev/nvidiactl"):
        found = f"there is an NVIDIA GPU, and torch {torch.__version__} sees none: runs use the CPU"
        mend = "install a CUDA build of torch that fits the driver; see CUDA_VISIBLE_DEVICES"
        yield Finding("devices", "warning", found, mend)
    else:
        yield Finding("devices", "ok", "no GPU: runs use the CPU")


def gpu_names() -> list[str]:
    """Return the name of each GPU that this process sees."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.cuda.get_device_name(index) for index in range(count)]


def check_gpus(names: list[str], ranks: int) -> Finding:
    """Check the GPUs against the ranks of this host, 0 where no launcher started any."""
    kinds = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    if ranks > len(names) > 1:  # one may be each rank's own: ranks settle that where they meet
        found = f"{kinds} for {ranks} ranks: nccl refuses two ranks on one GPU"
        mend = f"start at most {len(names)} ranks on this host, or set launch.device = 'cpu'"
        return Finding("devices", "error", found, mend)
    return Finding("devices", "ok", kinds)
