"""This module tells where a run would train on a micro-batch of a single sample. No torch."""

from ...job.errors import Unsupported
from ...job.variants import Choice
from ...layout import Layout


def lone_samples(choice: Choice, layout: Layout, num_samples: int, layers: str) -> None:
    """Raise Unsupported if a micro-batch of a run has no second sample, which `layers` need.

    layers: the names of batch norms that have one value a channel and sample. Shares of a batch
    differ by one sample at most, and so do their micro-batches. Rows that pad one have no part in
    the statistics."""
    train, job = choice.job.train, choice.job
    micro_batches = job.micro_batches(choice.strategy)
    last = num_samples % train.global_batch
    per_epoch = -(-num_samples // train.global_batch)
    sizes = [min(train.global_batch, num_samples)]
    if last and (train.steps or per_epoch) >= per_epoch:
        sizes.append(last)
    for size in sizes:
        smallest = size // layout.dp // micro_batches
        if smallest < 2:
            what = f"{size} {'samples' if size > 1 else 'sample'}"
            held = "one sample" if smallest else "none or one sample"
            raise Unsupported(
                f"a batch of {what} in {layout.dp * micro_batches} micro-batches leaves one of "
                f"them {held}, and {layers} cannot be trained on a single one; choose "
                "train.global_batch and micro_batches so that each has two or more (the last batch "
                f"of an epoch of {num_samples} samples has {last or train.global_batch})"
            )
