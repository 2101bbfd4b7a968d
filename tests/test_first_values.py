"""Models that are made without values, of which each rank fills what it holds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor

from hybrid.job.errors import JobError, Unsupported
from hybrid.launch.placement import Placement
from hybrid.launch.warm import warm_ranks
from hybrid.models import build_model, made_whole, shared
from hybrid.models.first_values import ByPart
from hybrid.models.gpt import gpt
from hybrid.models.layers import Layers
from hybrid.training.check import check_job
from hybrid.training.progress import Watcher
from hybrid.training.run import launch
from tests.conftest import small_job
from tests.workloads import squared_error

SIZES = {"num_layers": 5, "width": 30, "num_heads": 3, "context": 7, "vocab_size": 101}
SENTENCES = {
    "name": "tests.workloads:sentences",
    "options": {"size": 23, "tokens": 7, "vocab_size": 101},
}


class Own(nn.Module):
    """A block with parameters of its own, attention, and a buffer that its making computes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.empty(width))
        self.attention = nn.MultiheadAttention(width, 3, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.register_buffer("shift", torch.linspace(-1, 1, width).sin())
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.gain, 1.0, 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x + self.shift).unsqueeze(1)
        return x.squeeze(1) + self.gain * self.attention(x, x, x, need_weights=False)[0].squeeze(1)


class Net(nn.Module):
    """A user's module: blocks in a list, and two layers that share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.blocks = nn.Linear(12, 21), nn.ModuleList(Own(21) for _ in range(3))
        self.middle, self.last = nn.Linear(21, 21), nn.Linear(21, 21)
        self.last.weight = self.middle.weight
        self.scale = nn.Linear(21, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.scale(torch.tanh(self.last(torch.tanh(self.middle(x)))))


def watched(model: nn.Module, most: int) -> nn.Module:
    """In a rank, no more than `most` elements may be whole when another part is filled."""
    fill_part = ByPart._fill_part

    def check(self: ByPart, part: Any) -> None:
        held = {id(p): p for m in model.modules() for p in m._parameters.values() if p is not None}
        whole = [p for p in held.values() if not (p.is_meta or isinstance(p, DTensor))]
        assert sum(p.numel() for p in whole) <= most, "a rank holds more than its part"
        fill_part(self, part)

    if "RANK" in os.environ:
        ByPart._fill_part = check  # type: ignore[method-assign]
    return model


def net(fault: str = "", most: int = 10**9) -> Any:
    """The module with a loss, or one whose parameters nothing or too much sets."""
    model = watched(Net(), most)
    if fault == "set twice":
        nn.init.normal_(model.blocks[1].norm.weight)
    elif fault == "never set":
        model.blocks[1].bare = nn.Parameter(torch.ones(3))
    elif fault == "value":
        model.constant = float(model.first.weight.sum())
    return model, squared_error


def watched_gpt(most: int = 10**9, **options: Any) -> Any:
    """The GPT, watched."""
    layers, loss = gpt(**options)
    watched(nn.ModuleList(layers), most)
    return layers, loss


def job(name: str, **changes: Any) -> Any:
    """Two steps of a GPT or of the module."""
    options = changes.pop("options", {})
    if name == "gpt":
        options, data = SIZES | options, SENTENCES
        name = "tests.test_first_values:watched_gpt" if "most" in options else name
    else:
        data = {"name": "tests.workloads:points", "options": {"size": 37}}
    model = {"name": name, "options": options, "on_meta": True}
    rest = {"train__global_batch": 9, "train__micro_batches": 2, "train__steps": 2}
    return small_job(model=model, data=data, **(rest | changes))


def weights(out: Path) -> dict[str, torch.Tensor]:
    """The final weights of a run."""
    return load_file(out / "checkpoints" / "final" / "model.safetensors")


NET = "tests.test_first_values:net"
STILL = {"name": "sgd", "lr": 1e-30}  # with which weights stay what they are
OUTSIDE = {"gpt": 3300, NET: 822}  # elements outside the blocks, which FSDP2 shards together


@pytest.mark.parametrize("name", ["gpt", NET])
def test_all_strategies_begin_with_the_same_values(name: str, tmp_path: Path) -> None:
    """Under fsdp and zero3 no rank holds a whole block when the next part is filled."""
    options = {"tied": True, "positions": "learned"} if name == "gpt" else {}
    strategies = ["fsdp", "zero3", *(["pipeline", "2d", "ddp"] if name == "gpt" else ["zero2"])]
    expected: dict[str, torch.Tensor] = {}
    with warm_ranks():
        for strategy in ["single", *strategies]:
            most = {"most": OUTSIDE[name]} if strategy in ("fsdp", "zero3") else {}
            asked = job(name, options=options | most)
            ranks = 1 if strategy == "single" else 4
            out = tmp_path / strategy
            launch(check_job(asked).job, strategy, ranks, out, Watcher())
            found = weights(out)
            expected = expected or found
            assert found.keys() == expected.keys()
            for key, tensor in found.items():
                assert torch.allclose(tensor, expected[key], rtol=1e-4, atol=1e-6), (strategy, key)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether tensors are equal, but for steps from zero."""
    return torch.allclose(one, other, rtol=0, atol=1e-25)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_zero3_keeps_exact_masters_of_late_values(precision: str, tmp_path: Path) -> None:
    """With a rate of next to nothing, the final weights are the first ones, in fp32."""
    for strategy, ranks in (("single", 1), ("zero3", 3)):
        asked = job("gpt", train__precision=precision, optimizer=STILL)
        launch(asked, strategy, ranks, tmp_path / strategy, Watcher())
    first, again = weights(tmp_path / "single"), weights(tmp_path / "zero3")
    assert all(same(first[key], again[key]) for key in first)


def filled(layers: Layers, module: nn.Module | None = None) -> dict[str, torch.Tensor]:
    """The values of a model, or of one of its modules, after filling that."""
    for each in [module] if module else layers:
        layers.fill(each)
    return {name: t for name, t in layers.tensors().items() if not t.is_meta}


def test_a_stage_fills_what_it_has_alone_and_a_tied_parameter_once() -> None:
    asked = job("gpt", options={"positions": "learned"})
    whole = filled(build_model(asked)[0])
    for first, last in ((0, 2), (2, 5), (5, 7)):
        layers = build_model(asked)[0]
        stage = layers.join(range(first, last))
        found = filled(layers, stage)
        own = {n for n, p in layers.tensors().items() if any(p is q for q in stage.parameters())}
        extra = {"0.token.weight", "0.position.weight"} if last == 7 else set()
        assert own <= found.keys() <= own | extra
        assert all(torch.equal(found[name], whole[name]) for name in own)


def test_values_hang_on_the_seed_and_the_name_and_look_like_those_of_a_whole_model() -> None:
    asked = job("gpt")
    one, two = filled(build_model(asked)[0]), filled(build_model(asked)[0])
    other = filled(build_model(asked.model_copy(update={"train": asked.train.model_copy(
        update={"seed": 1})}))[0])  # fmt: skip
    made = build_model(made_whole(asked))[0].tensors()
    for name, value in one.items():
        assert torch.equal(value, two[name])
        if value.numel() > 900 and "norm" not in name:
            assert not torch.equal(value, other[name])
            assert 0.8 < value.std() / made[name].std() < 1.25, name
        elif "weight" not in name or "norm" in name:
            assert torch.equal(value, made[name]), name
    assert not torch.equal(one["1.up.weight"], one["2.up.weight"])


def test_no_rank_makes_a_file_of_the_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "write_nameless", None)
    placement = Placement(rank=0, world_size=4)
    layers, _ = shared.build_shared(job("gpt"), placement)
    assert all(p.is_meta for p in layers.names())


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("set twice", "blocks.1.norm.weight: the model's code sets it outside reset_parameters()"),
        ("never set", "blocks.1.bare: no reset_parameters() of its module sets it; write one"),
        ("value", "cannot be called on meta tensors"),
    ],
)
def test_what_would_not_be_the_users_model_is_refused(fault: str, words: str) -> None:
    with pytest.raises(JobError, match=r"^model\.on_meta = true: ") as error:
        check_job(job(NET, options={"fault": fault}))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_module_that_must_be_cut_by_a_trial_is_refused() -> None:
    found = check_job(job(NET))
    with pytest.raises(Unsupported, match="on_meta = true: a module is cut by a trial"):
        found.plan("pipeline", 2)


@pytest.mark.parametrize("strategy", ["single", "fsdp", "zero3"])
def test_named_weights_fill_the_model(strategy: str, tmp_path: Path) -> None:
    torch.manual_seed(5)
    start = Net()
    file = tmp_path / "start.safetensors"
    save_file({k: v.clone() for k, v in start.state_dict().items() if k != "last.weight"}, file)
    asked = job(NET, model__weights=str(file), optimizer=STILL)
    record = launch(asked, strategy, 1 if strategy == "single" else 3, tmp_path / "out", Watcher())
    found = weights(tmp_path / "out")
    assert record.weights_from and record.weights_from["path"] == str(file)
    assert all(same(found[key], value) for key, value in start.state_dict().items())


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    state = {k: v.clone() for k, v in Net().state_dict().items() if k != "last.weight"}
    state["blocks.2.gain"][3] = float("nan")
    save_file(state, tmp_path / "start.safetensors")
    asked = job(NET, model__weights=str(tmp_path / "start.safetensors"))
    layers = build_model(asked)[0]
    with pytest.raises(JobError, match=r"blocks.2.gain: the weights have numbers .* not finite"):
        filled(layers)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("saved", [True, False])
def test_models_of_transformers_are_filled_from_their_folder(
    kind: str, saved: bool, tmp_path: Path
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 101, "num_hidden_layers": 3, "hidden_size": 24}
    sizes |= {"num_attention_heads": 3, "bos_token_id": 1, "eos_token_id": 2}
    more = {"intermediate_size": 40, "num_key_value_heads": 3} if kind == "llama" else {}
    config = AutoConfig.for_model(kind, **sizes, **more)
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config)
    (model if saved else config).save_pretrained(tmp_path / "model")
    asked = job(f"hf:{tmp_path / 'model'}")
    found, made = filled(build_model(asked)[0]), build_model(made_whole(asked))[0].tensors()
    assert found.keys() == made.keys()
    for name, value in made.items():
        if saved or not name.endswith("weight") or "norm" in name or "ln_" in name:
            assert torch.equal(found[name], value), name
        else:
            assert 0.8 < found[name].std() / value.std() < 1.25, name
