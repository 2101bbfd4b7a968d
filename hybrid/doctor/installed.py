"""Checks which packages and launchers are installed, and whether they fit; imports none of them."""

import os
import platform
import shutil
import sys
import tomllib
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT, TimeoutExpired, run

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from ..job.errors import JobError
from ..job.known_bad import FIRST_RIGHT_PIPELINE
from ..launch.ops_cache import package_version
from .files import check_file
from .finding import Finding, warn_if

# The first good release, and what was wrong before.
KNOWN_WRONG = {
    "deepspeed": (
        FIRST_RIGHT_PIPELINE,
        "pipelines that accumulate train on wrong gradients (deepspeedai/DeepSpeed#7773, #8152)",
    ),
    "torch": (Version("2.10"), "torch.load has known holes even with weights_only=True"),
}
PROGRAM_S = 5.0  # what another program may take to name its version
# Python's launchers: the package, and how to call it whatever stands in PATH.
OF_PYTHON = {
    "torchrun": ("torch", "python -m torch.distributed.run"),
    "accelerate": ("accelerate", "python -m accelerate.commands.launch"),
    "deepspeed": ("deepspeed", "python -m deepspeed.launcher.runner"),
}
# The system's: how to ask for the version, and what it is good for.
OF_SYSTEM = {
    "mpirun": ("--version", "install Open MPI or MPICH to start ranks with mpirun"),
    "srun": ("--version", "nothing to do outside a SLURM cluster"),
    "pdsh": ("-V", "install pdsh for the deepspeed launcher on several hosts"),
    "ssh": ("-V", "install an ssh client for the deepspeed launcher on several hosts"),
    "numactl": ("--show", "install numactl for `deepspeed --bind_cores_to_rank`"),
}


def check_packages() -> Iterator[Finding]:
    """Check Python and every package that the toolkit needs."""
    yield Finding("python", "ok", f"{platform.python_version()} at {sys.executable}")
    for name, bounds in required().items():
        yield check_release(name, package_version(name), bounds)


def check_release(name: str, installed: str | None, bounds: SpecifierSet) -> Finding:
    """Check a package's release, which is None where the package is not installed."""
    wanted = ",".join(sorted(map(str, bounds), reverse=True))  # the lower bound first
    mend = f"pip install '{name}{wanted}'"
    if installed is None:
        return Finding(name, "error", f"not installed; needed: {wanted}", mend)
    first_good, problem = KNOWN_WRONG.get(name, (Version("0"), ""))
    try:
        wrong = Version(installed) < first_good
    except InvalidVersion:
        return Finding(
            name, "warning", f"{installed}: this is not a version that PEP 440 knows", mend
        )
    if wrong:
        found = f"{installed}: known to be wrong before {first_good}: {problem}"
        return Finding(name, "error", found, mend)
    broken = [b.operator for b in bounds if not b.contains(installed, prereleases=True)]
    if ">=" in broken:
        return Finding(name, "error", f"{installed}: too old; needed: {wanted}", mend)
    if broken:
        found = f"{installed}: newer than what this toolkit was tried with: {wanted}"
        return Finding(name, "warning", found, mend)
    return Finding(name, "ok", installed)


def required() -> dict[str, SpecifierSet]:
    """Read what pyproject.toml asks for, from the checkout or else from the installed package."""
    file = Path(__file__).parents[2] / "pyproject.toml"
    if file.exists():
        lines = tomllib.loads(file.read_text())["project"]["dependencies"]
    else:
        lines = metadata.requires("hybrid") or []
    found = [Requirement(line) for line in lines]
    return {r.name: r.specifier for r in found if r.marker is None}  # extras have a marker


def check_launchers() -> Iterator[Finding]:
    """Check every launcher that the toolkit runs under, and accelerate's default configuration."""
    for name, (package, instead) in OF_PYTHON.items():
        yield _of_python(name, package_version(package), instead)
    for name, (option, good_for) in OF_SYSTEM.items():
        yield _of_system(name, option, good_for)
    yield from check_accelerate_config(accelerate_config())


def _of_python(name: str, version: str | None, instead: str) -> Finding:
    title, path, mend = f"launcher {name}", shutil.which(name), f"call it as `{instead}`"
    beside = Path(sys.executable).parent / name
    if version is None:
        return Finding(title, "warning", "its package is not installed", "see the package above")
    if path is None:
        mend = f"call it as {beside}" if beside.exists() else mend
        return Finding(title, "warning", f"{version}; not in PATH", mend)
    if beside.exists() and os.path.samefile(path, beside):
        return Finding(title, "ok", f"{version} at {path}")
    found = f"{version}; the one in PATH, {path}, is another Python's: its ranks would be too"
    return Finding(title, "warning", found, mend)


def _of_system(name: str, option: str, good_for: str) -> Finding:
    title, path = f"launcher {name}", shutil.which(name)
    if path is None:
        return Finding(title, "ok", "not found; only some ways to launch need it", good_for)
    works, lines = run_program([path, option])
    if not works:
        reason = lines[-1] if lines else "no answer"
        mend = "correct its settings, if it is to start ranks (SLURM_CONF for srun)"
        return Finding(title, "warning", f"{path} does not work: {reason}", mend)
    return Finding(title, "ok", f"{describe(name, lines)} at {path}")


def run_program(command: Sequence[str]) -> tuple[bool, list[str]]:
    """Run a program for a few seconds; return whether it ended well, and the lines it printed."""
    try:
        done = run(command, stdin=DEVNULL, stdout=PIPE, stderr=STDOUT, timeout=PROGRAM_S)
    except (OSError, TimeoutExpired) as error:
        return False, [str(error)]
    lines = map(str.strip, done.stdout.decode(errors="replace").splitlines())
    return done.returncode == 0, list(filter(None, lines))


def describe(name: str, lines: list[str]) -> str:
    """Pick the release from what a program prints about itself."""
    if name == "numactl" or not lines:  # numactl knows no option for its version
        return "works"
    if lines[0].startswith("HYDRA"):  # MPICH's mpirun names its process manager alone
        version = next((line.split()[-1] for line in lines if line.startswith("Version:")), "")
        return f"MPICH (Hydra) {version}".strip()
    return lines[0]


def accelerate_config() -> Path | None:
    """Return the file that `accelerate launch` reads where it is given none, or None."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = Path(os.environ.get("HF_HOME", os.path.join(cache, "huggingface"))).expanduser()
    files = [home / "accelerate" / f"default_config.{ending}" for ending in ("yaml", "json")]
    return next(filter(Path.is_file, files), None)


def check_accelerate_config(file: Path | None) -> Iterator[Finding]:
    """Check what such a file makes of `accelerate launch` without options."""
    name = "accelerate config"
    if file is None:
        yield Finding(name, "ok", "no default file")
        return
    try:
        found, traps = check_file(file)
    except JobError as error:
        mend = "correct it, or write it anew: accelerate config"
        yield Finding(name, "warning", str(error), mend)
        return
    what = "; ".join(trap for trap, _ in traps) or found
    yield warn_if(bool(traps), name, f"{file}: {what}", "; ".join(mend for _, mend in traps))
