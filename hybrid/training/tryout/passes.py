"""This module looks at the model's outputs: random numbers, neighbours, numbers not finite."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from .finding import SEVERAL, Finding, list_names
from .nested import NoRows, all_finite, differs, take_rows, tensors_in
from .trial import Trial
from .watch import Call, find_draws, note_calls, show_layer

# Relative to the greatest output. The same rows in a batch of another size come from kernels that
# add in another order: 1e-7 to 1e-6 in fp32 here, 1e-5 where many layers follow one another. Other
# random numbers, or other neighbours, move them by 1e-2 and more.
TOLERANCE = 1e-4


@torch.no_grad()
def check_passes(trial: Trial, output: Any) -> list[Finding]:
    """Find layers that draw random numbers of their own, and layers that mix samples.

    output: what the model gave for the batch, with both seeds 0."""
    found = _draws(trial, output)
    return [*found, *check_neighbours(trial, output, drawing=bool(found))]


def _draws(trial: Trial, output: Any) -> list[Finding]:
    """Find outputs that other random numbers change, though dropout by sample draws the same."""
    if not differs(trial.forward(trial.batch.input, trial.ids, 1, 1), output, TOLERANCE):
        return []
    if differs(trial.forward(trial.batch.input, trial.ids), output, TOLERANCE):
        name = _first(trial, _changed(trial, 0, 0))
        text = f"{name} gave another output for the same input and seeds: it has a state of its own"
        mend = "keep such a state in a buffer, or draw from torch's global generator"
        return [Finding(f"{trial.model_name}: {text}, so that no run can be repeated; {mend}")]
    if differs(trial.forward(trial.batch.input, trial.ids, 0, 1), output, TOLERANCE):
        name = _first(trial, _changed(trial, 0, 1))
        text = f"{name} draws with numpy or random, whose generators no run seeds"
        mend = "draw with torch, or better in the data set"
        return [Finding(f"{trial.model_name}: {text}: no run can be repeated; {mend}")]
    return [_tell_draws(trial)]


def _tell_draws(trial: Trial) -> Finding:
    draws = find_draws(trial.model, lambda: trial.forward(trial.batch.input, trial.ids))
    layers = [show_layer(*layer) for layer in draws] or ["the model"]
    functions = list(dict.fromkeys(name for names in draws.values() for name in names))
    verb, own = ("draws", "its") if len(layers) == 1 else ("draw", "their")
    by = f" by {list_names(functions)}" if functions else ""
    mend = _mend_draws(trial, list(draws), functions)
    return Finding(
        f"{trial.model_name}: {list_names(layers)} {verb} random numbers of {own} own{by}: each "
        f"strategy draws others, so that runs cannot be compared; {mend}",
        SEVERAL,
    )


def _mend_draws(trial: Trial, layers: Sequence[tuple[str, str]], functions: Sequence[str]) -> str:
    """Say what keeps these layers from drawing; for a model of transformers, the override."""
    config: Any = getattr(trial.model, "config", None)
    fields: dict[str, Any] = config.to_dict() if hasattr(config, "to_dict") else {}
    rates = [k for k, v in fields.items() if "drop" in k and isinstance(v, float) and v > 0]
    of_attention = [key for key in rates if key.startswith(("att", "sdpa"))]
    if rates:
        zero = ", ".join(f"{key} = 0.0" for key in of_attention or rates)
        return f"set model.options.overrides = {{ {zero} }}"
    if any("attention" in word for word in (*functions, *(kind.lower() for _, kind in layers))):
        return "set the dropout of attention to 0"
    return "use nn.Dropout, which drops the same under every strategy, or draw nothing in forward"


def check_neighbours(trial: Trial, output: Any, drawing: bool) -> list[Finding]:
    """Find outputs of a sample that hang on the samples beside it, in the mode for training.

    drawing: the model draws random numbers, so that it is held in the mode for evaluation."""
    rows, total = split_rows(len(trial.ids)), len(trial.ids)
    names = batch_norms(trial)
    if names or drawing or not rows[1]:
        return _tell_batch_norms(trial, names)
    for part in rows:
        try:
            given = take_rows(trial.batch.input, part, total)
            expected = take_rows(output, part, total)
        except NoRows:
            return []
        ids = [trial.ids[i] for i in part]
        found = trial.forward(given, ids)
        if _same_shapes(found, expected) and differs(found, expected, TOLERANCE):
            name = _first(trial, _mixed(trial, part, given, ids))
            return [
                Finding(
                    f"{trial.model_name}: {name} mixes samples: what it gives for a sample hangs "
                    "on the others in the micro-batch, so that strategies that cut the batch "
                    "otherwise compute something else; set micro_batches so that all have "
                    "micro-batches of one size, or keep samples apart",
                    SEVERAL,
                )
            ]
    return []


def split_rows(total: int) -> tuple[list[int], list[int]]:
    """Return two parts of unlike size of a batch, each with other neighbours than in the whole."""
    few = list(range(2, total, 2)) if total > 3 else list(range(1, total))[-1:]
    return [i for i in range(total) if i not in few], few


def _same_shapes(one: Any, other: Any) -> bool:
    return [t.shape for t in tensors_in(one)] == [t.shape for t in tensors_in(other)]


def batch_norms(trial: Trial) -> list[str]:
    """Name the layers that take statistics over the micro-batch."""
    return [
        f"{name} ({type(module).__name__})"
        for name, module in trial.model.named_modules()
        if isinstance(module, _BatchNorm) and module.training
    ]


def _tell_batch_norms(trial: Trial, names: list[str]) -> list[Finding]:
    if not names:
        return []
    verb = "takes its" if len(names) == 1 else "take their"
    return [
        Finding(
            f"{trial.model_name}: {list_names(names)} {verb} statistics over each micro-batch, so "
            "that strategies that cut the batch otherwise compute something else; set "
            "micro_batches so that all have micro-batches of one size, or use a norm over each "
            "sample (GroupNorm, LayerNorm)",
            SEVERAL,
        )
    ]


def _first(trial: Trial, calls: list[Call]) -> str:
    return show_layer(*calls[0][:2]) if calls else "the model"


def _noted(trial: Trial, run: Callable[[], Any]) -> list[Call]:
    with note_calls(trial.model) as calls:
        run()
    return calls


def _changed(trial: Trial, torch_seed: int, other: int) -> list[Call]:
    """List the calls that gave other outputs for the same inputs with other seeds."""
    one = _noted(trial, lambda: trial.forward(trial.batch.input, trial.ids))
    two = _noted(trial, lambda: trial.forward(trial.batch.input, trial.ids, torch_seed, other))
    return [
        a
        for a, b in zip(one, two, strict=False)
        if not differs(a.given, b.given, TOLERANCE) and differs(a.returned, b.returned, TOLERANCE)
    ]


def _mixed(trial: Trial, part: list[int], given: Any, ids: list[int]) -> list[Call]:
    """List the calls that gave other outputs for the same rows beside other neighbours."""
    total = len(trial.ids)
    one = _noted(trial, lambda: trial.forward(trial.batch.input, trial.ids))
    two = _noted(trial, lambda: trial.forward(given, ids))
    found = []
    for a, b in zip(one, two, strict=False):
        try:
            inputs, outputs = (take_rows(value, part, total) for value in (a.given, a.returned))
        except NoRows:
            continue
        if not differs(inputs, b.given, TOLERANCE) and differs(outputs, b.returned, TOLERANCE):
            found.append(a)
    return found


@torch.no_grad()
def first_not_finite(trial: Trial, given: Any, ids: list[int]) -> str:
    """Name the first layer that gives numbers that are not finite for finite ones."""
    calls = _noted(trial, lambda: trial.forward(given, ids))
    wrong = [c for c in calls if all_finite(c.given) and not all_finite(c.returned)]
    return _first(trial, wrong)


@torch.no_grad()
def moved_buffers(trial: Trial) -> list[str]:
    """Name the buffers that the last pass moved, but for those of batch norms."""
    norms = {
        f"{name}.{inner}" if name else inner
        for name, module in trial.model.named_modules()
        if isinstance(module, _BatchNorm)
        for inner, _ in module.named_buffers(recurse=False)
    }
    now = dict(trial.model.named_buffers())
    return [
        name
        for name, before in trial.buffers.items()
        if name in now and name not in norms and differs(now[name], before)
    ]


def refuses_one_sample(trial: Trial) -> str | None:
    """Name the batch norms if the model cannot be trained on a single sample because of them."""
    names = batch_norms(trial)
    if not names:
        return None
    try:
        with torch.no_grad():
            trial.forward(take_rows(trial.batch.input, [0], len(trial.ids)), trial.ids[:1])
    except NoRows:
        return None
    except Exception as error:
        return list_names(names) if "more than 1 value" in str(error) else None
    return None
