"""This module finds out how a causal language model of transformers can be cut into stages.

It knows no family by name, but runs three forward passes of ten tokens. The first finds the decoder
list: the `ModuleList` with the most parameters of those whose modules run once each, in order. The
second changes a token; in a causal model, earlier logits stay. The third detaches the hidden state
before each decoder layer and behind the last, and drops what else layers return unless it has a
graph. The autograd graph of each detached piece then shows what it uses beside the hidden state.
Parameters outside the list belong to the pieces that reach them; a piece that reaches into another
layer forbids cuts."""

import contextlib
import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ...job.errors import first_line

ROWS, TOKENS = 2, 5  # different numbers, so that a shape tells the batch from the time axis
TOLERANCE = 1e-4  # relative; the same arithmetic done twice differs by rounding at most


class NotOnMeta(Exception):
    """Says that the model must be built with real tensors, outside the meta device."""


@dataclass
class HFCutPlan:
    """Says how a model is cut into elements, with tensors by name.

    Element 0 is what comes before the decoder list, 1 to n are its layers, n + 1 is what follows.
    """

    problem: str | None = None  # why it cannot be cut
    path: str = ""  # of the decoder list; empty where none was found
    hidden: int | str = 0  # position or keyword by which decoder layers take the hidden state
    num_outputs: int | None = None  # of decoder layers that return a tuple
    batch_dim: int = 0  # of the hidden state; time comes next
    carries_ids: bool = False  # whether layers use token ids, or what was made of them, again
    used: list[list[str]] = field(default_factory=list)  # outside parameters, for each element
    unused: list[str] = field(default_factory=list)  # trainable, but nothing depends on them


def probe(model: nn.Module, vocab_size: int, pad_token: int | None) -> HFCutPlan:
    """Finds how to cut `model`, which stays as it was; its parameters may be on the meta device.

    Raises ValueError where it is not causal (not checked on meta), and NotOnMeta where it is on
    meta and its forward pass needs values."""
    known = [i for i in range(vocab_size) if i != pad_token]
    picked = [known[i % len(known)] for i in range(ROWS * TOKENS)]
    on_meta = any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    fake = FakeTensorMode(allow_non_fake_inputs=True) if on_meta else contextlib.nullcontext()
    with torch.random.fork_rng(devices=[]), fake, torch.device("cpu"), torch.enable_grad():
        ids = torch.tensor(picked).reshape(ROWS, TOKENS)
        twin = _twin(model)
        calls = _count_calls(twin)
        try:
            logits = _run(twin, ids)
        except Exception as error:  # a family's own code may raise anything
            if on_meta:
                raise NotOnMeta(_words(error)) from error
            return HFCutPlan(f"a trial with {ROWS} x {TOKENS} token ids failed: {_words(error)}")
        if not on_meta:
            _check_causal(_twin(model), ids, logits)
        path = _find_decoder_list(model, calls)
        if path is None:
            return HFCutPlan("it has no module list whose layers run once each, in order")
        unused = _find_unused(twin, path, logits)
        return _Pieces(_twin(model), path, ids, unused).cut(None if on_meta else logits)


def _run(twin: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    torch.default_generator.manual_seed(0)  # the same dropout each time
    return twin(input_ids=ids).logits


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def _twin(model: nn.Module) -> nn.Module:
    """Copies the model to run it, since some families keep state; parameters are shared.

    Tensors on meta become fake ones (https://docs.pytorch.org/docs/stable/torch.compiler_fake_tensor.html).
    They have no values either, but transformers knows not to look at them."""
    shared: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_meta:
            fake = torch.empty(tensor.shape, dtype=tensor.dtype)
            trained = isinstance(tensor, nn.Parameter)
            shared[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if trained else fake
        elif isinstance(tensor, nn.Parameter):
            shared[id(tensor)] = tensor
    twin: Any = copy.deepcopy(model, shared).train()
    if any(t.is_meta for t in model.parameters()):
        with contextlib.suppress(ValueError):  # a model without experts to choose
            twin.set_experts_implementation("batched_mm")  # what the others run follows the routing
    return twin


def _check_causal(twin: nn.Module, ids: torch.Tensor, logits: torch.Tensor) -> None:
    changed = ids.clone()
    changed[:, -1] = ids[:, 0]
    change = (_run(twin, changed) - logits).detach().abs()
    if change[:, :-1].max() > 1e-3 * change[:, -1].max():
        raise ValueError(
            "it is not causal: another last token changes earlier logits "
            "(some encoders are causal with overrides = { is_decoder = true })"
        )


def _count_calls(model: nn.Module) -> dict[str, list[int]]:
    """Returns a list for each module list; a forward pass fills it with indices as modules run."""
    calls: dict[str, list[int]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            order = calls.setdefault(name, [])
            for i, child in enumerate(module):
                child.register_forward_pre_hook(lambda *_, order=order, i=i: order.append(i))
    return calls


def _find_decoder_list(model: nn.Module, calls: dict[str, list[int]]) -> str | None:
    sizes = {}
    for name, order in calls.items():
        children = list(model.get_submodule(name).children())
        if order and order == list(range(len(children))):
            sizes[name] = sum(p.numel() for x in children for p in x.parameters())
    return max(sizes, key=sizes.__getitem__) if sizes else None


def _find_unused(twin: nn.Module, path: str, logits: torch.Tensor) -> list[str]:
    """Lists the trainable parameters that are not in the graph of the logits.

    Module lists and stacks of matrices inside decoder layers are left out, since they may be
    experts to which none of the ten tokens was routed."""
    layers = twin.get_submodule(path)
    lists = [m for x in layers.children() for m in x.modules() if isinstance(m, nn.ModuleList)]
    experts = {p for m in lists for p in m.parameters()}
    experts |= {p for p in layers.parameters() if p.dim() > 2}
    reached = _graph_behind(logits)[0] | experts
    return [n for n, p in twin.named_parameters() if p.requires_grad and p not in reached]


class _Pieces:
    """Runs one forward pass and detaches the hidden state wherever a cut is possible."""

    def __init__(self, twin: nn.Module, path: str, ids: torch.Tensor, unused: list[str]) -> None:
        self.twin, self.ids = twin, ids
        self.result = HFCutPlan(path=path, unused=unused)
        self.layers = list(twin.get_submodule(path).children())
        self.starts: list[torch.Tensor] = []  # the leaf that each piece but the first begins with
        self.ends: list[torch.Tensor] = []  # what each piece returns, with its graph
        self.ids_nodes: list[Any] = []  # graph nodes of what embeddings made of the token ids

    def cut(self, logits: torch.Tensor | None) -> HFCutPlan:
        """Returns the plan; `logits` are what the model computes without any cut."""
        for layer in self.layers:
            layer.register_forward_pre_hook(self._enter, with_kwargs=True)
            layer.register_forward_hook(self._leave)
        inner = {m for layer in self.layers for m in layer.modules()}
        for module in self.twin.modules():
            if isinstance(module, nn.Embedding) and module not in inner:
                module.register_forward_hook(self._note_embedding)
        try:
            self.ends.append(_run(self.twin, self.ids))
        except Exception as error:  # a family's own code may raise anything
            self._refuse(f"its decoder layers need more than a hidden state: {_words(error)}")
        else:
            if logits is not None and not _same(self.ends[-1].detach(), logits.detach()):
                self._refuse("its decoder layers hand on more than a hidden state")
            self._read_graphs()
        return self.result

    def _refuse(self, problem: str) -> None:
        self.result.problem = self.result.problem or problem

    def _enter(self, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        key = _find_hidden(args, kwargs)
        if key is None:
            return self._refuse("its decoder layers take no float tensor")
        self.result.hidden = key
        self.result.carries_ids |= any(x is self.ids for x in [*args, *kwargs.values()])
        hidden = self._detach(get_hidden(args, kwargs, key))
        return replace_hidden(args, kwargs, key, hidden)

    def _leave(self, layer: nn.Module, args: Any, output: Any) -> Any:
        several = isinstance(output, (tuple, list))
        hidden = output[0] if several else output
        if not isinstance(hidden, torch.Tensor):
            return self._refuse("its decoder layers return no tensor")
        if layer is self.layers[-1]:
            hidden = self._detach(hidden)
        if several:
            self.result.num_outputs = len(output)
            return (hidden, *[_keep_if_traced(x) for x in output[1:]])
        return hidden

    def _note_embedding(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        if args and isinstance(args[0], torch.Tensor) and args[0].shape == self.ids.shape:
            self.ids_nodes.append(output.grad_fn)

    def _detach(self, hidden: torch.Tensor) -> torch.Tensor:
        shape = tuple(hidden.shape)
        places = [i for i in range(len(shape) - 2) if shape[i : i + 2] == (ROWS, TOKENS)]
        if not places or (self.ends and self.ends[0].shape != shape):
            self._refuse(f"its hidden state has shape {list(shape)}")
        else:
            self.result.batch_dim = places[0]
        self.ends.append(hidden)
        self.starts.append(hidden.detach().requires_grad_())
        return self.starts[-1].clone()  # a leaf must not be changed in place

    def _read_graphs(self) -> None:
        own = [set(), *[set(x.parameters()) for x in self.layers], set()]
        inside = set().union(*own)
        names = {p: name for name, p in self.twin.named_parameters()}
        for i, end in enumerate(self.ends):
            leaves, nodes = _graph_behind(end)
            outside = (leaves & names.keys()) - inside
            self.result.used.append([name for p, name in names.items() if p in outside])
            start = {self.starts[i - 1]} if i else set()
            if leaves - outside - own[i] - start:
                what = f"decoder layer {i - 1}" if 0 < i <= len(self.layers) else "its other part"
                self._refuse(f"{what} takes values of decoder layers beside the hidden state")
            self.result.carries_ids |= i > 0 and not nodes.isdisjoint(self.ids_nodes)
        held = {name for used in self.result.used for name in [*used, *self.result.unused]}
        outer = [(p, name) for p, name in names.items() if p.requires_grad and p not in inside]
        if any(name not in held for _, name in outer):
            self._refuse("its decoder layers hand on more than a hidden state")


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return float((one - other).abs().max()) <= TOLERANCE * float(other.abs().max())


def _keep_if_traced(output: Any) -> Any:
    return output if isinstance(output, torch.Tensor) and output.grad_fn is not None else None


def _graph_behind(output: torch.Tensor) -> tuple[set[torch.Tensor], set[Any]]:
    """Returns the leaf tensors and the nodes of a tensor's autograd graph."""
    leaves, nodes, todo = set(), set(), [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in nodes:
            continue
        nodes.add(node)
        if hasattr(node, "variable"):
            leaves.add(node.variable)
        todo += [following for following, _ in node.next_functions]
    return leaves, nodes


def _find_hidden(args: Any, kwargs: dict[str, Any]) -> int | str | None:
    given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    tensors = [(key, x) for key, x in given if isinstance(x, torch.Tensor)]
    return next((key for key, x in tensors if x.is_floating_point()), None)


def get_hidden(args: Any, kwargs: dict[str, Any], key: int | str) -> torch.Tensor:
    """Returns the hidden state among a decoder layer's arguments."""
    return args[key] if isinstance(key, int) else kwargs[key]


def replace_hidden(
    args: Any, kwargs: dict[str, Any], key: int | str, hidden: torch.Tensor
) -> tuple[Any, dict[str, Any]]:
    """Returns a decoder layer's arguments with another hidden state."""
    if isinstance(key, int):
        return (*args[:key], hidden, *args[key + 1 :]), kwargs
    return args, {**kwargs, key: hidden}
