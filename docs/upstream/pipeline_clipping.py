"""DeepSpeed's pipeline clips all stages by the first stage's gradient norm alone (fp32, ZeRO-0).

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 pipeline_clipping.py

It needs torch and deepspeed alone, and runs on CPUs with gloo. Two stages of one linear layer each
take one step of SGD with gradient_clipping. The update of each stage is compared with that of torch
in one process, clipped by `torch.nn.utils.clip_grad_norm_`.
"""

import sys
import time
from collections.abc import Sequence

import deepspeed
import torch
from deepspeed.pipe import PipelineModule
from torch import nn

WIDTH, BATCH, RATE, CLIP = 8, 4, 1.0, 0.05
# Or DeepSpeed compiles a shared-memory all-reduce for a minute at its first start on a CPU.
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None


def make_layers() -> list[nn.Module]:
    """Two layers, the second with much larger gradients than the first."""
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)]
    with torch.no_grad():
        layers[1].weight.mul_(0.1)
    return layers


def norm_of(layers: Sequence[nn.Module]) -> float:
    """The norm of all gradients of some layers together."""
    return (
        torch.cat([p.grad.flatten() for layer in layers for p in layer.parameters()]).norm().item()
    )


deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
draw = torch.Generator().manual_seed(1)
x, y = torch.randn(BATCH, WIDTH, generator=draw), torch.randn(BATCH, 1, generator=draw)

whole = make_layers()
nn.functional.mse_loss(nn.Sequential(*whole)(x), y).backward()
norms = [norm_of(whole), norm_of(whole[:1]), norm_of(whole[1:])]
torch.nn.utils.clip_grad_norm_(nn.Sequential(*whole).parameters(), CLIP)

layers = make_layers()
model = PipelineModule(layers, num_stages=2, loss_fn=nn.functional.mse_loss)
stage = model.stage_id
before = layers[stage].weight.detach().clone()
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
engine, *_ = deepspeed.initialize(
    model=model,
    optimizer=optimizer,
    config={
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": 0},
        "steps_per_print": 10**9,
    },
)
engine.train_batch(data_iter=iter([(x, y)]))
update = (before - layers[stage].weight.detach()) / RATE
ratio = (update.norm() / whole[stage].weight.grad.norm()).item()
ratios = [None, None]
torch.distributed.all_gather_object(ratios, ratio)
if engine.global_rank == 0:
    print(f"torch {torch.__version__}, deepspeed {deepspeed.__version__}")
    print(f"gradient norm: all {norms[0]:.4f}, stage 0 {norms[1]:.4f}, stage 1 {norms[2]:.4f}")
    print(f"updates over the right ones: stage 0 {ratios[0]:.4f}, stage 1 {ratios[1]:.4f}")
    print(f"norm of all over norm of stage 0: {norms[0] / norms[1]:.4f}")
    print(f"get_global_grad_norm(): {engine.get_global_grad_norm()}")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
time.sleep(0.1)  # for gloo's threads to end (pytorch/pytorch#190489)
