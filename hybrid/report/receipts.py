"""This module tells a receipt in sentences: what ran, as the live objects showed it.

Every key that a sentence here knows is told; the page shows all keys as they were recorded, too."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .formats import count, format_bytes, format_value, join_words

Evidence = Mapping[str, Any]


def tell_receipt(evidence: Evidence) -> list[str]:
    """Return the sentences for which the evidence has the figures.

    A strategy of one's own may record another kind of value under the same key; then there is no
    sentence of it, and the page still shows the value."""
    told: list[str] = []
    for keys, tell in _SENTENCES:
        if all(evidence.get(key) is not None for key in keys):
            with contextlib.suppress(TypeError, ValueError, KeyError, AttributeError):
                told.append(tell(evidence))
    return told


def _tell_replicas(found: Evidence) -> str:
    processes = count(found["replicas"], "process")
    size = count(found["parameters_per_replica"], "parameter")
    each = " each" if found["replicas"] > 1 else ""
    return f"{processes} held the whole model of {size}{each}."


def _tell_merges(found: Evidence) -> str:
    every = found["merge_every"]
    when = "after every step" if every == 1 else f"after every {format_value(every)} steps"
    times = count(found["merges"], "time")
    return f"Each stepped alone, and they averaged their parameters {when}, {times} in all."


def _tell_group(found: Evidence) -> str:
    hooks = found.get("comm_hooks") or []
    ranks = count(found["group_size"], "process")
    how = f"by the hook {join_words(hooks)}" if hooks else "without a communication hook"
    size = found.get("bucket_bytes")
    buckets = f", in buckets of at most {format_bytes(size)}" if size else ""
    return f"A {found['model']} averaged the gradients of {ranks} {how}{buckets}."


def _tell_shards(found: Evidence) -> str:
    kept = found.get("reshard_after_forward") or []
    share = f"rank 0 held {found['local_share']:.1%} of {found['elements_total']:,} elements"
    units = f"; {sum(kept)} of {len(kept)} units freed their parameters after the forward pass"
    if outside := found.get("elements_outside_units"):
        units += f", {outside:,} elements are outside units"
    when = found.get("gradients_reduced")
    return (
        f"{found['dtensor_parameters']} of {count(found['parameters'], 'parameter tensor')} were "
        f"DTensors on a mesh of {_tell_mesh(found.get('mesh'))}; {share}{units if kept else ''}"
        f"{f'; gradients were reduced in {when}' if when else ''}."
    )


def _tell_mesh(mesh: Any) -> str:
    return " x ".join(map(str, mesh)) if isinstance(mesh, Sequence) else format_value(mesh)


def _tell_partitions(found: Evidence) -> str:
    total = found["elements_total"]
    masters = _tell_range(found["master_elements_by_rank"])
    held = _tell_range(found["parameter_elements_by_rank"])
    gradients = "partitioned" if found.get("gradients_partitioned") else "kept whole"
    when = found.get("gradients_reduced")
    return (
        f"DeepSpeed ran ZeRO stage {found['zero_stage']}: of {total:,} elements each rank held the "
        f"optimizer's copy of {masters} and the parameters of {held}; gradients were {gradients}"
        f"{f' and reduced in {when}' if when else ''}."
    )


def _tell_range(sizes: Sequence[int]) -> str:
    low, high = min(sizes), max(sizes)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _tell_stages(found: Evidence) -> str:
    first = [rank for rank in found.get("ranks") or [] if rank.get("column") == 0]
    parts = [
        f"stage {rank['stage']} held {_tell_layers(rank['layers'])} "
        f"({count(rank['parameters'], 'parameter')})"
        for rank in first
    ]
    columns = found["columns"]
    width = f" in {count(columns, 'column')}" if columns > 1 else ""
    if "zero_stage" in found:
        how = f"with ZeRO stage {found['zero_stage']}"
    else:
        how = f"by {found['schedule']} of {str(found['engine']).rpartition('.')[0]}"
    return (
        f"{count(found['stages'], 'stage')}{width}, {how}{': ' if parts else ''}{', '.join(parts)}."
    )


def _tell_layers(layers: Sequence[int]) -> str:
    low, high = min(layers, default=0), max(layers, default=0)
    if len(layers) == 1:
        return f"layer {low}"
    whole = len(layers) > 2 and list(layers) == list(range(low, high + 1))
    return f"layers {low} to {high}" if whole else f"layers {join_words([*map(str, layers)])}"


def _tell_samples(found: Evidence) -> str:
    digests = [digest for digest in found["sample_digest_by_rank"] if digest]
    different, reading = len(set(digests)), len(digests)
    if reading < 2:
        return f"{count(reading, 'rank')} read samples."
    share = "all different" if different == reading else f"only {different} of them different"
    return f"{count(reading, 'rank')} read samples, {share}."


_SENTENCES: tuple[tuple[tuple[str, ...], Callable[[Evidence], str]], ...] = (
    (("replicas", "parameters_per_replica"), _tell_replicas),
    (("merge_every", "merges"), _tell_merges),
    (("model", "group_size"), _tell_group),
    (("dtensor_parameters", "parameters", "local_share", "elements_total"), _tell_shards),
    (
        ("zero_stage", "elements_total", "master_elements_by_rank", "parameter_elements_by_rank"),
        _tell_partitions,
    ),
    (("stages", "columns", "zero_stage"), _tell_stages),
    (("compiled_graphs",), lambda found: f"{count(found['compiled_graphs'], 'graph')} compiled."),
    (("sample_digest_by_rank",), _tell_samples),
)
