"""Optimizers and schedules of a user's own, named by import path in the tests' jobs."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

Groups = list[dict[str, Any]]


class Lion(Optimizer):
    """Steps by the sign of a moving mean (Chen et al. 2023, https://arxiv.org/abs/2302.06675)."""

    def __init__(
        self, params: Any, lr: float, betas: Any = (0.9, 0.99), weight_decay: float = 0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of each parameter."""
        for group in self.param_groups:
            lr, (one, two) = group["lr"], group["betas"]
            for p in group["params"]:
                state = self.state[p]
                mean = state.setdefault("mean", torch.zeros_like(p))
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(torch.sign(mean * one + p.grad * (1 - one)), alpha=-lr)
                mean.lerp_(p.grad, 1 - two)


class _Plain(Optimizer):
    """Adds `update(p, group)` to each parameter; knows no weight decay."""

    def __init__(self, params: Any, lr: float = 1e-3, **more: Any) -> None:
        super().__init__(params, {"lr": lr, **more})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of each parameter."""
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(self.update(p, group))

    def update(self, p: Any, group: dict[str, Any]) -> Any:
        """What is added to a parameter."""
        return p.grad * -group["lr"]


class ElementWise(_Plain):
    """Is none, whatever its name says: it steps by the ratio of two norms of a tensor, as LARS."""

    def update(self, p: Any, group: dict[str, Any]) -> Any:
        """What is added to a parameter."""
        return p.grad * (-group["lr"] * p.norm() / (p.grad.norm() + 1e-6))


class RowMeans(_Plain):
    """Divides by the mean of each row: right over rows, wrong over flat pieces."""

    def update(self, p: Any, group: dict[str, Any]) -> Any:
        """What is added to a parameter."""
        over = p.grad.abs().mean(-1, keepdim=True) if p.dim() > 1 else p.grad.abs()
        return p.grad / (over + 1e-6) * -group["lr"]


class ClipsLargeOnes(_Plain):
    """Bounds the norm of a tensor's gradient, which shows where gradients are large alone."""

    def update(self, p: Any, group: dict[str, Any]) -> Any:
        """What is added to a parameter."""
        return p.grad * -group["lr"] / p.grad.norm().div(20).clamp(min=1)


class AllTogether(_Plain):
    """Divides by the norm of all gradients."""

    def update(self, p: Any, group: dict[str, Any]) -> Any:
        """What is added to a parameter."""
        held = [q.grad.norm() for g in self.param_groups for q in g["params"]]
        return p.grad / torch.stack(held).norm() * -group["lr"]


class Noisy(_Plain):
    """Adds noise to gradients."""

    def update(self, p: Any, group: dict[str, Any]) -> Any:
        """What is added to a parameter."""
        return (p.grad + torch.randn_like(p)) * -group["lr"]


class OwnRate(_Plain):
    """Reads no rate."""

    def update(self, p: Any, group: dict[str, Any]) -> Any:
        """What is added to a parameter."""
        return p.grad * -0.1


class RateAtFirst(_Plain):
    """Reads the rate at its first step alone."""

    def update(self, p: Any, group: dict[str, Any]) -> Any:
        """What is added to a parameter."""
        return p.grad * -self.state[p].setdefault("lr", group["lr"])


class Rounded(_Plain):
    """Keeps its state in bf16."""

    def update(self, p: Any, group: dict[str, Any]) -> Any:
        """What is added to a parameter."""
        self.state[p]["mean"] = p.grad.bfloat16()
        return p.grad * -group["lr"]


class Still(_Plain):
    """Steps nothing."""

    def update(self, p: Any, group: dict[str, Any]) -> Any:
        """What is added to a parameter."""
        return torch.zeros_like(p)


class Explodes(_Plain):
    """Divides by zero."""

    def update(self, p: Any, group: dict[str, Any]) -> Any:
        """What is added to a parameter."""
        return p.grad / 0


class Remembers(_Plain):
    """Steps the tensors that it was made with, whatever its groups hold since."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr)
        self.own = [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of each parameter."""
        for p in self.own:
            p.add_(p.grad, alpha=-self.param_groups[0]["lr"])


class CountsAll(_Plain):
    """Keeps state that belongs to no parameter, some of it nested."""

    def update(self, p: Any, group: dict[str, Any]) -> Any:
        """What is added to a parameter."""
        shared = self.state["shared"]  # type: ignore[index]
        shared["seen"] = [torch.zeros(2), {"count": shared.get("count", 0)}]
        return p.grad * -group["lr"]


class Keeps(_Plain):
    """Keeps numbers of parameters, None, small tensors, and numbers in its groups."""

    def __init__(self, params: Any, lr: float, weight_decay: float = 0) -> None:
        super().__init__(params, lr, weight_decay=weight_decay, k=0, least=float("inf"))

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of each parameter, which its group counts."""
        super().step()
        for group in self.param_groups:
            group["k"] += 1
            if group["k"] > 2:
                group["weight"] = 1 / group["k"]
                group["least"] = 0.5

    def update(self, p: Any, group: dict[str, Any]) -> Any:
        """What is added to a parameter."""
        state = self.state[p]
        if not state:
            state |= {"count": 0, "share": 1.0, "odd": False, "best": None, "mean": p * 0}
        state["count"] += 1
        state["share"] *= 0.7
        state["odd"] = not state["odd"]
        if state["count"] > 3:  # made late
            late = state.setdefault("late", torch.zeros((), dtype=torch.float64))
            late += 0.1
        state["mean"].lerp_(p.grad, 0.3 * state["share"] + 0.1 * state["odd"])
        decay = p * group["weight_decay"]
        return (state["mean"] + decay) * (-group["lr"] / (1 + 0.01 * group["k"]))


class KeepsList(_Plain):
    """Keeps a list of each parameter."""

    def update(self, p: Any, group: dict[str, Any]) -> Any:
        """What is added to a parameter."""
        self.state[p].setdefault("history", []).append(float(p.grad.sum()))
        return p.grad * -group["lr"]


class ChangesList(_Plain):
    """Changes a list in its groups."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr, rates=[0.0])

    def update(self, p: Any, group: dict[str, Any]) -> Any:
        """What is added to a parameter."""
        group["rates"][0] += 1
        return p.grad * -group["lr"]


class RowsMean(_Plain):
    """Keeps a mean of each row, which FSDP2 cuts as it cuts the rows."""

    def update(self, p: Any, group: dict[str, Any]) -> Any:
        """What is added to a parameter."""
        rows = p.grad.abs().mean(-1, keepdim=True) if p.dim() > 1 else p.grad.abs()
        mean = self.state[p].setdefault("rows", torch.zeros_like(rows))
        mean.lerp_(rows, 0.5)
        return p.grad / (mean + 0.1) * -group["lr"]


class KeepsOwnRows(_Plain):
    """Keeps plain tensors of the rows that a rank has."""

    def update(self, p: Any, group: dict[str, Any]) -> Any:
        """What is added to a parameter."""
        local = p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad
        self.state[p]["mean"] = local.clone()
        return p.grad * -group["lr"]


def fails(groups: Groups) -> Optimizer:
    """Raise what nobody expects."""
    raise KeyError("no such thing")


def number(groups: Groups) -> int:
    """Return no optimizer."""
    return 3


def first_alone(groups: Groups, lr: float) -> Optimizer:
    """Leave out all parameters but one."""
    return torch.optim.SGD(groups[0]["params"][:1], lr)


def rates_of_its_own(groups: Groups, lr: float) -> Optimizer:
    """Step biases ten times as far."""
    held = [p for group in groups for p in group["params"]]
    by_axes = [{"params": [p for p in held if p.dim() == n]} for n in (1, 2)]
    return torch.optim.SGD([by_axes[0] | {"lr": lr * 10}, by_axes[1]], lr)


def regrouped(groups: Groups, lr: float) -> Optimizer:
    """Make groups by the number of axes."""
    held = [p for group in groups for p in group["params"]]
    return torch.optim.SGD([{"params": [p for p in held if p.dim() == n]} for n in (1, 2)], lr)


GIVEN: list[Groups] = []


def note(groups: Groups, lr: float, weight_decay: float, momentum: float = 0) -> Optimizer:
    """Note what it is given."""
    GIVEN.append([dict(group) for group in groups])
    return torch.optim.SGD(groups, lr, momentum=momentum, weight_decay=weight_decay)


def noam(step: int, total_steps: int, warmup: int) -> float:
    """Rise over some steps, then fall along a line."""
    return min((step + 1) / warmup, (total_steps - step) / total_steps)


def halves(step: int) -> float:
    """Halve in each step."""
    return 0.5**step


def turns_negative(step: int) -> float:
    """Give no rate from step 3 on."""
    return 2.0 - step


def no_number(step: int) -> str:
    """Give no rate at all."""
    return "fast"


CALLS = [0]


def other_each_time(step: int) -> float:
    """Depend on how often it was called."""
    CALLS[0] += 1
    return 1 / CALLS[0]
