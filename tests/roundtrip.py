"""One rank of test_state.py: an engine of one's own loop gives its state, takes another, and steps.

roundtrip.py JOB STRATEGY OUT     (ranks by the usual variables)
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import save_file

import hybrid
from hybrid.launch.placement import find_placement
from hybrid.training.evaluation import evaluate


def main(job_file: str, strategy: str, out: str) -> None:
    """Evaluate, halve every weight through `state` and `load`, take two steps, leave the weights in
    OUT."""
    job = hybrid.load_job(job_file)
    samples, tests = hybrid.build_data(job)
    engine = hybrid.open_engine(job, strategy, *hybrid.build_model(job))
    shared = [{name: t * 0.5 for name, t in engine.state().items()}]
    if dist.is_initialized():
        dist.broadcast_object_list(shared, src=0)
    evaluate(engine, tests, job, job.micro_batches(strategy))  # FSDP2 leaves parameters gathered
    engine.load(shared[0])
    for name, tensor in engine.state().items():
        assert tensor.equal(shared[0][name]), name
    cuts = job.micro_batches(strategy)
    plan = hybrid.BatchPlan(len(samples), job.train.global_batch, engine.layout.dp, cuts, 0)
    for step in range(2):
        ids = [i for share in engine.shares for i in plan.micro_batch_ids(step, share)]
        engine.train_step(
            [hybrid.load_micro_batch(samples, i, engine.micro_batch_size) for i in ids]
        )
    state = engine.state()
    if find_placement().rank == 0:
        save_file(state, Path(out) / "after.safetensors")
    engine.close()
    hybrid.cleanup()


if __name__ == "__main__":
    main(*sys.argv[1:])
