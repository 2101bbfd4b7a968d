"""One's own layers, data and loop; the toolkit gives the engine. A launcher starts the ranks."""

import sys

import torch

import hybrid

STRATEGY = sys.argv[1] if len(sys.argv) > 1 else "fsdp"
STEPS = 20

torch.manual_seed(0)  # every rank makes the same samples and the same layers
inputs = torch.randn(600, 20)
samples = list(zip(inputs, (inputs.sum(1) > 0).long(), strict=True))
samples, test_samples = samples[:500], samples[500:]
layers = [torch.nn.Linear(20, 32), torch.nn.Tanh(), torch.nn.Linear(32, 2)]

sections = {
    "model": {"name": "own"},  # not looked at: the layers are given below
    "data": {"name": "own"},
    "optimizer": {"name": "adamw", "lr": 0.01},
    "train": {"global_batch": 60, "micro_batches": 2, "steps": STEPS},
    "strategy": {"local_sgd": {"sync_every": 5}},  # in steps: an engine does not know epochs
}
job = hybrid.load_job(sections)
engine = hybrid.open_engine(job, STRATEGY, layers, hybrid.cross_entropy)
plan = hybrid.BatchPlan(
    num_samples=len(samples),
    global_batch=job.train.global_batch,
    shares=engine.layout.dp,
    micro_batches=job.train.micro_batches,
    seed=job.train.seed,
)
for step in range(STEPS):
    micro_batches = [
        hybrid.load_micro_batch(samples, ids, engine.micro_batch_size)
        for share in engine.shares
        for ids in plan.micro_batch_ids(step, share)
    ]
    result = engine.train_step(micro_batches)
test = hybrid.evaluate(engine, test_samples, job)  # each test sample once, over all ranks
receipt = engine.receipt()
weights = engine.state()  # whole tensors on rank 0, nothing elsewhere
if weights:
    print(f"{STRATEGY}: loss {result.loss:.4f} after {STEPS} steps, engaged: {receipt.engaged}")
    print(f"test loss {test.loss:.4f}, accuracy {test.accuracy:.2f} of {test.samples} samples")
engine.close()
hybrid.cleanup()
