"""The workloads that every row of `benchmarks.overhead` trains, and the job that names each.

A row is given one `Workload`: layers, loss, optimizer, schedule and this rank's micro-batches. The
names in the job (`build`, `data_sets`) are the same functions, so that all rows train alike.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

STRATEGIES = ("single", "ddp", "local_sgd", "fsdp", "zero1", "zero2", "zero3", "pipeline", "2d")
STRATEGIES += ("pipeline_torch",)  # a variant of the job
STAGES = {"pipeline": 2, "pipeline_torch": 2, "2d": 2}
PIPELINE_MICRO_BATCHES = 4
SYNC_EVERY = 1  # merged after every step, as in launch/jobs/mnist.toml
COMPARED = 5  # the first steps, whose losses must be equal
LOG_EVERY = 10  # hybrid's rows read their numbers so often, but for those that read every step
TOTAL_STEPS = 1_000_000  # the schedule's length; no row takes so many
NUM_SAMPLES = 5_200  # divides by every batch, so that no step is a part of one
CONTEXT, VOCABULARY = 128, 257

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Shape:
    """Holds what one workload trains with; `optimizer` is the section of the job."""

    batch: int
    micro_batches: int
    optimizer: dict[str, Any]
    cosine: bool = False
    clip_norm: float = 0.0


SHAPES = {
    "trivial": Shape(8, 1, {"name": "sgd", "lr": 0.01}),
    "mnist": Shape(100, 2, {"name": "sgd", "lr": 0.2, "momentum": 0.5}, cosine=True),
    "gpt": Shape(
        16,
        4,
        {"name": "adamw", "lr": 3e-4, "betas": [0.9, 0.95], "weight_decay": 0.1},
        cosine=True,
        clip_norm=1.0,
    ),
    "stack": Shape(8, 1, {"name": "sgd", "lr": 1e-5}),  # 400 linear layers diverge above 1e-3
}


def make_layers(name: str, pipelined: bool) -> list[nn.Module]:
    """Make the layers of a workload, the same in every process."""
    torch.manual_seed(0)
    if name == "trivial":
        return [nn.Linear(8, 8), nn.Linear(8, 2)] if pipelined else [nn.Linear(8, 2)]
    if name == "mnist":
        from hybrid.models.mlp import mlp

        return mlp(sizes=[784, 512, 256, 128, 10], activation="tanh", init="xavier")[0]
    if name == "gpt":
        from hybrid.models.gpt import gpt

        return gpt(preset="10m", context=CONTEXT)[0]
    layers = [nn.Linear(8, 8) for _ in range(400)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight)  # else gradients vanish on the way through 400 layers
    return list(layers)


def make_samples(name: str) -> TensorDataset:
    """Draw the samples of a workload, the same in every process."""
    draw = torch.Generator().manual_seed(1)
    if name == "gpt":
        ids = torch.randint(VOCABULARY, (NUM_SAMPLES, CONTEXT + 1), generator=draw)
        return TensorDataset(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
    features, classes = {"trivial": (8, 2), "mnist": (784, 10), "stack": (8, 8)}[name]
    inputs = torch.rand(NUM_SAMPLES, features, generator=draw)
    return TensorDataset(inputs, torch.randint(classes, (NUM_SAMPLES,), generator=draw))


def read(losses: Sequence[torch.Tensor], norm: torch.Tensor | float) -> float:
    """Read the gradient norm and the mean of the micro-batches' losses; return the latter."""
    float(norm)
    return torch.stack([loss.detach() for loss in losses]).mean().item()


def due_once_in(steps: int) -> Iterator[bool]:
    """Tell of each step whether it reads its numbers: one in so many does, 0: none."""
    return (bool(steps) and step % steps == 0 for step in itertools.count(1))


def build(name: str, pipelined: bool) -> Any:
    """Make the model of the job: layers and loss, as hybrid takes them."""
    from hybrid.models.losses import cross_entropy

    return make_layers(name, pipelined), cross_entropy


def data_sets(name: str) -> tuple[TensorDataset, TensorDataset]:
    """Make the data of the job: a train set, and a test set that no row comes to."""
    return make_samples(name), TensorDataset(*make_samples(name)[:8])


@dataclasses.dataclass(frozen=True)
class Workload:
    """Holds one workload under one strategy, as one rank sees it.

    loading: each step loads its micro-batches, by `index` from the tensors or by torch's
    `dataloader`; where it is empty they are made once, and every step takes the same ones."""

    name: str
    strategy: str
    rank: int = 0
    world_size: int = 1
    loading: str = ""

    @property
    def shape(self) -> Shape:
        return SHAPES[self.name]

    @property
    def stages(self) -> int:
        return STAGES.get(self.strategy, 1)

    @property
    def columns(self) -> int:
        """Return the number of data-parallel ranks."""
        return self.world_size // self.stages

    @property
    def column(self) -> int:
        """Return this rank's data-parallel rank; ranks of one stage are neighbours."""
        return self.rank % self.columns

    @property
    def accumulation(self) -> int:
        """Return the micro-batches of a step on each data-parallel rank."""
        return PIPELINE_MICRO_BATCHES if self.stages > 1 else self.shape.micro_batches

    @property
    def rows(self) -> int:
        """Return the samples of a micro-batch, rounded up where the batch does not divide."""
        return -(-self.shape.batch // (self.columns * self.accumulation))

    @property
    def batch(self) -> int:
        """Return the samples of a step over all ranks: 104 for MNIST under 2d, else the shape's."""
        return self.rows * self.columns * self.accumulation

    @property
    def num_targets(self) -> int:
        """Return the targets of a step over all ranks."""
        return self.batch * (CONTEXT if self.name == "gpt" else 1)

    @property
    def clip_norm(self) -> float:
        """Return the greatest gradient norm, 0 where nothing clips.

        DeepSpeed's pipeline without ZeRO clips each stage by a norm of its own (0.19, in fp32), so
        that its own loop could not equal any other: nothing clips there, nor under torch's."""
        return 0.0 if self.strategy.startswith("pipeline") else self.shape.clip_norm

    def layers(self) -> list[nn.Module]:
        """Make the model's layers."""
        return make_layers(self.name, self.stages > 1)

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy."""
        if self.name == "gpt":
            output, target = output.flatten(0, 1), target.flatten()
        return functional.cross_entropy(output, target)

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Make torch's optimizer with the job's settings: AdamW is fused, SGD has torch's default.
        These are the settings that hybrid gives it."""
        options = {key: value for key, value in self.shape.optimizer.items() if key != "name"}
        if self.shape.optimizer["name"] == "adamw":
            return torch.optim.AdamW(parameters, **options, fused=True)
        return torch.optim.SGD(parameters, **options)

    def schedule(self, optimizer: torch.optim.Optimizer) -> Any:
        """Make the learning rate's schedule, None where it is constant."""
        if not self.shape.cosine:
            return None
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, TOTAL_STEPS)

    def micro_batches(self) -> Callable[[], Iterable[Pair]]:
        """Return a function that gives this rank's micro-batches of the next step."""
        if self.loading == "dataloader":
            loader = iter(self.loader())
            return lambda: itertools.islice(loader, self.accumulation)
        if self.loading == "index":
            inputs, targets = make_samples(self.name).tensors
            ids = itertools.cycle([torch.tensor(ids) for ids in self.order()])
            rows = ((inputs[here], targets[here]) for here in ids)
            return lambda: itertools.islice(rows, self.accumulation)
        pairs = [(inputs, targets) for inputs, targets, _ in self.fixed()]
        return lambda: pairs

    def fixed(self) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Make the micro-batches that each step takes: inputs, targets and the samples' ids."""
        inputs, targets = make_samples(self.name).tensors
        first = self.column * self.accumulation * self.rows
        ids = torch.arange(first, first + self.accumulation * self.rows).split(self.rows)
        return [(inputs[i].clone(), targets[i].clone(), i) for i in ids]

    def loader(self) -> DataLoader[Any]:
        """Make torch's DataLoader over this rank's micro-batches, without end."""
        return DataLoader(make_samples(self.name), batch_sampler=self.endless())

    def endless(self) -> Iterator[list[int]]:
        """Yield the ids of this rank's micro-batches without end."""
        return itertools.cycle(self.order())

    def order(self) -> list[list[int]]:
        """Return the ids of this rank's micro-batches in one epoch, in hybrid's order.
        Losses are compared; a hand-written loop would draw a permutation by itself."""
        from hybrid import BatchPlan

        plan = BatchPlan(NUM_SAMPLES, self.batch, self.columns, self.accumulation, 0)
        steps = range(plan.steps_per_epoch)
        return [ids for step in steps for ids in plan.micro_batch_ids(step, self.column)]

    def deepspeed_config(self, stage: int) -> dict[str, Any]:
        """Return DeepSpeed's configuration, with buckets as large as hybrid makes them.

        The buckets decide how many collectives there are; DeepSpeed's default of 5e8 elements is
        larger than any of these models."""
        layers = self.layers()
        largest = max(count_elements([layer]) for layer in layers)
        bucket = max(count_elements(layers) // 16, 2**18)
        bucket += bucket % 2
        zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": bucket, "overlap_comm": False}
        if stage in (1, 2):
            zero["allgather_bucket_size"] = bucket
        if stage == 3:
            zero |= {"stage3_prefetch_bucket_size": largest, "stage3_max_reuse_distance": 0}
            zero["stage3_max_live_parameters"] = largest
        return {
            "zero_optimization": zero,
            "train_batch_size": self.batch,
            "train_micro_batch_size_per_gpu": self.rows,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": self.clip_norm,
            "zero_allow_untested_optimizer": True,  # SGD is not on DeepSpeed's list
            "steps_per_print": 10**9,
        }

    def job(self, log_every: int = LOG_EVERY) -> dict[str, Any]:
        """Return the job of this workload for hybrid, which reads its numbers so often."""
        pipelined = {"name": self.name, "pipelined": self.stages > 1}
        return {
            "model": {"name": f"{__name__}:build", "options": pipelined},
            "data": {"name": f"{__name__}:data_sets", "options": {"name": self.name}},
            "optimizer": self.shape.optimizer,
            "schedule": {"name": "cosine" if self.shape.cosine else "constant"},
            "train": {
                "global_batch": self.batch,
                "micro_batches": self.accumulation,
                "steps": TOTAL_STEPS,
                "clip_norm": self.clip_norm,
            },
            "log": {"every": log_every},
            "strategy": {
                "local_sgd": {"sync_every": SYNC_EVERY},
                # As the loop by hand: once a step. The default is after each micro-batch.
                "fsdp": {"sync_each_batch": False},
            },
            "variant": {"pipeline_torch": {"strategy": "pipeline", "engine": "torch"}},
        }


def count_elements(layers: Iterable[nn.Module]) -> int:
    """Count the elements of the parameters of all layers, shared ones once."""
    return sum(p.numel() for p in {p for layer in layers for p in layer.parameters()})
