"""This module finds out by trial how a module can be cut into stages; it knows no model by name.

A first forward pass shows which lists of blocks run once each, in order. A second detaches the
hidden state before each block and behind the last, and drops what else blocks return unless it has
a graph. The autograd graph of each detached piece shows what it uses beside the hidden state.
Parameters outside the blocks belong to the pieces that reach them. A piece that reaches into
another block forbids cuts. What leaves no graph, such as a mask made of an earlier hidden state,
shows in further passes, in which some blocks hand on what they got, as in a stage that does not
hold them. The others, and the code between, must make of the hidden states of the second pass what
they made of them there."""

import torch
from torch import nn

from .blocks import candidates, record_calls
from .passing import check_passing
from .pieces import Pieces, find_unused
from .plan import CutPlan
from .running import Run, make_twin, run_seeded, words

TRIED = 5  # so many runs of blocks at most
NO_LIST = "it has no nn.ModuleList or nn.Sequential whose modules run once each, in order"


def find_cut(model: nn.Module, run: Run) -> CutPlan:
    """Finds how to cut `model`, which stays as it was; `run` calls a copy on some samples.

    Of several ways, it takes the one that repeats fewest parameters on several stages. A run that
    raises, and a model that cannot be copied, cannot be cut."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        try:
            twin = make_twin(model)
            calls = record_calls(twin)
            output = run_seeded(run, twin)
        except Exception as error:  # a user's module may raise anything
            return CutPlan(f"a trial with two samples failed: {words(error)}")
        plans: list[CutPlan] = []
        for names in candidates(model, calls)[:TRIED]:
            pieces = Pieces(make_twin(model), names, find_unused(twin, names, output))
            plan = pieces.cut(run, output)
            plan.problem = plan.problem or check_passing(model, pieces, run, output)
            plans.append(plan)
            if plan.problem is None and not _count_copies(model, plan):
                break
    fitting = [plan for plan in plans if plan.problem is None]
    if fitting:
        return min(fitting, key=lambda plan: _count_copies(model, plan))
    return plans[-1] if plans else CutPlan(NO_LIST)


def _count_copies(model: nn.Module, plan: CutPlan) -> int:
    """Counts what a cut repeats: elements of parameters, for each further part that needs them.

    One that only the first part and the last share is tied, which takes no computing twice."""
    total = 0
    for name in {name for used in plan.used[1:-1] for name in used}:
        copies = sum(name in used for used in plan.used) - 1
        total += copies * model.get_parameter(name).numel()
    return total
