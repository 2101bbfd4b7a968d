"""Plain DeepSpeed and nothing of the toolkit: it takes the files of `ds_configs/` as they are.

deepspeed --num_gpus 2 launch/examples/plain_deepspeed.py --deepspeed_config ds_configs/zero2.json
"""

import argparse
import itertools
import json
import time

import deepspeed
import torch
from deepspeed.pipe import PipelineModule
from torch import nn

STEPS = 20

parser = argparse.ArgumentParser()
parser.add_argument("--deepspeed_config", required=True)
parser.add_argument("--stages", type=int, default=0, help="pipeline and 2d: layers over stages")
parser.add_argument("--local_rank", type=int, help="set by the launcher")
arguments = parser.parse_args()

if not torch.cuda.is_available():
    # Or DeepSpeed compiles a shared-memory all-reduce for a minute at its first start on a CPU.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.init_distributed()

torch.manual_seed(0)
layers = [nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2)]
loss_function = nn.CrossEntropyLoss()
if arguments.stages:
    model = PipelineModule(layers, num_stages=arguments.stages, loss_fn=loss_function)
else:
    model = nn.Sequential(*layers)

# What the file leaves to the run. Left out, gradient_clipping is 1.0.
with open(arguments.deepspeed_config) as file:
    config = json.load(file)
config |= {
    "train_micro_batch_size_per_gpu": 8,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 0.0,
}
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

inputs = torch.randn(8 * 16, 20, generator=torch.Generator().manual_seed(1))
batches = itertools.cycle(zip(inputs.split(8), (inputs.sum(1) > 0).long().split(8), strict=True))
# Each data-parallel rank takes its own micro-batches; in a pipeline all stages of a column do.
share = engine.grid.get_data_parallel_id() if arguments.stages else engine.global_rank
batches = itertools.islice(batches, share, None, engine.dp_world_size)
for step in range(STEPS):
    if arguments.stages:
        loss = engine.train_batch(data_iter=batches)
    else:
        losses = []
        for data, target in itertools.islice(batches, engine.gradient_accumulation_steps()):
            losses.append(loss_function(engine(data.to(engine.device)), target.to(engine.device)))
            engine.backward(losses[-1])
            engine.step()
        loss = sum(losses) / len(losses)
    if engine.global_rank == 0 and step in (0, STEPS - 1):
        print(f"step {step}: loss {loss.item():.4f}")

deepspeed.comm.destroy_process_group()
# A moment for gloo's threads to let go of the last batch: later they would abort the process
# (https://github.com/pytorch/pytorch/issues/190489).
time.sleep(0.1)
