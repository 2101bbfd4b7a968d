"""Makes a model without values, and gives each rank the first values of what it holds.

`[model] on_meta = true` asks for it. Parameters are made on torch's meta device; buffers are made
as ever. A rank then fills what it is about to keep, one part of the model after another: a part is
a block, or one module outside the blocks. So no rank ever holds more than what it keeps and one
part, and no file has the whole model. Values come from the weights that the job names, else from
the `reset_parameters` of the modules (https://docs.pytorch.org/docs/stable/meta.html), under a
generator that is seeded by the job's seed and the name of the part. So they are the same under
every strategy, but not those of a model that is made whole."""

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import nn

from ..checkpoint.pieces import WEIGHT, Piece
from ..job.errors import JobError
from ..job.schema import Job
from .layers import Layers

KEY = "model.on_meta = true"
UNSET = {  # why a parameter has no value, by whether it was to be drawn
    False: "the weights have numbers there that are not finite",
    True: "no reset_parameters() of its module sets it; write one, name model.weights, or leave "
    "on_meta out",
}
Part = Sequence[nn.Module]  # modules that are filled together, each after those inside it

_making = [False]


def is_making() -> bool:
    """Tell whether a model is being made without values in this process."""
    return _making[0]


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Move each parameter to the meta device as a module takes it; one that is there stays itself.

    Accelerate's `init_empty_weights` does the same, but makes a new parameter of a tied one."""
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            with torch.no_grad():
                empty = torch.empty_like(param, device="meta")
            param = nn.Parameter(empty, param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    _making[0] = True
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
        _making[0] = False


class ByPart:
    """Fills the parts of a model that was made without values.

    read: reads named weights into pieces, and `close` ends that; None: the modules draw values."""

    def __init__(
        self,
        job: Job,
        layers: Layers,
        read: Callable[[Iterable[Piece]], None] | None = None,
        close: Callable[[], None] = lambda: None,
    ) -> None:
        self._seed, self._read, self._draw, self.close = job.train.seed, read, layers.draw, close
        self._names = {id(p): name for p, name in layers.names().items()}
        self._shapes = {id(p): p.shape for p in layers.names()}
        self._parts: dict[int, Part] = {}  # by the parameter's id
        for part in layers.parts():
            for parameter in _held(part):
                self._parts.setdefault(id(parameter), part)

    @torch.no_grad()
    def fill(self, parameters: Iterable[torch.Tensor]) -> None:
        """Fill each part of the model which has one of these without values.

        Raises JobError where a value is not finite, or nothing gives it."""
        for parameter in list(parameters):
            if parameter.is_meta:
                self._fill_part(self._parts[id(parameter)])

    def _fill_part(self, part: Part) -> None:
        empty = [p for p in _held(part) if p.is_meta and self._parts[id(p)] is part]
        for parameter in empty:
            values = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
            if parameter.is_floating_point():
                values.fill_(torch.nan)
            made = nn.Parameter(values, parameter.requires_grad)
            torch.utils.swap_tensors(parameter, made)
        if self._read is None:
            with self._others_aside(part, empty):
                self._reset(part, self._names[id(empty[0])])
        else:
            named = ((self._names[id(p)], p) for p in empty)
            self._read(Piece(name, WEIGHT, tuple(p.shape), p) for name, p in named)
        for parameter in empty:
            if bool(parameter.isnan().any()):
                name, drawn = self._names[id(parameter)], self._read is None
                raise JobError(f"{KEY}: {name}: {UNSET[drawn]}")

    def _reset(self, part: Part, name: str) -> None:
        seed = hashlib.sha256(f"{self._seed}\0{name}".encode()).digest()
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(int.from_bytes(seed[:8], "little") >> 1)
            for module in part:
                self._draw(module)

    @contextlib.contextmanager
    def _others_aside(self, part: Part, own: Sequence[nn.Parameter]) -> Iterator[None]:
        """Put parameters aside that another part draws: a tied one would be drawn once more."""
        aside = []
        for module in part:
            for name, parameter in module._parameters.items():
                if parameter is not None and not any(parameter is one for one in own):
                    aside.append((module, name, parameter))
                    shape = self._shapes.get(id(parameter), parameter.shape)  # ZeRO-3 empties them
                    module._parameters[name] = nn.Parameter(torch.empty(shape, device="meta"))
        try:
            yield
        finally:
            for module, name, parameter in aside:
                module._parameters[name] = parameter


def _held(part: Part) -> list[nn.Parameter]:
    """Return the parameters that the modules of a part have themselves, each once."""
    found = (p for module in part for p in module._parameters.values() if p is not None)
    return list(dict.fromkeys(found))


def require_resets(layers: Layers) -> None:
    """Require that the model's own code sets no parameter but by `reset_parameters` of its module.

    What it sets beside that would be lost. Each write counts up a parameter's version, also on the
    meta device. Raises JobError, which names the parameter."""
    made = {p: p._version for p in layers.names()}
    for part in layers.parts():
        for module in part:
            layers.draw(module)
    for parameter, name in layers.names().items():
        again = parameter._version - made[parameter]
        if not again:
            raise JobError(f"{KEY}: {name}: {UNSET[True]}")
        if made[parameter] > again:
            raise JobError(
                f"{KEY}: {name}: the model's code sets it outside reset_parameters() of its module "
                "too, which would be lost; set it there, name model.weights, or leave on_meta out"
            )
