"""Cores, shared memory, limits, compiler and the JIT cache of this host. No torch."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from .. import jit_cache
from ..environment import CGROUP_QUOTA, cgroup_cores, num_cores
from ..threads import cores_of_all
from .finding import Finding

ENOUGH_SHARED = 2**30  # bytes; a container gets 64 MiB unless told otherwise
ENOUGH_FILES = 1024  # a rank has sockets to every peer in every group, and its libraries' files
RDMA = Path("/sys/class/infiniband")


def check_machine() -> Iterator[Finding]:
    """What runs need of the host, whichever devices it has."""
    cores = num_cores()
    yield check_cores(cores, cgroup_cores(CGROUP_QUOTA))
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 0))
    together = cores_of_all() if ranks else cores
    yield check_threads(together, ranks, os.environ.get("OMP_NUM_THREADS"))
    if Path("/dev/shm").is_dir():
        yield check_shared_memory(shutil.disk_usage("/dev/shm").total)
    if sys.platform != "win32":
        yield from _limits()
    yield _compiler()
    yield from check_jit_cache(jit_cache.folder())


def check_cores(cores: int, quota: float | None) -> Finding:
    """Cores that runs count with; a container's time is what counts where it has less."""
    limit = "" if quota is None else f", with the time of {quota:g} in this container"
    return Finding("cores", "ok", f"{cores}{limit}")


def check_threads(cores: int, ranks: int, setting: str | None) -> Finding:
    """OMP_NUM_THREADS for that many ranks on this host, 0 where no launcher started any."""
    share = max(1, cores // max(1, ranks))
    shown = "OMP_NUM_THREADS is not set" if setting is None else f"OMP_NUM_THREADS={setting}"
    mend = f"OMP_NUM_THREADS={share}"
    if setting is not None and not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", setting):
        return Finding("threads", "warning", f"{shown}: not a number, and ignored", mend)
    if not ranks:
        note = "" if setting else ": each rank gets its share of the cores"
        return Finding("threads", "ok", f"{shown}{note}")
    threads = int(setting.split(",")[0]) if setting else share  # as `hybrid.threads` does
    found = f"{ranks} ranks of {threads} threads on {cores} cores ({shown})"
    if ranks > cores and threads == 1:
        mend = f"start at most {cores} ranks on this host"
        return Finding("threads", "warning", f"{found}: ranks share cores", mend)
    if ranks * threads > max(cores, ranks):
        return Finding("threads", "warning", f"{found}: more than cores, many times slower", mend)
    return Finding("threads", "ok", found)


def check_shared_memory(size: int) -> Finding:
    """/dev/shm, of `size` bytes: nccl's and data loaders' way between processes of one host."""
    found = f"/dev/shm has {size / 2**20:,.0f} MiB"
    if size < ENOUGH_SHARED:
        mend = "start the container with --shm-size=1g or more, or --ipc=host"
        return Finding("shared memory", "warning", found, mend)
    return Finding("shared memory", "ok", found)


def _limits() -> Iterator[Finding]:
    import resource

    def limit(name: int) -> float:
        soft, _ = resource.getrlimit(name)
        return float("inf") if soft == resource.RLIM_INFINITY else soft

    yield check_open_files(limit(resource.RLIMIT_NOFILE))
    rdma = RDMA.is_dir() and any(RDMA.iterdir())
    yield check_locked_memory(limit(resource.RLIMIT_MEMLOCK), rdma)


def check_open_files(limit: float) -> Finding:
    """RLIMIT_NOFILE (getrlimit(2))."""
    found = f"a process may have {limit:,.0f} open"
    if limit < ENOUGH_FILES:
        return Finding("open files", "warning", found, f"ulimit -n {ENOUGH_FILES} or more")
    return Finding("open files", "ok", found)


def check_locked_memory(limit: float, rdma: bool) -> Finding:
    """RLIMIT_MEMLOCK, in bytes; RDMA pins the buffers that it sends from."""
    shown = "unlimited" if limit == float("inf") else f"{limit / 2**20:,.1f} MiB"
    if not rdma:
        return Finding("locked memory", "ok", f"{shown}; matters with RDMA only, and none is here")
    if limit != float("inf"):
        mend = "ulimit -l unlimited, in /etc/security/limits.conf or the scheduler's own settings"
        return Finding("locked memory", "warning", f"{shown}: RDMA needs more", mend)
    return Finding("locked memory", "ok", shown)


def _compiler() -> Finding:
    path = next((p for p in map(shutil.which, ("g++", "c++", "clang++")) if p), None)
    if path is None:
        found = "none: train.compile, and ops that DeepSpeed compiles when offloading, do not work"
        return Finding("c++ compiler", "warning", found, "install g++, if a job needs these")
    return Finding("c++ compiler", "ok", path)


def check_jit_cache(folder: Path) -> Iterator[Finding]:
    """Stale locks, and ops of other releases, where torch compiles ops when they are first used."""
    name = "jit cache"
    stale = jit_cache.stale_locks(folder)
    ours = folder == jit_cache.private_folder()
    for lock in stale:
        mend = "nothing: the next run removes it" if ours else f"rm {lock}"
        found = f"{lock}: a build left it and is gone; what needs the op waits for ever"
        yield Finding(name, "warning", found, mend)
    foreign = [] if ours else list(foreign_ops(folder))
    for op, why in foreign:
        found = f"{op}: {why}: loading it may crash"
        yield Finding(name, "warning", found, f"rm -r {op}, or unset {jit_cache.VARIABLE}")
    if not stale and not foreign:
        yield Finding(name, "ok", f"{folder}{'' if folder.exists() else ', not made yet'}")


def foreign_ops(folder: Path) -> Iterator[tuple[Path, str]]:
    """Folders of DeepSpeed's ops that were built for another installation or an earlier release."""
    try:
        site = Path(str(metadata.distribution("deepspeed").locate_file(""))).resolve()
    except metadata.PackageNotFoundError:
        return
    installed = max((_when(name) for name in ("torch", "deepspeed")), default=0.0)
    for rules in [*folder.glob("*/build.ninja"), *folder.glob("*/*/build.ninja")]:
        found = re.search(r"(\S+)/deepspeed/ops/csrc/", rules.read_text(errors="replace"))
        if found and Path(found[1]).resolve() != site:
            yield rules.parent, f"built from another installation, {found[1]}"
        elif found and rules.stat().st_mtime < installed:
            yield rules.parent, "older than the installed torch and deepspeed"


def _when(package: str) -> float:
    """When a package was installed: its metadata are written then."""
    try:
        files = metadata.distribution(package).files or []
    except metadata.PackageNotFoundError:
        return 0.0
    record = next((f for f in files if f.name in ("RECORD", "METADATA")), None)
    path = Path(str(record.locate())) if record else None
    return path.stat().st_mtime if path and path.exists() else 0.0
