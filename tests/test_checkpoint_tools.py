"""Weights of a checkpoint taken elsewhere: evaluated, exported, written from, trained on from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from hybrid.job.errors import JobError
from hybrid.job.file import load_job, to_dict
from hybrid.models import build_model
from hybrid.models.losses import Loss, cross_entropy
from hybrid.records import EvalResult, Record, from_dict, read, write
from hybrid.training.evaluating import Asked, evaluate_saved
from hybrid.training.exporting import export
from hybrid.training.generate import generate
from hybrid.training.run import run_job
from hybrid.training.saved import JobFrom, find_saved
from tests.conftest import small_job
from tests.saved import save_checkpoint

ME = "tests.test_checkpoint_tools"
TRUSTED = JobFrom(trust=True)
GPT = {
    "num_layers": 2,
    "width": 24,
    "num_heads": 3,
    "context": 16,
    "vocab_size": 257,
    "tied": True,
}
RAN: list[str] = []


class Own(nn.Module):
    """A module of a user's: a tied weight, a buffer to keep, one that is not kept."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(32, 32, bias=False)
        self.again = nn.Linear(32, 32, bias=False)
        self.again.weight = self.inner.weight
        self.head = nn.Linear(32, 10)
        self.register_buffer("kept", torch.ones(3))
        self.register_buffer("made", torch.ones(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [B, 10] of x [B, 32]."""
        return self.head(torch.tanh(self.again(torch.tanh(self.inner(x)))) * self.kept[0])


def own() -> tuple[nn.Module, Loss]:
    """The module, and that this code ran."""
    RAN.append("model")
    return Own(), cross_entropy


def listed() -> tuple[list[nn.Module], Loss]:
    """Layers in a list, two of which are tied, with buffers that are kept and one that is not."""
    first, last = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)
    last.weight = first.weight
    first.register_buffer("made", torch.ones(2), persistent=False)
    return [first, nn.BatchNorm1d(32), last], cross_entropy


def own_job(**changes: Any) -> Any:
    """The small job with the module above."""
    return small_job(model={"name": f"{ME}:own"}, **changes)


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
