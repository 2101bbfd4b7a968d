"""This module tells in two sentences what was run, with what and when."""

from typing import Any

from ..records import Comparison
from .costs import tell_processes
from .formats import count


def tell_job(comparison: Comparison) -> str:
    """Tell the model and its size, the data and the settings that every run shares."""
    job, size = comparison.job, find_model_size(comparison)
    train = job["train"]
    parameters = f" ({count(size, 'parameter')})" if size else ""
    steps = max((len(run.steps) for run in comparison.strategies.values()), default=0)
    return (
        f"{job['model']['name']}{parameters} on {job['data']['name']}, {job['optimizer']['name']}, "
        f"global batch {train['global_batch']}, {train['precision']}, seed {train['seed']}, "
        f"{count(steps, 'optimizer step')}; {tell_processes(comparison)}."
    )


def tell_tool(comparison: Comparison) -> str:
    """Tell the tool, its version, the date and the machine, as far as they were recorded."""
    machine: dict[str, Any] = comparison.machine
    packages = machine.get("packages") or {}
    tool = f"hybrid {packages.get('hybrid') or ''}".strip()
    date = str(machine.get("date") or "")[:10]
    mark = f"comparison {comparison.id}" if comparison.id else ""
    cores, processor = machine.get("cores"), machine.get("processor")
    place = f"{count(cores, 'core')} of {processor}" if isinstance(cores, int) else ""
    engines = [
        f"{name} {packages[name]}"
        for name in ("torch", "accelerate", "deepspeed")
        if packages.get(name)
    ]
    return f"{', '.join(filter(None, [tool, date, place, *engines, mark]))}."


def find_model_size(comparison: Comparison) -> int | None:
    """Return the number of parameters of the whole model, as a receipt of a run has it."""
    for run in comparison.strategies.values():
        evidence = run.receipt.evidence if run.receipt else {}
        for key in ("parameters_per_replica", "elements_total"):
            if isinstance(evidence.get(key), int):
                return evidence[key]
    return None
