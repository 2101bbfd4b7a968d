"""Says of every causal language model type of transformers whether it can be cut into stages, and
whether the stages compute what transformers computes.

    python benchmarks/hf_models.py --out benchmarks/hf_models.md

Each type is made from a tiny config with random weights (`hf_tiny_configs.json` beside this file:
four layers, width 32, 97 tokens) in a process of its own. The reference is the model of
transformers as it comes. `--types NAME ...` looks at a few.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import platform
import signal
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hybrid.models.hf import as_layers
from hybrid.models.hf.layers import HFLayers
from hybrid.models.hf.probe import NotOnMeta
from hybrid.models.losses import cross_entropy

CONFIGS = Path(__file__).with_name("hf_tiny_configs.json")
SECONDS = 180  # for one type
EQUAL, REFUSED, ABSENT, WRONG = "cut and equal", "refused", "not constructible", "DIFFERENT"
GRADIENT_TOLERANCE = 1e-5  # relative; gradients of shared weights are added in another order
COLUMNS = ("type", "result", "logits", "loss", "gradients", "bf16", "meta", "remarks")


class Pass(NamedTuple):
    """One step of training without its update, and the logits of the model not training."""

    logits: torch.Tensor
    loss: float
    gradients: dict[str, torch.Tensor]
    names: set[str]
    evaluated: torch.Tensor


def make(model_type: str, fields: dict[str, Any]) -> Any:
    """The model of a tiny config, as transformers makes it."""
    config = AutoConfig.for_model(**{"model_type": model_type, **fields})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and targets [2, 16], one of which does not count."""
    generator = torch.Generator().manual_seed(1)
    ids, target = torch.randint(0, 97, (2, 2, 16), generator=generator)
    target[0, 3] = -100
    return ids, target


def set_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast parameters; buffers keep their dtype."""
    for p in model.parameters():
        p.data = p.data.to(dtype)


def run_plain(model: Any, dtype: torch.dtype) -> Pass:
    """The model as transformers has it, without any code of this project."""
    model = copy.deepcopy(model)
    set_dtype(model, dtype)
    ids, target = batch()
    logits = model(input_ids=ids, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), target.flatten())
    loss.backward()
    named = dict(model.named_parameters())
    gradients = {n: p.grad.float() for n, p in named.items() if p.grad is not None}
    with torch.no_grad():
        evaluated = model.eval()(input_ids=ids, use_cache=False).logits
    return Pass(logits.detach(), loss.item(), gradients, set(named), evaluated)


def run_stages(layers: HFLayers, bounds: list[int], dtype: torch.dtype) -> Pass:
    """Stages one after another in this process; gradients of shared weights are summed."""
    parts = [range(a, b) for a, b in itertools.pairwise(bounds)]
    stages = [copy.deepcopy(layers).join(part) for part in parts]
    ids, target = batch()
    inputs, outputs = [], []
    for stage in stages:
        set_dtype(stage, dtype)
        stage.stage_inputs = ids  # type: ignore[assignment]
        inputs.append(outputs[-1].detach().requires_grad_() if outputs else ids)
        outputs.append(stage(inputs[-1]))
    total, count = cross_entropy(outputs[-1].float(), target)
    loss = total / count
    loss.backward()
    for output, received in zip(outputs[-2::-1], inputs[:0:-1], strict=True):
        output.backward(received.grad)
    gradients: dict[str, torch.Tensor] = {}
    for stage in stages:
        for name, p in stage.named_parameters():
            if p.grad is not None:
                gradients[name] = gradients.get(name, 0) + p.grad.float()
    names = {name for stage in stages for name, _ in stage.named_parameters()}
    evaluated = ids
    with torch.no_grad():
        for stage in stages:
            evaluated = stage.eval()(evaluated)
    return Pass(outputs[-1].detach(), loss.item(), gradients, names, evaluated)


def compare(layers: HFLayers, plain: Pass, dtype: torch.dtype) -> dict[str, Any]:
    """Three stages, and a stage for each element; what cannot be cut runs whole.

    Greatest differences: of logits, training and not; of the loss; of a parameter's gradient,
    relative to its norm. `names`: all have the same parameters, with and without gradients.
    """
    n = len(layers)
    cuts = [[0, n]] if layers.cut_problem else [[0, n // 3, 2 * n // 3, n], list(range(n + 1))]
    found: dict[str, Any] = {"logits": 0.0, "loss": 0.0, "gradients": 0.0, "names": True}
    for bounds in cuts:
        cut = run_stages(layers, bounds, dtype)
        for one, other in ((plain.logits, cut.logits), (plain.evaluated, cut.evaluated)):
            found["logits"] = max(found["logits"], float((one - other).abs().max()))
        found["loss"] = max(found["loss"], abs(plain.loss - cut.loss))
        found["names"] &= plain.names == cut.names
        found["names"] &= plain.gradients.keys() == cut.gradients.keys()
        for name in plain.gradients.keys() & cut.gradients.keys():
            one, other = plain.gradients[name], cut.gradients[name]
            off = float((one - other).norm() / one.norm().clamp_min(1e-30))
            found["gradients"] = max(found["gradients"], off)
    return found


def check_bf16(model: Any, layers: HFLayers) -> str:
    """Whether stages with parameters in bf16 give the plain model's logits, bit for bit."""
    try:
        plain = run_plain(model, torch.bfloat16)
    except RuntimeError:
        return "transformers fails"
    found = compare(layers, plain, torch.bfloat16)
    return "equal" if found["logits"] == 0 and found["names"] else f"{found['logits']:.1e}"


def check_meta(model_type: str, fields: dict[str, Any], real: HFLayers, plain: Pass) -> str:
    """Whether a model made on the meta device and filled by name is the same one."""
    try:
        with torch.device("meta"):
            layers = as_layers(make(model_type, fields))
    except NotOnMeta:
        return "needs values"
    values = real.tensors()
    for name, tensor in layers.tensors().items():
        value = values.pop(name).detach().clone()
        if isinstance(tensor, nn.Parameter):
            value = nn.Parameter(value, tensor.requires_grad)
        torch.utils.swap_tensors(tensor, value)
    same = layers.plan == real.plan and layers.sizes() == real.sizes() and not values
    found = compare(layers, plain, torch.float32)
    return "equal" if same and found["names"] and found["logits"] == 0 else "DIFFERENT"


def check(model_type: str) -> dict[str, Any]:
    """One row of the table."""
    fields = json.loads(CONFIGS.read_text()).get(model_type, {})
    try:
        with torch.device("cpu" if fields else "meta"):
            model = make(model_type, fields)
    except Exception as error:  # a family's own code may raise anything
        return {"result": ABSENT, "remarks": one_line(error)}
    plain = run_plain(model, torch.float32)
    try:
        layers = as_layers(copy.deepcopy(model))
    except ValueError as error:
        return {"result": REFUSED, "remarks": one_line(error)}
    unused = layers.plan.unused
    remarks = [f"{len(unused)} unused parameters"] if unused else []
    found = compare(layers, plain, torch.float32)
    right = found["logits"] == 0 and found["gradients"] <= GRADIENT_TOLERANCE and found["names"]
    row = {"result": EQUAL if right else WRONG, **found}
    if layers.cut_problem:
        remarks.insert(0, layers.cut_problem + ("; runs whole, equal" if right else "; NOT EQUAL"))
        row["result"] = REFUSED
    row["bf16"] = check_bf16(model, layers)
    row["meta"] = check_meta(model_type, fields, layers, plain)
    return row | {"remarks": "; ".join(remarks)}


def one_line(error: Exception) -> str:
    """What an error says, cut where it goes on for long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 200 else f"{text[:200]} ..."


def check_apart(model_type: str) -> dict[str, Any]:
    """`check` in a process of its own, which may crash or hang."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        signal.alarm(SECONDS)
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            try:
                row = check(model_type)
            except Exception as error:  # told in the table
                row = {"result": WRONG, "remarks": f"{type(error).__name__}: {one_line(error)}"}
            os.write(writer, json.dumps(row).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        text = stream.read()
    os.waitpid(child, 0)
    crashed = {"result": WRONG, "remarks": f"crashed, or took more than {SECONDS} s"}
    return {"type": model_type, **(json.loads(text) if text else crashed)}


def cell(row: dict[str, Any], column: str) -> str:
    """One cell: differences with two digits, 0 for none at all."""
    value = row.get(column, "")
    if isinstance(value, float):
        return f"{value:.1e}" if value else "0"
    return str(value).replace("|", "/")


def markdown(rows: list[dict[str, Any]], seconds: float) -> str:
    """The table with what it needs to be read."""
    counts = Counter(row["result"] for row in rows)
    summary = ", ".join(f"{counts[k]} {k}" for k in (EQUAL, REFUSED, ABSENT, WRONG) if counts[k])
    table = [
        f"| {' | '.join(COLUMNS)} |",
        "|---|---|---:|---:|---:|---|---|---|",
        *(f"| {' | '.join(cell(row, c) for c in COLUMNS)} |" for row in rows),
    ]
    return INTRODUCTION.format(
        num_types=len(rows),
        summary=summary,
        meta=sum(row.get("meta") == "equal" for row in rows),
        command=" ".join(["python", "benchmarks/hf_models.py", *sys.argv[1:]]),
        versions=f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}; {seconds:.0f} CPU seconds, one thread",
        table="\n".join(table),
    )


INTRODUCTION = """# Causal language models of transformers, cut into stages

Of {num_types} types: **{summary}**. {meta} can also be made on the meta device and filled by name.

- Reference: the model of transformers from a tiny config (`hf_tiny_configs.json`), random weights,
  fp32, training, ids and targets [2, 16]. Cut: in three stages, and again in as many as there are
  elements (decoder layers, and what is before and behind them), all in one process.
- logits: greatest difference, training and not. loss: its difference. gradients: greatest relative
  difference of a parameter's gradient, those of shared weights summed over the stages. Both also
  have the same parameter names. "cut and equal": logits differ by nothing, gradients by 1e-5 at
  most.
- bf16: parameters in bf16, buffers in fp32; "equal": the same logits, bit for bit; "transformers
  fails": the plain model does not run so.
- meta: made without values, cut, then filled by name; "equal": the same cut and the same logits;
  "needs values": its forward looks at them, so that each rank makes it for real.
- Refused types still run whole where the remark says so. A type that is not causal trains on
  nothing here: its logits see the tokens they should predict.

{versions}. Command: `{command}`

{table}
"""


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--types", nargs="+", default=sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    parser.add_argument("--out", type=Path, help="file; left out: the terminal")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    rows = []
    for model_type in arguments.types:
        rows.append(check_apart(model_type))
        print(*(cell(rows[-1], c) for c in COLUMNS), file=sys.stderr)
    text = markdown(rows, sum(os.times()[:4]))
    if not arguments.out:
        print(text)
    else:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
