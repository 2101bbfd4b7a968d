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

NO_LIST = "it has no nn.ModuleList or nn.Sequential whose modules run once each, in order"


def find_cut(model: nn.Module, run: Run) -> CutPlan:
    """Finds how to cut `model`, which stays as it was; `run` calls a copy on some samples.

    A run that raises, and a model that cannot be copied, cannot be cut."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        try:
            twin = make_twin(model)
            calls = record_calls(twin)
            output = run_seeded(run, twin)
        except Exception as error:  # a user's module may raise anything
            return CutPlan(f"a trial with two samples failed: {words(error)}")
        plans: list[CutPlan] = []
        for names in candidates(model, calls):
            pieces = Pieces(make_twin(model), names, find_unused(twin, names, output))
            plan = pieces.cut(run, output)
            plan.problem = plan.problem or check_passing(model, pieces, run, output)
            if plan.problem is None:
                return plan
            plans.append(plan)
        return plans[-1] if plans else CutPlan(NO_LIST)
