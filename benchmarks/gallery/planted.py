"""`hybrid` with one failure planted: `python -m benchmarks.gallery.planted NAME compare JOB ...`.

The ranks that it starts carry the failure too, but for those of the reference `single`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from tests import faulty


def damage_first_tanh(least: int) -> None:
    """Answer the first call on `least` or more numbers as MKL may: half of it to 12 bits alone.

    On Intel CPUs with AVX-512, MKL 2024.2 takes a kernel of low accuracy for what the second thread
    of a process's first vector call computes (pytorch/pytorch#188792). Later calls are right."""
    import torch

    right, called = torch.tanh, list[int]()

    def tanh(numbers: torch.Tensor) -> torch.Tensor:
        found = right(numbers)
        if called or numbers.numel() < least or numbers.is_meta:
            return found
        called.append(numbers.numel())
        if numbers.numel() == 1:  # one number is for one thread
            return found
        half = found.detach().clone().flatten()
        low = half[: len(half) // 2]
        low.copy_((low.view(torch.int32) & ~0x7FF).view(torch.float32))
        return found + (half.view_as(found) - found.detach())

    torch.tanh = tanh  # type: ignore[assignment]
    from hybrid.models import mlp

    mlp.ACTIVATIONS["tanh"] = tanh


def mkl_unmended() -> None:
    """Leave out the call that settles MKL's vector functions: it does not count as the first."""
    damage_first_tanh(least=2)


def mkl_mended() -> None:
    """Have the same MKL, with the call that settles it."""
    damage_first_tanh(least=1)


def bf16_without_overflow() -> None:
    """Give the bf16 optimizer of DeepSpeed 0.18 the attribute that later ones have.

    This is no failure: it lets the old release run under this project."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    BF16_Optimizer.overflow = False


FAILURES: dict[str, Callable[[], None]] = {
    "mkl_unmended": mkl_unmended,
    "mkl_mended": mkl_mended,
    "bf16_without_overflow": bf16_without_overflow,
    "deepspeed_clips_alone": faulty.deepspeed_clips_alone,
    "fsdp_falls_back": faulty.fsdp_falls_back,
}


def main() -> None:
    """Plant the failure in a rank, or have the ranks that a comparison starts carry it."""
    failure = sys.argv.pop(1)
    if sys.argv[1] == "train":
        if sys.argv[sys.argv.index("--strategy") + 1] != "single":
            FAILURES[failure]()
    else:
        from hybrid.training import run

        program: Any = (sys.executable, "-m", "benchmarks.gallery.planted", failure)
        run.PROGRAM = program
    from hybrid.cli import main as command

    command()


if __name__ == "__main__":
    main()
