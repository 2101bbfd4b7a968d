"""Keeps torch's vector functions from a wrong first answer."""

import torch


def call_vector_functions_once() -> None:
    """Call one of torch's vector functions on one thread, before several threads can.

    If two threads make the first call of a process together, MKL 2024.2 answers it wrongly on Intel
    CPUs with AVX-512, by 1e-4 in fp32 and 1e-8 in fp64: a table's index is read between two writes.
    One call settles all functions and types. Every command that computes calls this before it
    imports a user's module (https://github.com/pytorch/pytorch/issues/188792)."""
    torch.tanh(torch.zeros(1))
