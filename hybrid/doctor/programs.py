"""Which launchers there are, of which release, and whether they would start this Python."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from ..config import JobError
from ..environment import package_version
from .accelerate_files import judge
from .finding import Finding, run_program

# Ours by Python: the package, and how to call it whatever stands in PATH.
OF_PYTHON = {
    "torchrun": ("torch", "python -m torch.distributed.run"),
    "accelerate": ("accelerate", "python -m accelerate.commands.launch"),
    "deepspeed": ("deepspeed", "python -m deepspeed.launcher.runner"),
}
# The system's: how to ask for the version, and what it is good for.
OF_SYSTEM = {
    "mpirun": (("--version",), "install Open MPI or MPICH to start ranks with mpirun"),
    "srun": (("--version",), "nothing to do outside a SLURM cluster"),
    "pdsh": (("-V",), "install pdsh for the deepspeed launcher on several hosts"),
    "ssh": (("-V",), "install an ssh client for the deepspeed launcher on several hosts"),
    "numactl": (("--show",), "install numactl for `deepspeed --bind_cores_to_rank`"),
}


def check_launchers() -> Iterator[Finding]:
    """Every launcher that the toolkit can run under, and Accelerate's default configuration."""
    for name, (package, instead) in OF_PYTHON.items():
        yield _of_python(name, package_version(package), instead)
    for name, (words, good_for) in OF_SYSTEM.items():
        yield _of_system(name, words, good_for)
    yield from check_accelerate_config(accelerate_config())


def _of_python(name: str, version: str | None, instead: str) -> Finding:
    title = f"launcher {name}"
    path = shutil.which(name)
    beside = Path(sys.executable).parent / name
    if version is None:
        return Finding(title, "warning", "its package is not installed", "see the package above")
    if path is None:
        found = f"{version}; not in PATH"
        mend = f"call it as {beside}" if beside.exists() else f"call it as `{instead}`"
        return Finding(title, "warning", found, mend)
    if not beside.exists() or not os.path.samefile(path, beside):
        found = f"{version}; the one in PATH, {path}, is another Python's: its ranks would be too"
        return Finding(title, "warning", found, f"call it as `{instead}`")
    return Finding(title, "ok", f"{version} at {path}")


def _of_system(name: str, words: tuple[str, ...], good_for: str) -> Finding:
    title, path = f"launcher {name}", shutil.which(name)
    if path is None:
        return Finding(title, "ok", "not found; only some ways to launch need it", good_for)
    works, lines = run_program([path, *words])
    if not works:
        reason = lines[-1] if lines else "no answer"
        mend = "mend its settings, if it is to start ranks (SLURM_CONF for srun)"
        return Finding(title, "warning", f"{path} does not work: {reason}", mend)
    return Finding(title, "ok", f"{describe(name, lines)} at {path}")


def describe(name: str, lines: list[str]) -> str:
    """The release, from what a program prints about itself. MPICH's mpirun names no MPICH, but its
    process manager."""
    if name == "numactl" or not lines:  # numactl knows no option for its version
        return "works"
    if lines[0].startswith("HYDRA"):
        version = next((line.split()[-1] for line in lines if line.startswith("Version:")), "")
        return f"MPICH (Hydra) {version}".strip()
    return lines[0]


def accelerate_config() -> Path | None:
    """The file that `accelerate launch` takes where it is given none
    (accelerate/commands/config/config_args.py); None where there is none."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = Path(os.environ.get("HF_HOME", os.path.join(cache, "huggingface"))).expanduser()
    names = ("default_config.yaml", "default_config.json")
    files = [home / "accelerate" / name for name in names]
    return next((file for file in files if file.is_file()), None)


def check_accelerate_config(file: Path | None) -> Iterator[Finding]:
    """What such a file makes of `accelerate launch` without options."""
    name = "accelerate config"
    if file is None:
        yield Finding(name, "ok", "no default file")
        return
    try:
        found, traps = judge(file, str(file))
    except ModuleNotFoundError as error:  # no accelerate, whose source says what a file may hold
        yield Finding(name, "warning", str(error), "see the package above")
        return
    except JobError as error:
        yield Finding(name, "warning", str(error), "mend it, or write it anew: accelerate config")
        return
    if traps:
        what = "; ".join(trap for trap, _ in traps)
        yield Finding(name, "warning", f"{file}: {what}", "; ".join(mend for _, mend in traps))
    else:
        yield Finding(name, "ok", f"{file}: {found}")
