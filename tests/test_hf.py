"""Causal language models of transformers compute, whole and in stages, what transformers does."""

from __future__ import annotations

import copy
import gc
import itertools
import json
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks import hf_models
from hybrid.models.hf import as_layers, hf
from hybrid.models.hf.layers import HFLayers
from hybrid.models.hf.probe import NotOnMeta
from hybrid.models.layers import holders_of
from hybrid.models.losses import cross_entropy

from .conftest import ROOT

FIELDS: dict[str, dict[str, Any]] = json.loads(hf_models.CONFIGS.read_text())
# Tied embeddings, plain, soft caps and windows, experts, shared blocks that need token ids again,
# frozen tables of sines, a residual in fp32.
CUT = ("gpt2", "llama", "gemma2", "mixtral", "zamba", "marian", "mamba")
SAMPLE = (
    *("gpt2", "llama", "qwen2", "qwen3", "mistral", "gemma2"),
    *("gemma3_text", "phi3", "olmo2", "gpt_neox", "mixtral", "gpt_oss"),
)
TABLE = ROOT / "benchmarks" / "hf_models.md"

pytestmark = pytest.mark.filterwarnings("ignore:.*have no part in the logits")


def make(model_type: str, **changes: Any) -> Any:
    """A tiny model with random weights."""
    return hf_models.make(model_type, {**FIELDS[model_type], **changes})


def write_config(folder: Path, model_type: str = "llama", **changes: Any) -> str:
    """A folder with a config.json alone."""
    folder.mkdir(exist_ok=True)
    fields = {**FIELDS.get(model_type, {}), "model_type": model_type, **changes}
    (folder / "config.json").write_text(json.dumps(fields))
    return str(folder)


def tokens(rows: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(0, 97, (rows, length), generator=torch.Generator().manual_seed(3))


def cut(layers: HFLayers, *bounds: int) -> list[nn.Module]:
    ends = itertools.pairwise((0, *bounds, len(layers)))
    return [copy.deepcopy(layers).join(range(a, b)) for a, b in ends]


def give(stages: list[Any], ids: torch.Tensor) -> None:
    """Give each stage the input of the micro-batch, as the engine does."""
    for stage in stages:
        stage.stage_inputs = ids


def sum_gradients(stages: list[nn.Module]) -> dict[str, Any]:
    """The gradients of stages by name, those of shared weights summed."""
    gradients: dict[str, Any] = {}
    for stage in stages:
        for name, p in stage.named_parameters():
            if p.grad is not None:
                gradients[name] = gradients.get(name, 0) + p.grad
    return gradients


def train(stages: list[nn.Module], ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
    """Logits, and gradients by name, those of shared weights summed: stages in one process."""
    inputs: list[torch.Tensor] = []
    outputs = [ids]
    give(stages, ids)
    for stage in stages:
        inputs.append(outputs[-1].detach().requires_grad_() if inputs else ids)
        outputs.append(stage(inputs[-1]))
    cross_entropy(outputs[-1], ids)[0].backward()
    for received, output in zip(inputs[:0:-1], outputs[-2:0:-1], strict=True):
        output.backward(received.grad)
    return outputs[-1].detach(), sum_gradients(stages)


def reference(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
    """The same by transformers alone."""
    logits = model(input_ids=ids).logits
    torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), ids.flatten(), reduction="sum"
    ).backward()
    named = model.named_parameters()
    return logits.detach(), {n: p.grad for n, p in named if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("model_type", CUT)
def test_stages_compute_what_transformers_computes(model_type: str, dtype: torch.dtype) -> None:
    model, ids = make(model_type), tokens()
    layers = as_layers(copy.deepcopy(model))
    assert layers.cut_problem is None and len(layers) == 6
    whole, stages = cut(layers), cut(layers, 2, 4)
    for module in [model, *whole, *stages]:
        hf_models.set_dtype(module, dtype)
    expected, gradients = reference(model, ids)
    for modules in (whole, stages):
        logits, found = train(modules, ids)
        assert torch.equal(logits, expected) and found.keys() == gradients.keys()
        largest = max(g.norm() for g in gradients.values())  # some are nothing but rounding
        for name, gradient in gradients.items():
            off = float((found[name] - gradient).norm() / (gradient.norm() + 1e-2 * largest))
            assert off < (1e-6 if dtype == torch.float32 else 5e-2), name
    buffers = [b.dtype for m in stages for b in m.buffers() if b.is_floating_point()]
    assert set(buffers) <= {torch.float32}


@pytest.mark.parametrize("bounds", [(1,), (5,), (1, 2, 3, 4, 5), (3,)])
def test_a_cut_may_be_anywhere(bounds: tuple[int, ...]) -> None:
    for model_type in ("gpt2", "zamba"):
        model, ids = make(model_type), tokens(3, 7)
        stages = cut(as_layers(copy.deepcopy(model)), *bounds)
        give(stages, ids)
        for training in (True, False):
            x = ids
            for stage in stages:
                x = stage.train(training)(x)
            assert torch.equal(x, model.train(training)(input_ids=ids).logits)


def test_decoder_layers_may_be_compiled() -> None:
    model, ids = make("llama"), tokens()
    layers = as_layers(copy.deepcopy(model))
    for block in layers.blocks():
        block.compile(backend="eager")
    stages = cut(layers, 2, 4)
    assert torch.equal(train(stages, ids)[0], model(input_ids=ids).logits)
    names = [[type(m).__name__ for m in stage.modules()] for stage in stages]
    assert [n.count("LlamaDecoderLayer") for n in names] == [1, 2, 1]


def test_names_are_those_of_transformers() -> None:
    model = make("gpt2")
    names = [name for name, _ in model.named_parameters()]
    layers = as_layers(copy.deepcopy(model))
    assert list(layers.tensors())[: len(names)] == names
    (whole,), stages = cut(layers), cut(layers, 2, 4)
    assert [name for name, _ in whole.named_parameters()] == names
    held = [{name for name, _ in stage.named_parameters()} for stage in stages]
    assert set().union(*held) == set(names)
    assert "transformer.h.0.ln_1.weight" in held[0] and "transformer.h.3.ln_1.weight" in held[2]
    assert held[0] & held[2] == {"transformer.wte.weight"} and not held[1] & (held[0] | held[2])
    for stage, part in zip(stages, ("0 to 1", "2 to 3", "4 to 5"), strict=True):
        assert part in str(stage)
    assert len(layers.modules()) == len(list(model.modules()))


def test_elements_hold_what_they_use() -> None:
    layers = as_layers(make("gpt2"))
    tied = [held for held in holders_of(layers).values() if len(held) > 1]
    assert tied == [[0, 5]]  # the embedding and the head
    assert layers.sizes()[0] == (97 + 64) * 32 and layers.sizes()[5] == 97 * 32 + 2 * 32
    assert layers.units() == layers.blocks() and len(layers.blocks()) == 4

    shared = as_layers(make("zamba"))  # two of the layers share a block, all use the embeddings
    assert {type(x).__name__ for x in shared.units()} == {"ZambaMambaDecoderLayer"}
    assert [0, 1, 2, 3, 4, 5] not in holders_of(as_layers(make("llama"))).values()

    frozen = as_layers(make("marian"))
    everywhere = [p for p, held in holders_of(frozen).items() if held == [0, 1, 2, 3, 4, 5]]
    assert len(everywhere) == 1 and not everywhere[0].requires_grad
    assert frozen.units() == frozen.blocks()


def test_a_stage_frees_what_it_does_not_need() -> None:
    layers = as_layers(make("llama"))
    named = {name: weakref.ref(p) for name, p in layers.model.named_parameters()}
    sizes = layers.sizes()
    stage = layers.join(range(2, 4))
    gc.collect()
    held = {name for name, p in named.items() if p() is not None}
    assert held == {name for name, _ in stage.named_parameters()}
    assert held == {name for name in named if ".layers.1." in name or ".layers.2." in name}
    assert sum(p.numel() for p in stage.parameters()) == sum(sizes[2:4])
    assert layers.sizes() == sizes and len(layers) == 6


def test_the_whole_keeps_nothing_twice() -> None:
    layers = as_layers(make("llama"))
    whole = layers.whole()
    old = [weakref.ref(p) for p in whole.parameters()]
    for module in whole.modules():  # as FSDP2 does
        for name, p in module._parameters.items():
            module._parameters[name] = None if p is None else nn.Parameter(torch.zeros(1))
    gc.collect()
    assert len(old) > 30 and all(p() is None for p in old)


def test_what_cannot_be_cut_is_named_and_runs_whole() -> None:
    for model_type, reason in {
        "zaya": "takes values of other blocks beside the hidden state",
        "hy_v4": "Shared DSA layers require top-k indices",
        "hrm_text": "whose modules run once each",
    }.items():
        model, ids = make(model_type), tokens(2, 8)
        layers = as_layers(copy.deepcopy(model))
        assert reason in str(layers.cut_problem) and "\n" not in str(layers.cut_problem)
        assert len(layers) == 1
        with pytest.raises(ValueError, match=reason):
            layers.join(range(0))
        logits, gradients = train([layers.whole()], ids)
        expected, wanted = reference(model, ids)
        assert torch.equal(logits, expected) and gradients.keys() == wanted.keys()


def test_layer_drop_forbids_cuts() -> None:
    layers = as_layers(make("opt", layerdrop=0.1))
    assert "layerdrop is not 0" in str(layers.cut_problem)
    stages = cut(as_layers(make("opt")), 3)
    assert stages[1].get_submodule("model.decoder.layers")
    stages[1].layerdrop = 1.0
    stages[1].model.decoder.layerdrop = 1.0  # type: ignore[union-attr]
    give(stages, tokens(2, 4))
    with pytest.raises(RuntimeError, match="skipped a block"):
        stages[1](torch.zeros(2, 4, 32))


def test_what_is_left_out_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="router's loss is not trained"):
        layers = as_layers(make("mixtral", output_router_logits=True))
    assert layers.model.config.output_router_logits is False
    with pytest.warns(UserWarning, match="parameters have no part in the logits"):
        layers = as_layers(make("bart"))
    assert (
        layers.plan.unused and not layers.model.get_parameter(layers.plan.unused[0]).requires_grad
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        as_layers(make("llama"))


@pytest.mark.parametrize("model_type", ["gpt2", "mixtral", "zamba", "diffllama"])
def test_a_model_on_meta_is_cut_alike(model_type: str) -> None:
    real = as_layers(make(model_type))
    with torch.device("meta"):
        layers = as_layers(make(model_type))
    assert layers.plan == real.plan and layers.sizes() == real.sizes()
    assert layers.tensors().keys() == real.tensors().keys()
    assert all(t.is_meta for t in layers.tensors().values())
    holders = list(holders_of(real).values())
    assert list(holders_of(layers).values()) == holders
    for name, tensor in layers.tensors().items():
        value = real.tensors()[name].detach().clone()
        trained = isinstance(tensor, nn.Parameter)
        filled = nn.Parameter(value, tensor.requires_grad) if trained else value
        torch.utils.swap_tensors(tensor, filled)
    assert list(holders_of(layers).values()) == holders
    expected, gradients = train(cut(real, 2, 4), tokens())
    logits, found = train(cut(layers, 2, 4), tokens())
    assert torch.equal(logits, expected) and found.keys() == gradients.keys()


def test_what_needs_values_says_so_on_meta(tmp_path: Path) -> None:
    folder = write_config(tmp_path, "dbrx")
    with torch.device("meta"), pytest.raises(NotOnMeta):
        hf(folder)
    assert hf(folder)[0].cut_problem is None


def rows_of_the_table() -> dict[str, list[str]]:
    lines = [line for line in TABLE.read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]
    return {row[0]: row for row in cells}


def test_the_table_has_every_type() -> None:
    rows, text = rows_of_the_table(), TABLE.read_text()
    results = [row[1] for row in rows.values()]
    assert results.count("cut and equal") >= 150
    assert set(results) <= {"cut and equal", "refused", "not constructible"}
    if f"transformers {transformers.__version__}" in text:
        assert rows.keys() == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert all(row[7] for row in rows.values() if row[1] != "cut and equal")


@pytest.mark.slow
@pytest.mark.parametrize("model_type", SAMPLE)
def test_the_table_can_be_had_again(model_type: str) -> None:
    row = hf_models.check(model_type)
    recorded = rows_of_the_table()[model_type]
    assert recorded[1] == row["result"] == "cut and equal"
    assert (recorded[2], recorded[5], recorded[6]) == ("0", row["bf16"], row["meta"])
    assert row["logits"] == 0 and row["gradients"] <= hf_models.GRADIENT_TOLERANCE
