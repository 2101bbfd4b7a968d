"""Weights of a checkpoint taken elsewhere: evaluated, exported, written from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from hybrid.job.errors import JobError
from hybrid.job.file import load_job, to_dict
from hybrid.models import build_model
from hybrid.records import EvalResult, Record, from_dict, write
from hybrid.training.evaluating import Asked, evaluate_saved
from hybrid.training.exporting import export
from hybrid.training.generate import generate
from hybrid.training.run import run_job
from hybrid.training.saved import JobFrom, find_saved
from tests.conftest import small_job
from tests.saved import save_checkpoint
from tests.tied_models import GPT, ME, RAN, Own, own_job

TRUSTED = JobFrom(trust=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Record]:
    """A run of FSDP on four ranks, whose batches do not divide, and its record."""
    out = tmp_path_factory.mktemp("fsdp")
    job = small_job(
        checkpoint={"every": 4}, train__micro_batches=3, optimizer={"name": "adamw", "lr": 0.01}
    )
    record = run_job(job, "fsdp", out, 4)
    assert record is not None
    return out, record


@pytest.mark.parametrize(("strategy", "nproc"), [("fsdp", 4), ("single", 1), ("ddp", 3)])
def test_its_evaluation_is_the_runs(
    run: tuple[Path, Record], strategy: str, nproc: int, tmp_path: Path
) -> None:
    out, record = run
    assert record.eval is not None and record.checkpoint is not None
    found = evaluate_saved(Asked(out, strategy, JobFrom(), tmp_path, nproc))
    assert found is not None
    assert found == json.loads((tmp_path / "eval.json").read_text())
    assert found["checkpoint"]["state_hash"] == record.checkpoint.state_hash
    assert (found["strategy"], found["world_size"]) == (strategy, nproc)
    assert found["loss"] == pytest.approx(record.eval.loss, rel=1e-6)
    fields = EvalResult.__dataclass_fields__
    result = from_dict(EvalResult, {key: found[key] for key in fields})
    if strategy == "fsdp":
        assert result == record.eval
    assert result.samples == 37 and result.prediction_digest == record.eval.prediction_digest


def test_an_earlier_step_and_the_final_weights(run: tuple[Path, Record], tmp_path: Path) -> None:
    out, record = run
    early = evaluate_saved(
        Asked(out / "checkpoints" / "step-00000004", "single", JobFrom(), tmp_path)
    )
    last = evaluate_saved(Asked(out / "checkpoints" / "final", "single", JobFrom(), tmp_path))
    assert early is not None and last is not None and record.eval is not None
    assert abs(early["loss"] / record.eval.loss - 1) > 1e-4  # else the steps would be one
    assert last["loss"] == pytest.approx(record.eval.loss, rel=1e-6)
    assert last["checkpoint"]["state_hash"] is None and last["checkpoint"]["step"] == 6


def test_no_optimizer_state_is_needed(run: tuple[Path, Record], tmp_path: Path) -> None:
    """Nor that the job's optimizer is the one that made it."""
    given = JobFrom(overrides=["optimizer.name=sgd"])
    found = evaluate_saved(Asked(run[0], "single", given, tmp_path))
    assert found is not None and run[1].eval is not None
    assert found["loss"] == pytest.approx(run[1].eval.loss, rel=1e-6)


def test_a_model_of_another_shape_is_one_line(run: tuple[Path, Record], tmp_path: Path) -> None:
    for sizes, words in (([32, 24, 16, 10], "has 3.bias"), ([32, 25, 16, 12, 10], "has shape")):
        given = JobFrom(overrides=[f"model.options.sizes={sizes}"])
        with pytest.raises(JobError, match=words) as refused:
            export(run[0], str(tmp_path / "file"), given)
        assert "\n" not in str(refused.value) and list(tmp_path.iterdir()) == []


def test_an_exported_module_is_what_load_state_dict_takes(tmp_path: Path) -> None:
    folder, file = save_checkpoint(tmp_path / "run", own_job()), tmp_path / "own.safetensors"
    found = export(folder, str(file), TRUSTED)
    module = Own()
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.fill_(7)
    exported = load_file(file)
    module.load_state_dict(exported, strict=True)
    saved = build_model(own_job())[0].whole()
    for name, tensor in saved.state_dict().items():
        assert torch.equal(module.state_dict()[name], tensor), name
    assert set(exported) == {"inner.weight", "again.weight", "head.weight", "head.bias", "kept"}
    assert (found["tensors"], found["bytes"]) == (5, file.stat().st_size)
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_an_exported_file_starts_another_run(tmp_path: Path) -> None:
    job = small_job(model={"name": "gpt", "options": GPT}, data={"name": "text"})
    folder, file = save_checkpoint(tmp_path / "run", job), tmp_path / "gpt.safetensors"
    export(tmp_path / "run", str(file), JobFrom())
    layers, _ = build_model(load_job(to_dict(job), {"model.weights": str(file), "train.seed": 5}))
    truth, _ = build_model(job)
    for name, tensor in truth.tensors().items():
        assert torch.equal(layers.tensors()[name], tensor), name
    assert layers.weights_from == {
        "path": str(file),
        "kind": "safetensors",
        "tensors": len(truth.tensors()),
    }
    layers, _ = build_model(load_job(to_dict(job), {"model.weights": str(folder)}))
    assert layers.weights_from is not None and layers.weights_from["step"] == 6


@pytest.mark.parametrize("name", ["gpt", f"{ME}:listed"])
def test_exported_layers_are_what_a_sequential_takes(name: str, tmp_path: Path) -> None:
    options = GPT if name == "gpt" else {}
    job = small_job(model={"name": name, "options": options}, data={"name": "random"})
    folder, file = save_checkpoint(tmp_path / "run", job), tmp_path / "out.safetensors"
    export(folder, str(file), TRUSTED)
    layers, truth = build_model(job)[0], build_model(job)[0].whole().state_dict()
    module = nn.Sequential(*layers)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.zero_()
    module.load_state_dict(load_file(file), strict=True)
    found = module.state_dict()
    assert found.keys() == truth.keys()
    assert not [key for key in truth if not torch.equal(found[key], truth[key])]


def test_nothing_that_is_there_is_written_over(tmp_path: Path) -> None:
    folder, file = save_checkpoint(tmp_path / "run", small_job()), tmp_path / "file"
    file.write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for path in (file, tmp_path, tmp_path / "link"):
        with pytest.raises(JobError, match="is there already"):
            export(folder, str(path), JobFrom())
    assert file.read_text() == "mine" and not (tmp_path / "gone").exists()


@pytest.mark.parametrize("to", ["deepspeed-universal", "dcp", "dcp:out", "deepspeed-universal:a/b"])
def test_a_format_of_pickles_is_refused(to: str, tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"--to .*pickle") as refused:
        export(tmp_path, to, JobFrom())
    assert "\n" not in str(refused.value)


def make_tiny(folder: Path, tied: bool) -> Any:
    """A tiny llama of random weights in a folder, with a file for generation."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 3, "num_key_value_heads": 3, "vocab_size": 101}
    config = AutoConfig.for_model("llama", tie_word_embeddings=tied, **sizes)
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"max_new_tokens": 7}))
    (folder / "evil.py").write_text("raise SystemExit")


@pytest.mark.parametrize("tied", [False, True])
def test_an_exported_hugging_face_folder_has_equal_logits(tied: bool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, GenerationConfig

    make_tiny(tmp_path / "source", tied)
    options = {"weights": False}  # random ones, other than the folder's
    job = small_job(model={"name": f"hf:{tmp_path / 'source'}", "options": options})
    save_checkpoint(tmp_path / "run", job)
    export(tmp_path / "run", str(tmp_path / "out"), JobFrom())
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"config.json", "model.safetensors", "generation_config.json"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    truth = build_model(job)[0].whole().eval()
    ids = torch.arange(10).reshape(2, 5)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, truth(ids))
    assert (
        model.config.use_cache
        and GenerationConfig.from_pretrained(tmp_path / "out").max_new_tokens == 7
    )
    again = {"name": f"hf:{tmp_path / 'out'}", "weights": str(tmp_path / "run")}
    build_model(small_job(model=again))


FIELDS = {
    "model.name": {"model": {"name": "os:getcwd"}},
    "data.name": {"data": {"name": "os.path:join"}},
    "optimizer.name": {"optimizer": {"name": "os:system", "lr": 0.1}},
    "schedule.name": {"schedule": {"name": "os:system"}},
    "train.metrics": {"train__metrics": ["os:system"]},
    "variant.a.strategy": {"variant": {"a": {"strategy": "os.path"}}},
}


@pytest.mark.parametrize("field", FIELDS)
def test_code_that_a_folder_names_needs_trust(field: str, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "run", small_job())
    from tests.saved import edit

    job = to_dict(small_job(**FIELDS[field]))
    edit(folder, lambda values: values.update(job=job))
    commands = (
        lambda given: export(folder, str(tmp_path / "file"), given),
        lambda given: evaluate_saved(Asked(folder, "single", given, tmp_path / "out")),
        lambda given: generate(folder),
    )
    for command in commands:
        with pytest.raises(JobError, match="--trust") as refused:
            command(JobFrom())
        assert field in str(refused.value) and "os" in str(refused.value)
        assert "\n" not in str(refused.value)
    key = field.partition("[")[0]
    if field != "variant.a.strategy":  # what the command line names is the user's own
        with pytest.raises(JobError) as refused:
            find_saved(folder, JobFrom(overrides=["train.seed=1"]))
        value = '["os:system"]' if field == "train.metrics" else "os:getcwd"
        find_saved(folder, JobFrom(overrides=[f"{key}={value}"]))
    assert find_saved(folder, TRUSTED).manifest is not None
    file = tmp_path / "mine.json"
    write(job, file)
    assert find_saved(folder, JobFrom(job=file)).job.train == small_job(**FIELDS[field]).train


def test_a_folder_that_is_not_trusted_runs_nothing(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "run", own_job())
    RAN.clear()
    with pytest.raises(JobError, match=f"model.name = '{ME}:own'"):
        export(folder, str(tmp_path / "file"), JobFrom())
    assert RAN == []
    export(folder, str(tmp_path / "file"), TRUSTED)
    assert RAN


def test_text_is_written_from_a_step_too(tmp_path: Path) -> None:
    job = small_job(
        model={"name": "gpt", "options": GPT}, data={"name": "text", "options": {"context": 12}}
    )
    folder = save_checkpoint(tmp_path / "run", job)
    text = generate(folder, "def", 3, temperature=0)
    assert text.startswith("def") and generate(tmp_path / "run", "def", 3, temperature=0) == text
