"""This module lists what a module is cut into, and makes its stages.

A stage is the module itself without what it does not need. Its lists keep their full length, but
the blocks of other stages lose their parameters and pass the hidden state on unchanged. The
module's own code around the blocks runs on every stage, on the real inputs of the micro-batch, so
that each has the masks and positions that its blocks take. Where a stage begins, the received
tensor replaces the hidden state. Where it ends, an exception leaves the forward pass, so that
nothing behind it runs. Only one float tensor goes from stage to stage."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ...data.loader import copied, load_micro_batch
from ...job.errors import first_line
from ..layers import Layers, children_first
from .blocks import find_blocks
from .calling import PLAIN, Calling
from .plan import CutPlan, Place, take_out
from .stages import hollow_out, make_stage, make_whole
from .trial import find_cut

BY_HAND = "to cut it by hand, return a list of layers, each of which takes what the last returned"
NO_VALUES = "model.on_meta = true: a module is cut by a trial, which needs values"
NO_SAMPLES = "a module is cut by a trial on its data, and no `samples` were given to open_engine"


class Holder(nn.Module):
    """Holds an element's parameters outside the blocks, and its block, if any."""

    def __init__(self, parameters: list[nn.Parameter], block: nn.Module | None = None) -> None:
        super().__init__()
        self.block = block
        self.parameters_outside = nn.ParameterList(parameters)


class ModuleLayers(Layers):
    """Lists as elements what comes before a module's blocks, each of them, and what follows them.

    Until `cut` has found how, and where it cannot be cut, the module is one element. Tensors have
    the names that the module gives them."""

    feeds_all_stages = True

    def __init__(
        self, model: nn.Module, calling: Calling = PLAIN, plan: CutPlan | None = None
    ) -> None:
        self.model, self.calling = model, calling
        self._names = find_blocks(model)
        super().__init__([model])
        self._sizes = super().sizes()
        self.plan = CutPlan()
        if plan:
            self._take(plan)

    def cut(self, samples: Sequence[Any] | None) -> None:
        """Finds how the module can be cut, by a trial on the first two of its train samples."""
        if self.plan.blocks or self.cut_problem:
            return
        if any(p.is_meta for p in self.model.parameters()):
            self.cut_problem = f"{NO_VALUES}; leave on_meta out, or {BY_HAND}"
            return
        if samples is None:
            self.cut_problem = f"{NO_SAMPLES}; or {BY_HAND}"
            return
        try:
            value = _two_inputs(samples)
        except Exception as error:  # a user's data set may raise anything
            return self._take(CutPlan(f"its data gave no two samples: {first_line(error)}"))

        def run(twin: nn.Module) -> Any:
            args, kwargs = self.calling.arguments(twin.forward, copied(value))
            return self.calling.output(twin(*args, **kwargs))

        plan = find_cut(self.model, run)
        if plan.problem:
            plan.problem = f"the model cannot be cut into stages: {plan.problem}; {BY_HAND}"
        self._take(plan)

    def _take(self, plan: CutPlan) -> None:
        self.plan, self.cut_problem = plan, plan.problem
        if not plan.problem:
            self[:] = self._elements()
            self._sizes = super().sizes()

    def _elements(self) -> list[nn.Module]:
        """Makes the elements, each with the parameters outside the blocks that it uses.

        Frozen ones, such as tables of sines, are in each element, since no graph tells which use
        them. Unused ones are in the first."""
        named = dict(self.model.named_parameters())
        blocks = self._planned()
        inside = {p for x in blocks for p in x.parameters()}
        unused = [named[name] for name in self.plan.unused if named[name] not in inside]
        frozen = [p for p in named.values() if not p.requires_grad and p not in inside]
        frozen = [p for p in frozen if all(p is not q for q in unused)]
        used = [[*(named[name] for name in names), *frozen] for names in self.plan.used]
        held = zip(blocks, used[1:-1], strict=True)
        return [
            Holder(used[0] + unused),
            *[Holder(outside, block) if outside else block for block, outside in held],
            Holder(used[-1]),
        ]

    def _planned(self) -> list[nn.Module]:
        return [self.model.get_submodule(block.name) for block in self.plan.blocks]

    def blocks(self) -> list[nn.Module]:
        """Lists the blocks between which the module is cut, and those of its other lists."""
        planned = [] if self.cut_problem else self._planned()
        inner = {m for x in planned for m in x.modules()}
        others = [self.model.get_submodule(name) for name in self._names]
        others = [x for x in others if inner.isdisjoint(x.modules())]
        return [*planned, *others] or [self.model]

    def units(self) -> list[nn.Module]:
        """Does what `Layers` promises: the blocks of all lists, whether or not it can be cut."""
        holders: dict[nn.Parameter, set[nn.Module]] = {}
        for module in self.model.modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    holders.setdefault(parameter, set()).add(module)
        units = []
        for block in self.blocks():
            own, inner = list(block.parameters()), set(block.modules())
            if block is not self.model and own and all(holders[p] <= inner for p in own):
                units.append(block)
        return units

    def parts(self) -> list[list[nn.Module]]:
        """Does what `Layers` promises: the blocks, and each module outside them by itself."""
        blocks = [block for block in self.blocks() if block is not self.model]
        inner = {m for block in blocks for m in block.modules()}
        others = [m for m in children_first(self.model) if m not in inner]
        return [*(children_first(block) for block in blocks), *([m] for m in others)]

    def modules(self) -> list[nn.Module]:
        """Does what `Layers` promises."""
        return list(self.model.modules())

    def tensors(self) -> dict[str, torch.Tensor]:
        """Does what `Layers` promises."""
        return {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}

    def saved_names(self) -> dict[str, str]:
        """Does what `Layers` promises."""
        names = {id(t): name for name, t in self.tensors().items()}
        saved = self.model.state_dict(keep_vars=True).items()
        return {name: names[id(t)] for name, t in saved if id(t) in names}

    def sizes(self) -> list[int]:
        """Does what `Layers` promises, also after `join` took the elements apart."""
        return self._sizes

    def buffer_owners(self) -> dict[str, int]:
        """Does what `Layers` promises: each stage has all buffers outside the blocks."""
        inner = {m for block in self._planned() for m in block.modules()}
        found = {}
        for name, module in self.model.named_modules():
            for key, _ in () if module in inner else module.named_buffers(recurse=False):
                full = f"{name}.{key}" if name else key
                found[full] = self.plan.moved.get(full, 0)
        return found

    def join(self, part: range) -> nn.Module:
        """Turns the module into a stage, as `Layers` promises, and frees what that does not need.

        The whole model takes inputs of micro-batches. A stage finds these in its `stage_inputs`
        and takes the hidden state of the stage before. The last returns the module's output. Raises
        ValueError where the model cannot be cut."""
        whole = len(part) == len(self)
        if not whole and (self.cut_problem or not self.plan.blocks):
            raise ValueError(self.cut_problem or NO_SAMPLES)
        absent = [] if whole else self._hollow(part)
        for element in self:
            if isinstance(element, Holder):  # the stage holds what it needs, and nothing twice
                element.block, element.parameters_outside = None, nn.ParameterList()
        if whole:
            return make_whole(self.model, self.calling, self.input_dtype)
        ends = part.stop == len(self)
        return make_stage(self.model, self.calling, self.input_dtype, self.plan, part, ends, absent)

    def _hollow(self, part: range) -> list[Place]:
        """Frees what `part` does not need, and returns where that was outside the blocks."""
        # In an evaluation torch's encoder would skip its layers' code, for what stages cannot pass.
        torch.backends.mha.set_fastpath_enabled(False)
        blocks = self._planned()
        own = {m for i, x in enumerate(blocks, 1) if i in part for m in x.modules()}
        keep = {p for i in part for p in self[i].parameters()}
        for i, module in enumerate(blocks, 1):
            if i not in part:
                others = [m for m in module.modules() if m not in own]  # `part` may share modules
                for place in take_out(others, keep):
                    place.module.__dict__[place.name] = torch.zeros(())  # some rescale all layers
                for inner in others:
                    inner._buffers.update(dict.fromkeys(inner._buffers))
                hollow_out(module, self.plan.blocks[i - 1])
        return take_out(self.model.modules(), keep)


def _two_inputs(samples: Sequence[Any]) -> Any:
    """Returns the first two inputs as one batch, or the first twice where these do not fit."""
    if len(samples) > 1:
        try:
            return load_micro_batch(samples, [0, 1], targets=False).input
        except Exception:  # such as lengths that vary; the first alone may raise it again
            pass
    return load_micro_batch(samples, [0], 2, targets=False).input
