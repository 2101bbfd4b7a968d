"""One job, one strategy, in this process: what a record holds."""

import hybrid

job = hybrid.load_job("launch/jobs/linear.toml", {"train.epochs": 1})
record = hybrid.train(job, "single")

for step in record.steps:
    print(f"step {step.step}: loss {step.loss:.4f}, gradient norm {step.grad_norm:.4f}")
print(f"test loss {record.eval.loss:.4f} on {record.eval.samples} samples")
