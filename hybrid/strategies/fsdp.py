"""This strategy is FSDP2 through Accelerate: it shards all training state, layer by layer.

It shards parameters, gradients and optimizer state (Zhao et al. 2023,
https://arxiv.org/abs/2304.11277; torch's `fully_shard`). With `parallel.replicate` and
`parallel.shard` the shards are replicated: hybrid sharding (HSDP)."""

from collections.abc import Mapping
from typing import Any

from ..engines.protocol import make_receipt
from ..job.schema import Job
from ..launch.placement import Placement
from ..layout import Layout, fill_degrees
from ..records import Receipt
from .protocol import Engine, Layers, Loss

name = "fsdp"
summary = "everything sharded (FSDP2); `reshard_after_forward`; replicate x shard"
modules = ("accelerate", "hybrid.engines.accelerated")


def layout(job: Job, nproc: int) -> Layout:
    """Share one copy among all processes, unless `parallel` says replicate x shard."""
    wanted = job.parallel
    names = "parallel.replicate x parallel.shard"
    replicate, shard = fill_degrees(nproc, wanted.replicate, wanted.shard, names)
    return Layout(dp=nproc, replicate=replicate, shard=shard)


def build(job: Job, placement: Placement, layers: Layers, loss: Loss) -> Engine:
    """Put the model under FSDP2, one unit a layer."""
    from ..engines.accelerated import AcceleratedEngine
    from ..engines.accelerator import prepare_fsdp

    prepared = prepare_fsdp(job, placement, layers, job.micro_batches(name))
    return AcceleratedEngine(job, placement, loss, prepared, _inspect, _gather, _scatter)


def _gather(engine: Any) -> dict[str, Any]:
    from ..engines.state import copy_of_state

    _reshard(engine.model)
    return copy_of_state(engine.model, keep=engine.accelerator.is_main_process)


def _reshard(model: Any) -> None:
    """Free gathered parameters: evaluation leaves those of the root gathered, and rounded."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _scatter(engine: Any, state: Mapping[str, Any]) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    _reshard(engine.model)
    options = StateDictOptions(full_state_dict=True, strict=True)
    set_model_state_dict(engine.model, dict(state), options=options)


def _inspect(engine: Any) -> Receipt:
    """Show that all parameters are DTensors, the sum of their shards, the mesh, and the units."""
    from ..engines.state import local_part
    from ..launch.exchange import gather_objects

    parameters = list(engine.model.parameters())
    sharded = [p for p in parameters if hasattr(p, "to_local")]
    total = sum(p.numel() for p in parameters)
    local = sum(local_part(p).numel() for p in parameters)
    by_rank = gather_objects(local)
    mesh = list(sharded[0].device_mesh.mesh.shape) if sharded else []
    asked = engine.job.strategy.fsdp.reshard_after_forward
    units = _list_units(engine.model)
    plugin = getattr(engine.accelerator.state, "fsdp_plugin", None)  # None if it fell back to DDP
    wrapped = plugin.transformer_cls_names_to_wrap if plugin else []
    evidence = {
        "model": type(engine.model).__name__,
        "distributed_type": str(engine.accelerator.distributed_type),
        "dtensor_parameters": len(sharded),
        "parameters": len(parameters),
        "elements_total": total,
        "elements_by_rank": by_rank,
        "local_share": local / total,
        "mesh": mesh,
        "units": len(units),
        "reshard_after_forward": [freed for _, freed in units],
        "sample_digest_by_rank": list(engine.digests),
    }
    lay = engine.layout
    wanted_mesh = [lay.replicate, lay.shard] if lay.replicate > 1 else [lay.shard]
    conditions = {
        "every parameter is a DTensor": len(sharded) == len(parameters),
        f"the mesh is {wanted_mesh}": mesh == wanted_mesh,
        f"the shards are the model {lay.replicate} times": sum(by_rank) == total * lay.replicate,
        f"reshard_after_forward is {asked} in every layer's unit": all(
            freed == asked for name, freed in units if name in wrapped
        ),
    }
    return make_receipt(evidence, conditions)


def _list_units(model: Any) -> list[tuple[str, bool]]:
    """List the FSDP units that have parameters, except the root.

    Each comes with the class it is made of, and whether it frees parameters after forward. torch
    leaves the root's gathered; in a transformers model, Accelerate leaves those of the last norm
    and the head gathered too. torch has a public setter for this, but no way to read it."""
    found = []
    for module in list(model.modules())[1:]:
        group = getattr(module, "_get_fsdp_state", lambda: None)()
        if group is not None and group._fsdp_param_group is not None:
            name = type(module).__name__.removeprefix("FSDP")
            found.append((name, bool(group._fsdp_param_group._reshard_after_forward)))
    return found
