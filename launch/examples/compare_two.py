"""One job under several strategies, on two processes each: verdict first, then what each costs."""

import hybrid

job = hybrid.load_job("launch/jobs/linear.toml", {"train.epochs": 1})
result = hybrid.compare(job, ["single", "ddp"], nproc=2, out="out/compare_two")

print("equal" if result.ok else "not equal")
for name, parity in result.parity.items():
    record = result.strategies[name]
    if parity.ok:
        sent = max(record.comm.bytes_per_step)
        print(f"{name}: loss differs by {parity.max_loss_diff:.1e}, {sent:.0f} bytes sent a step")
    else:
        print(f"{name}: {record.reason or parity.first_difference}")
