"""Pickled weights of other tools: read where they are trusted, and nothing they name is run."""

from __future__ import annotations

import io
import os
import pickle
import struct
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid.checkpoint.pickle_protocol import in_protocol_2
from hybrid.checkpoint.sources import open_weights
from hybrid.job.errors import JobError
from hybrid.models import build_model
from tests.conftest import small_job

SHAPES = {"emb.weight": (11, 6), "lin.weight": (7, 6), "lin.bias": (7,), "out.weight": (6, 7)}
RANKS = 3


class Bomb:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def truth() -> dict[str, torch.Tensor]:
    """Weights whose every number is another one."""
    torch.manual_seed(2)
    return {name: torch.rand(shape) for name, shape in SHAPES.items()}


def read_all(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor at a path, each in two ranges."""
    weights = open_weights(path, trust_pickle=True)
    found = {}
    for name, form in weights.tensors.items():
        half = form.size // 2
        parts = weights.read(name, 0, half), weights.read(name, half, form.size - half)
        found[name] = torch.cat(parts).view(form.shape)
    weights.close()
    return found


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Bit for bit, no name more or less."""
    assert found.keys() == expected.keys()
    assert not [name for name in found if not torch.equal(found[name], expected[name])]


@pytest.fixture
def deepspeeds() -> Iterator[Any]:
    """Classes with the names of DeepSpeed's, by which pickles name them, without DeepSpeed."""
    places = ("deepspeed.runtime.zero.config", "deepspeed.runtime.fp16.loss_scaler")
    parts = [module.split(".") for module in places]
    above = {".".join(words[:n]) for words in parts for n in range(1, 5)}
    kept = {name: sys.modules.get(name) for name in above}
    for module in above:
        sys.modules[module] = types.ModuleType(module)
    made = []
    for module, name in zip(places, ("ZeroStageEnum", "LossScaler"), strict=True):
        kind = type(name, (), {"__module__": module})
        setattr(sys.modules[module], name, kind)
        made.append(kind)
    made[0].__init__ = lambda self, number=0: setattr(self, "number", number)
    made[0].__reduce__ = lambda self: (made[0], (self.number,))
    yield made
    for name, module in kept.items():
        sys.modules.pop(name)
        if module is not None:
            sys.modules[name] = module


def write_zero(folder: Path, stage: int, classes: Any) -> dict[str, torch.Tensor]:
    """What DeepSpeed's `save_checkpoint` writes on three ranks in bf16; returns the fp32 weights.

    Two groups of parameters, a buffer, a frozen parameter and a tied one (deepspeed/runtime/
    engine.py, zero/stage_1_and_2.py, zero/stage3.py)."""
    weights, tag = truth(), folder / "global_step3"
    tag.mkdir(parents=True)
    (folder / "latest").write_text("global_step3")
    names = list(SHAPES)
    groups = [names[:3], names[3:]]
    frozen = torch.arange(5.0)
    module: dict[str, torch.Tensor] = OrderedDict()
    for name in (*names, "head.weight"):
        whole = weights["emb.weight" if name == "head.weight" else name].bfloat16()
        module[name] = torch.empty(0) if stage == 3 else whole
    module |= {"scale": torch.full((3,), 2.0), "frozen": frozen}
    flats = _flat_shares(weights, groups, stage)
    shapes = [OrderedDict((n, torch.Size(SHAPES[n])) for n in group) for group in groups]
    for rank in range(RANKS):
        state = {
            "module": module,
            "buffer_names": ["scale"],
            "param_shapes": shapes,
            "shared_params": {"head.weight": "emb.weight"},
            "frozen_param_shapes": {"frozen": torch.Size([5])},
            "frozen_param_fragments": {"frozen": _third(frozen, rank) if stage == 3 else frozen},
            "mp_world_size": 1,
            "dp_world_size": RANKS,
            "ds_version": "0.19.8",
        }
        if stage == 3 or rank == 0:
            part = f"zero_pp_rank_{rank}_mp_rank_00" if stage == 3 else "mp_rank_00"
            torch.save(state, tag / f"{part}_model_states.pt")
        key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
        optimizer = {key: flats[rank], "zero_stage": classes[0](stage), "partition_count": RANKS}
        optimizer["loss_scaler"] = classes[1]()
        file = tag / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": optimizer}, file)
    more = {"head.weight": weights["emb.weight"], "scale": torch.full((3,), 2.0), "frozen": frozen}
    return weights | more


def _flat_shares(
    weights: dict[str, torch.Tensor], groups: list[list[str]], stage: int
) -> list[list[torch.Tensor]]:
    """Each rank's flat partition of each group of parameters."""
    flats: list[list[torch.Tensor]] = [[] for _ in range(RANKS)]
    for group in groups:
        if stage == 3:
            for rank in range(RANKS):
                flats[rank].append(torch.cat([_third(weights[n], rank) for n in group]))
        else:
            flat = torch.cat([weights[name].reshape(-1) for name in group])
            flat = torch.cat([flat, flat.new_zeros(-len(flat) % (2 * RANKS))])
            for rank, part in enumerate(flat.chunk(RANKS)):
                flats[rank].append(part)
    return flats


def _third(whole: torch.Tensor, rank: int) -> torch.Tensor:
    """A rank's partition under ZeRO-3: of equal size, the last one padded."""
    each = -(-whole.numel() // RANKS)
    padded = torch.cat([whole.reshape(-1), whole.new_zeros(each * RANKS - whole.numel())])
    return padded[rank * each : (rank + 1) * each].clone()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_shards_make_up_the_weights(stage: int, tmp_path: Path, deepspeeds: Any) -> None:
    expected = write_zero(tmp_path / "ds", stage, deepspeeds)
    assert_equal(read_all(tmp_path / "ds"), expected)
    assert_equal(read_all(tmp_path / "ds" / "global_step3"), expected)
    last = sorted((tmp_path / "ds" / "global_step3").glob("*_optim_states.pt"))[-1]
    last.unlink()
    with pytest.raises(JobError, match="has 2 of 3"):
        read_all(tmp_path / "ds")


def test_dcp_shards_make_up_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed.checkpoint as dcp

    weights = truth()
    optimizer = {"state": {"emb.weight": {"exp_avg": torch.ones(2)}}, "lr": 0.1}
    dcp.save({"model": weights, "optim": optimizer}, checkpoint_id=tmp_path / "both", no_dist=True)
    dcp.save(dict(weights), checkpoint_id=tmp_path / "flat", no_dist=True)
    assert_equal(read_all(tmp_path / "both"), weights)
    assert_equal(read_all(tmp_path / "flat"), weights)
    (tmp_path / "flat" / "__0_0.distcp").unlink()
    with pytest.raises(JobError, match=r"__0_0\.distcp"):
        read_all(tmp_path / "flat")
    encoding = sys.modules["torch.distributed.checkpoint.metadata"]._MEM_FORMAT_ENCODING
    by_name: Any = lambda self, proto: (getattr, (encoding, self.name))  # noqa: E731
    monkeypatch.setattr(encoding, "__reduce_ex__", by_name)
    dcp.save(dict(weights), checkpoint_id=tmp_path / "by_name", no_dist=True)
    assert b"getattr" in (tmp_path / "by_name" / ".metadata").read_bytes()
    assert_equal(read_all(tmp_path / "by_name"), weights)


def test_files_of_torch_save(tmp_path: Path) -> None:
    weights = truth()
    (tmp_path / "hf").mkdir()
    torch.save(weights, tmp_path / "hf" / "pytorch_model.bin")
    torch.save({"model": weights, "epoch": 3}, tmp_path / "inner.pt")
    torch.save(weights, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for path in (tmp_path / "hf", tmp_path / "inner.pt", tmp_path / "old.pt"):
        assert_equal(read_all(path), weights)
    torch.save({**weights, "epoch": 3}, tmp_path / "more.pt")
    with pytest.raises(JobError, match="'epoch' is a int"):
        read_all(tmp_path / "more.pt")


def hide(value: Any) -> bytes:
    """A pickle in the protocol of DCP's `.metadata`."""
    return pickle.dumps(value, protocol=4)


def write_bombs(folder: Path, bomb: Path) -> dict[str, Path]:
    """Files of each kind that name a function to run."""
    folder.mkdir()
    paths = {kind: folder / kind for kind in ("torch.pt", "plain.pt", "dcp", "zero", "tensor.pt")}
    torch.save({"a": Bomb(bomb)}, paths["torch.pt"])
    paths["plain.pt"].write_bytes(pickle.dumps(Bomb(bomb)))
    paths["dcp"].mkdir()
    (paths["dcp"] / ".metadata").write_bytes(hide(Bomb(bomb)))
    paths["zero"].mkdir()
    torch.save(Bomb(bomb), paths["zero"] / "mp_rank_00_model_states.pt")
    buffer = io.BytesIO()
    torch.save({"model": {"a": Bomb(bomb)}}, buffer, _use_new_zipfile_serialization=False)
    paths["tensor.pt"].write_bytes(buffer.getvalue())
    return paths


def test_a_pickle_that_names_code_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb"
    for path in write_bombs(tmp_path / "files", bomb).values():
        with pytest.raises(JobError, match="--trust-pickle"):
            open_weights(path)
        with pytest.raises(JobError) as refused:
            open_weights(path, trust_pickle=True)
        assert "\n" not in str(refused.value) and "refuses it" in str(refused.value), path
        assert not bomb.exists(), path


def test_a_latest_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ds").mkdir()
    torch.save({}, tmp_path / "mp_rank_00_model_states.pt")
    torch.save({}, tmp_path / "ds" / "x_model_states.pt")
    for text in ("..", "../", str(tmp_path), "a/b"):
        (tmp_path / "ds" / "latest").write_text(text)
        with pytest.raises(JobError, match="latest names no folder in it"):
            open_weights(tmp_path / "ds", trust_pickle=True)


def test_a_job_takes_them_only_with_the_flag(tmp_path: Path) -> None:
    layers, _ = build_model(small_job())
    weights = {name: torch.rand_like(t) for name, t in layers.tensors().items()}
    torch.save(weights, tmp_path / "w.bin")
    changes: dict[str, Any] = {"model__weights": str(tmp_path / "w.bin")}
    with pytest.raises(JobError, match="--trust-pickle"):
        build_model(small_job(**changes))
    layers, _ = build_model(small_job(**changes, launch__trust_pickle=True))
    assert_equal({n: t.detach() for n, t in layers.tensors().items()}, weights)


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_in_protocol_2_says_the_same(protocol: int) -> None:
    value = {"a": [1, 2.5, None, True, "text", "text"], "b": OrderedDict(x=(1, 2, 3, 4), y=())}
    value["c"] = [torch.Size([2, 3]), value["b"], 2**40, "\u2028", list(range(300))]
    again = in_protocol_2(pickle.dumps(value, protocol))
    assert pickle.loads(again) == value
    assert again[:2] == b"\x80\x02"


def test_a_global_whose_name_is_made_up_is_no_pickle() -> None:
    name = struct.pack("<B", 9) + b"os\nsystem"
    for program in (b"\x80\x04\x8c" + name + b"\x8c\x06system\x93.", b"\x80\x04NN\x93.", b"\x80"):
        with pytest.raises(ValueError):
            in_protocol_2(program)
