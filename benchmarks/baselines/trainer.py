"""transformers' Trainer on the same model and samples; its loop is its own.

It loads its data in each step, so it is compared with the hand-written loop that does so too.
"""

import tempfile
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, default_collate
from transformers import Trainer, TrainerCallback, TrainingArguments

from .driven import Driven, OnStep
from .workloads import TOTAL_STEPS, Workload, make_samples

STRATEGIES = ("single", "ddp")


class WithLoss(nn.Module):
    """Returns the loss beside the output, which is how a Trainer asks for it."""

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        self.layers, self.loss = nn.Sequential(*workload.layers()), workload.loss
        self.losses: list[torch.Tensor] = []

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Map inputs and targets to the loss and the outputs."""
        output = self.layers(inputs)
        loss = self.loss(output, labels)
        self.losses.append(loss.detach())
        return {"loss": loss, "logits": output}


class FixedOrder(Trainer):
    """Is a Trainer that takes its samples in the order of all other rows."""

    workload: Workload

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return torch's DataLoader over this rank's micro-batches."""
        samples = make_samples(self.workload.name)
        return DataLoader(samples, batch_sampler=self.workload.endless(), collate_fn=collate)


class Turns(TrainerCallback):
    """Gives the losses of each step away."""

    def __init__(self, on_step: OnStep, model: WithLoss) -> None:
        self.on_step, self.model = on_step, model

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Give the losses of one step away."""
        losses, self.model.losses = self.model.losses, []
        self.on_step(losses)


def collate(samples: list[Any]) -> dict[str, torch.Tensor]:
    """Name the parts of a batch as the model's arguments."""
    inputs, labels = default_collate(samples)
    return {"inputs": inputs, "labels": labels}


def make(workload: Workload, reads: bool = False) -> Driven:
    """Return the Trainer's loop, one step at a time; it reads its losses as its defaults say."""

    def loop(on_step: OnStep) -> None:
        model = WithLoss(workload)
        optimizer = workload.optimizer(model.parameters())
        arguments = TrainingArguments(
            output_dir=tempfile.mkdtemp(prefix="overhead-"),
            max_steps=TOTAL_STEPS,
            per_device_train_batch_size=workload.rows,
            gradient_accumulation_steps=workload.accumulation,
            max_grad_norm=workload.clip_norm,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            remove_unused_columns=False,
            ddp_find_unused_parameters=False,
            lr_scheduler_type="constant",
        )
        schedule = workload.schedule(optimizer)
        trainer = FixedOrder(
            model=model,
            args=arguments,
            train_dataset=make_samples(workload.name),
            optimizers=(optimizer, schedule),
            callbacks=[Turns(on_step, model)],
        )
        trainer.workload = workload
        trainer.train()

    return Driven(loop)
