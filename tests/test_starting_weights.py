"""Weights that a job starts from: every plain form is taken, and what does not fit is one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hybrid.job.errors import JobError
from hybrid.models import build_model
from hybrid.records import Record, read
from hybrid.training.run import run_job
from tests.conftest import small_job
from tests.tied_models import own_job


def weights_of(job: Any) -> dict[str, torch.Tensor]:
    """What the job's model begins with."""
    return {name: t.detach() for name, t in build_model(job)[0].tensors().items()}


def start(path: Path, **changes: Any) -> Any:
    """The small job with the weights at a path."""
    return build_model(small_job(model__weights=str(path), **changes))[0]


def test_every_plain_form_of_weights_is_taken(tmp_path: Path) -> None:
    truth = {name: torch.rand_like(t) for name, t in weights_of(small_job()).items()}
    one, folder, index = tmp_path / "one.safetensors", tmp_path / "hf", tmp_path / "cut"
    save_file(truth, one)
    for path in (folder, index):
        path.mkdir()
    save_file(truth, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    names = sorted(truth)
    save_file({n: truth[n] for n in names[:3]}, index / "a.safetensors")
    save_file({n: truth[n] for n in names[3:]}, index / "b.safetensors")
    places = {n: "a.safetensors" if n in names[:3] else "b.safetensors" for n in names}
    listed = index / "model.safetensors.index.json"
    listed.write_text(json.dumps({"weight_map": places}))
    for path in (one, folder, index, listed):
        layers = start(path)
        assert all(torch.equal(t, truth[n]) for n, t in layers.tensors().items()), path
        assert layers.weights_from["path"] == str(path)
    rounded = {name: t.bfloat16() for name, t in truth.items()}
    save_file(rounded, tmp_path / "half.safetensors")
    layers = start(tmp_path / "half.safetensors")
    assert all(torch.equal(t, rounded[n].float()) for n, t in layers.tensors().items())


def test_every_rank_gets_them_under_every_strategy(tmp_path: Path) -> None:
    """The first loss is that of the weights, whatever the seed, and the record names them."""
    truth = {name: torch.rand_like(t) for name, t in weights_of(small_job()).items()}
    save_file(truth, tmp_path / "w.safetensors")
    losses = []
    for name, nproc in (("single", 1), ("fsdp", 4), ("pipeline", 2)):
        job = small_job(model__weights=str(tmp_path / "w.safetensors"), train__steps=1)
        record = run_job(job, name, tmp_path / name, nproc)
        assert record is not None and record.weights_from is not None
        assert record.weights_from["path"] == str(tmp_path / "w.safetensors")
        assert read(Record, tmp_path / name / "record.json") == record
        losses.append(record.steps[0].loss)
    plain = run_job(small_job(train__steps=1), "single", tmp_path / "plain", 1)
    assert plain is not None and plain.weights_from is None
    assert abs(plain.steps[0].loss / losses[0] - 1) > 0.01
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def edited(change: Any) -> dict[str, torch.Tensor]:
    """Weights of the small job with a change."""
    state = weights_of(small_job())
    change(state)
    return state


WRONG = {
    "missing": (lambda s: s.pop("2.bias"), ["has no 2.bias"]),
    "left over": (lambda s: s.update(more=torch.ones(2)), ["has more, which the model has not"]),
    "another shape": (lambda s: s.update({"2.bias": torch.ones(9)}), ["2.bias", "[9]", "[12]"]),
    "too wide": (lambda s: s.update({"2.bias": s["2.bias"].double()}), ["float64", "cannot hold"]),
    "whole numbers": (lambda s: s.update({"2.bias": s["2.bias"].long()}), ["int64"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_weights_of_another_model_are_one_line(case: str, tmp_path: Path) -> None:
    change, words = WRONG[case]
    save_file(edited(change), tmp_path / "w.safetensors")
    with pytest.raises(JobError) as refused:
        start(tmp_path / "w.safetensors")
    message = str(refused.value)
    assert message.startswith("model.weights = ") and "\n" not in message
    assert not [word for word in words if word not in message], message


def test_tied_weights_that_differ_are_refused(tmp_path: Path) -> None:
    state = build_model(own_job())[0].whole().state_dict()
    file = tmp_path / "w.safetensors"
    save_file({name: t.clone() for name, t in state.items()}, file)
    build_model(own_job(model__weights=str(file)))
    state = {name: t.clone() for name, t in state.items()}
    state["again.weight"][0, 0] += 1
    save_file(state, file)
    with pytest.raises(JobError, match=r"inner\.weight and again\.weight differ"):
        build_model(own_job(model__weights=str(file)))


PATHS: dict[str, tuple[Any, str]] = {
    "nothing": (lambda p: None, "no such file or folder"),
    "an empty folder": (lambda p: p.mkdir(), "holds no weights"),
    "text": (lambda p: p.write_text("weights"), "holds no weights"),
    "two files": (
        lambda p: (
            p.mkdir(),
            [save_file({"a": torch.ones(1)}, p / f"{n}.safetensors") for n in "ab"],
        ),
        "holds several",
    ),
    "an index to elsewhere": (
        lambda p: (
            p.mkdir(),
            (p / "m.safetensors.index.json").write_text(
                '{"weight_map": {"a": "../a.safetensors"}}'
            ),
        ),
        "is no name of a file",
    ),
    "an index of nothing": (
        lambda p: (p.mkdir(), (p / "m.safetensors.index.json").write_text("[]")),
        "has no weight_map",
    ),
    "pickles": (lambda p: (p.mkdir(), torch.save({}, p / "pytorch_model.bin")), "--trust-pickle"),
}


@pytest.mark.parametrize("case", PATHS)
def test_what_holds_no_weights_is_one_line(case: str, tmp_path: Path) -> None:
    make, words = PATHS[case]
    make(tmp_path / "w")
    with pytest.raises(JobError, match=words) as refused:
        start(tmp_path / "w")
    assert "\n" not in str(refused.value)
