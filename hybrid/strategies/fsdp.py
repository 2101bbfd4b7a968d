"""This strategy is FSDP2 through Accelerate: it shards all training state, layer by layer.

It shards parameters, gradients and optimizer state (Zhao et al. 2023,
https://arxiv.org/abs/2304.11277; torch's `fully_shard`). With `parallel.replicate` and
`parallel.shard` the shards are replicated: hybrid sharding (HSDP)."""

from collections.abc import Mapping
from typing import Any

from ..engines.protocol import make_receipt
from ..engines.refusals import check_cuts, check_parameters
from ..job.schema import Job
from ..launch.placement import Placement
from ..layout import Layout, fill_degrees
from ..records import Receipt
from ..stages.checks import ModelSummary
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


def check(job: Job, layout: Layout, summary: ModelSummary) -> list[str]:
    """Refuse parameters that FSDP2 cannot shard, and an optimizer that cannot step shards."""
    empty = "FSDP2 cannot reduce its gradient; make it a buffer"
    check_parameters(summary, "FSDP2 shards along the first one", empty, trained=True)
    if layout.shard > 1:
        check_cuts(job, name, summary, ["rows"])
    return []


def build(job: Job, placement: Placement, layers: Layers, loss: Loss) -> Engine:
    """Put the model under FSDP2, one unit a layer."""
    from ..engines.accelerated import AcceleratedEngine
    from ..engines.accelerator import prepare_fsdp

    prepared = prepare_fsdp(job, placement, layers, job.micro_batches(name))
    return AcceleratedEngine(job, placement, loss, prepared, _inspect, _scatter)


def _scatter(engine: Any, state: Mapping[str, Any]) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    from ..engines.accelerated import reshard

    reshard(engine.model)
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
    evidence = {
        "model": type(engine.model).__name__,
        "distributed_type": str(engine.accelerator.distributed_type),
        "dtensor_parameters": len(sharded),
        "parameters": len(parameters),
        "elements_total": total,
        "elements_by_rank": by_rank,
        "local_share": local / total,
        "mesh": mesh,
        "gradients_reduced": "each micro-batch" if engine.syncs_each_batch else "each step",
    }
    lay = engine.layout
    wanted_mesh = [lay.replicate, lay.shard] if lay.replicate > 1 else [lay.shard]
    conditions = {
        "every parameter is a DTensor": len(sharded) == len(parameters),
        f"the mesh is {wanted_mesh}": mesh == wanted_mesh,
        f"the shards are the model {lay.replicate} times": sum(by_rank) == total * lay.replicate,
    }
    units, hold = _inspect_units(engine, total)
    samples = {"sample_digest_by_rank": list(engine.digests)}
    return make_receipt(evidence | units | samples, conditions | hold)


def _inspect_units(engine: Any, total: int) -> tuple[dict[str, Any], dict[str, bool]]:
    """Show which modules are units, and that they are those that were planned, as objects.

    torch leaves the root's parameters gathered after the forward pass. In a transformers model
    Accelerate makes further units, of the embedding and of the last norm with the head, and leaves
    those of the latter gathered too. torch has a public setter for this, but no way to read it."""
    model, asked = engine.model, engine.job.strategy.fsdp.reshard_after_forward
    planned = [unit for unit in engine.units if unit is not model]
    groups = {m: group for m in list(model.modules())[1:] if (group := _group_of(m))}
    alone = [m for m in planned if m in groups]
    others = [m for m in groups if m not in set(planned)]
    inside = {id(p): p._orig_size.numel() for g in groups.values() for p in g.fsdp_params}
    evidence = {
        "units": len({id(group) for group in groups.values()}),
        "planned_units": len(planned),
        "other_units": [type(m).__name__.removeprefix("FSDP") for m in others],
        "elements_outside_units": total - sum(inside.values()),
        "reshard_after_forward": [bool(g._reshard_after_forward) for g in groups.values()],
    }
    wanted = sum({id(p): p.numel() for m in planned for p in m.parameters()}.values())
    held = {id(p): p._orig_size.numel() for m in alone for p in groups[m].fsdp_params}
    return evidence, {
        f"each of {len(planned)} layers is a unit": len({id(groups[m]) for m in alone})
        == len(planned),
        "each layer's parameters are in its unit": sum(held.values()) == wanted,
        "no other module is a unit": not others or hasattr(model, "base_model_prefix"),
        f"reshard_after_forward is {asked} in every layer's unit": all(
            groups[m]._reshard_after_forward == asked for m in alone
        ),
    }


def _group_of(module: Any) -> Any:
    """Return the group of parameters that FSDP2 gathers for a module; None: it is no unit."""
    state = getattr(module, "_get_fsdp_state", lambda: None)()
    return state and state._fsdp_param_group
