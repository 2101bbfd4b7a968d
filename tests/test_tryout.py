"""Forty things that people bring which no run could train: each is one line with its name.

Others can be trained, but not under every strategy, or not compared: these are findings.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hybrid
from hybrid.cli import main
from hybrid.job.errors import JobError, RunError, Unsupported
from hybrid.job.file import to_dict
from hybrid.models.losses import cross_entropy
from hybrid.training.check import CheckedJob, check_job, look_at_job
from tests.bad_luggage import DATA, LOSSES, MODELS

SEVERAL = ("ddp", "local_sgd", "fsdp", "zero1", "zero2", "zero3", "pipeline", "2d")
HERE = "tests.bad_luggage:"


def make_job(**changes: Any) -> hybrid.Job:
    """The plain model on plain data: batches of 12 in 48 samples, 7 steps."""
    job = {
        "model": {"name": f"{HERE}model", "options": {"kind": "plain"}},
        "data": {"name": f"{HERE}data", "options": {"kind": "plain"}},
        "optimizer": {"name": "sgd", "lr": 0.1},
        "train": {"global_batch": 12, "micro_batches": 2, "steps": 7},
    }
    return hybrid.load_job(job, {key.replace("__", "."): v for key, v in changes.items()})


def of_model(kind: str, **more: Any) -> dict[str, Any]:
    return {"model__options": {"kind": kind}, **more}


def of_loss(kind: str, last: int = 4, **more: Any) -> dict[str, Any]:
    return {"model": {"name": f"{HERE}lossy", "options": {"kind": kind, "last": last}}, **more}


def of_data(kind: str, **more: Any) -> dict[str, Any]:
    return {"data__options": {"kind": kind}, **more}


OWN = "model.name = 'tests.bad_luggage:model'"
OWN_LOSS = "model.name = 'tests.bad_luggage:lossy'"
OWN_DATA = "data.name = 'tests.bad_luggage:data'"
# name: (changes in the job, words of the line)
BAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "an input too wide": (of_model("narrow"), [OWN, "float32 [8, 16]", "cannot be multiplied"]),
    "float64": (of_model("float64"), [OWN, "0.extra is float64; valid: float32"]),
    "complex": (of_model("complex64"), [OWN, "0.extra is complex64", "view_as_real"]),
    "bfloat16": (of_model("bfloat16"), [OWN, "0.lin.weight", "are bfloat16; valid: float32"]),
    "parameters of nan": (of_model("nan parameter"), [OWN, "0.extra", "not finite"]),
    "sparse gradients": (of_model("sparse", **of_data("ids")), [OWN, "0.table", "sparse=True"]),
    "too few words": (
        of_model("few words", **of_data("ids")),
        [OWN, "IndexError", "tests/bad_luggage.py:"],
    ),
    "a loss that detaches": (of_model("detached"), [OWN, "no gradient"]),
    "a layer that detaches": (of_model("no graph"), [OWN, "no parameter gets a gradient"]),
    "a layer that raises": (
        of_model("raises"),
        [OWN, "KeyError: 'not there'", "tests/bad_luggage.py:"],
    ),
    "a complex output": (of_model("complex output"), [OWN, "RuntimeError", "ComplexFloat"]),
    "a logarithm": (of_model("logarithm"), [OWN, "layer 0 (Odd)", "not finite"]),
    "a root at zero": (of_model("root"), [OWN, "gradient of 0.lin.weight", "not finite"]),
    "a global parameter": (of_model("global"), [OWN, "shape [12]", "no layer's"]),
    "no forward": (of_model("no forward"), [OWN, "NotImplementedError", "forward"]),
    "rows that are lost": (of_model("rows lost"), [OWN, "loss raised", "float32 [7, 4]"]),
    "three values": (of_model("three"), [OWN, "must return"]),
    "a number for a layer": (of_model("no layer"), [OWN, "layer 2 is a int"]),
    "all is frozen": (of_model("frozen"), [OWN, "no parameter to train"]),
    "None": (of_model("nothing"), [OWN, "must return"]),
    "a number for a loss": (of_model("no loss"), [OWN, "loss"]),
    "an option it has not": (
        {"model__options": {"knid": 3}},
        ["model.options", "knid", "valid: kind"],
    ),
    "an option of another value": (of_model("plane"), ["tests.bad_luggage:model", "plane"]),
    "a mean": (of_loss("mean"), [OWN_LOSS, "mean where a sum", "reduction='sum'"]),
    "a mean that counts one": (of_loss("mean of one"), [OWN_LOSS, "mean where a sum"]),
    "a count of one": (of_loss("count of one"), [OWN_LOSS, "counts 1 for 8 samples"]),
    "shapes that are broadcast": (
        of_loss("broadcast", 1, **of_data("one column")),
        [OWN_LOSS, "[8, 1]", "[8]", "broadcast to [8, 8]", "squeeze"],
    ),
    "negatives in the batch": (of_loss("contrast"), [OWN_LOSS, "mixes samples"]),
    "a variance over the batch": (of_loss("batch variance"), [OWN_LOSS, "mixes samples"]),
    "a loss not reduced": (of_loss("unreduced"), [OWN_LOSS, "shape [8]", ".sum()"]),
    "a loss as a number": (of_loss("a number"), [OWN_LOSS, "a float as the sum", "gradient"]),
    "no count": (of_loss("no count"), [OWN_LOSS, "a NoneType as the count"]),
    "a loss of three values": (of_loss("three"), [OWN_LOSS, "(sum, count)"]),
    "a negative count": (of_loss("negative count"), [OWN_LOSS, "count of -8"]),
    "a count of nan": (of_loss("nan count"), [OWN_LOSS, "count of nan"]),
    "classes that are not there": (
        of_loss("classes"),
        [OWN_LOSS, "out of bounds", "tests/bad_luggage.py:"],
    ),
    "an infinite loss": (of_loss("infinite"), [OWN_LOSS, "loss of a finite output"]),
    "a loss of other shapes": (of_loss("shapes"), [OWN_LOSS, "loss raised", "size of tensor"]),
    "a trained loss": (of_loss("spread"), [OWN_LOSS, "SPREAD", "no layer's"]),
    "a sample of nan": (of_data("nan"), [OWN_DATA, "input of sample 5", "not finite"]),
    "a late sample of nan": (of_data("late nan"), [OWN_DATA, "input of sample 31"]),
    "a late infinite sample": (of_data("late infinity"), [OWN_DATA, "input of sample 31"]),
    "a target of nan": (
        {"model": {"name": "tests.test_tryout:squares"}, **of_data("nan target")},
        [OWN_DATA, "target of sample 2", "not finite"],
    ),
    "a sample that raises": (
        of_data("fails"),
        [OWN_DATA, "IndexError", "tests/bad_luggage.py:"],
    ),
    "lengths that vary": (of_data("lengths"), [OWN_DATA, "[3]", "[4]"]),
    "words": (of_data("words"), [OWN_DATA]),
    "no target": (of_data("no target"), [OWN_DATA, "sample 0"]),
    "targets of None": (of_data("targets of None"), [OWN_DATA, "None"]),
    "too many classes": (of_data("classes"), [OWN, "out of bounds"]),
    "integers for a linear map": (of_data("integers"), [OWN, "int64 [8, 16]"]),
    "an empty set": (of_data("empty"), [OWN_DATA, "train set is empty"]),
    "one set": (of_data("one set"), [OWN_DATA, "must return"]),
    "sets without a length": (of_data("no length"), [OWN_DATA, "length"]),
    "a data option it has not": ({"data__options": {"sort": 1}}, ["data.options", "valid: kind"]),
}


def squares() -> Any:
    """A regression on four numbers."""
    layers, _ = MODELS["plain"]()
    return layers, lambda output, target: (((output - target) ** 2).sum(), target.numel())


def test_there_are_forty() -> None:
    assert len(BAD) >= 40


@pytest.mark.parametrize("case", BAD)
def test_a_bad_input_is_refused_in_one_line(case: str) -> None:
    changes, words = BAD[case]
    with pytest.raises(JobError) as refused:
        check_job(make_job(**changes))
    line = str(refused.value)
    assert "\n" not in line and len(line) < 700
    assert [word for word in words if word not in line] == [], line


@pytest.mark.parametrize("command", ["train", "check"])
def test_a_command_says_the_line_and_starts_nothing(
    command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    job = tmp_path / "job.toml"
    job.write_text(
        f'model = {{name = "{HERE}lossy", options = {{kind = "mean"}}}}\n'
        f'data = {{name = "{HERE}data", options = {{kind = "plain"}}}}\n'
        'optimizer = {name = "sgd", lr = 0.1}\ntrain = {global_batch = 12, steps = 3}\n'
    )
    arguments = [command, str(job), "--nproc", "2"]
    if command == "train":
        arguments += ["--strategy", "ddp", "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["hybrid", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("hybrid:")]
    assert ended.value.code == 2 and len(said) == 1 and "mean where a sum" in said[0]
    assert not (tmp_path / "out").exists()


# name: (changes in the job, strategies that it touches, whether it bars them, words)
FOUND: dict[str, tuple[dict[str, Any], tuple[str, ...], bool, list[str]]] = {
    "noise": (
        of_model("noise"),
        SEVERAL,
        False,
        ["layer 0 (Odd)", "by randn_like", "cannot be compared"],
    ),
    "numbers of numpy": (of_model("numpy"), (), False, ["layer 0 (Odd)", "numpy or random"]),
    "numbers of random": (of_model("random"), (), False, ["layer 0 (Odd)", "numpy or random"]),
    "a state": (of_model("state"), (), False, ["layer 0 (Odd)", "state of its own"]),
    "a mean over the batch": (of_model("centred"), SEVERAL, False, ["layer 0 (Odd)", "mixes"]),
    "a batch norm": (of_model("normed"), SEVERAL, False, ["1 (BatchNorm1d)", "statistics"]),
    "a buffer that moves": (of_model("moving"), SEVERAL, False, ["buffer 0.seen", "moves"]),
    "a buffer of nan": (of_model("nan buffer"), (), False, ["buffer 0.table", "nan"]),
    "an unused layer": (
        of_model("unused"),
        ("ddp",),
        True,
        ["0.spare.weight and 0.spare.bias", "no gradient", "requires_grad_(False)"],
    ),
    "a branch": (
        of_model("branch"),
        ("ddp", "fsdp", "zero1", "zero2", "zero3", "2d"),
        True,
        ["1.a.weight", "some micro-batches of 3 samples"],
    ),
    "a scalar": (
        of_model("scalar"),
        ("fsdp", "zero1", "zero2", "zero3", "pipeline", "2d"),
        True,
        ["0.extra", "shape [1]"],
    ),
    "a frozen scalar": (
        of_model("frozen scalar"),
        ("fsdp", "zero1", "zero2", "zero3", "pipeline", "2d"),
        True,
        ["0.extra", "shape [1]"],
    ),
    "no elements": (of_model("empty"), ("fsdp", "zero3"), True, ["0.extra", "no elements"]),
    "a loss that draws": (of_loss("shaken"), (), False, ["loss draws random numbers"]),
    "data of another time": (of_data("counted"), (), False, ["sample 0", "read a second time"]),
    "a test set of nan": (of_data("nan test"), (), False, ["sample 0 of the test set"]),
    "a long warm-up": (
        {"schedule__warmup_steps": 8},
        (),
        False,
        ["schedule.warmup_steps = 8", "7 of 8 steps", "valid: 7"],
    ),
}


@pytest.mark.parametrize("case", FOUND)
def test_what_can_be_trained_all_the_same_is_found(case: str) -> None:
    changes, strategies, fatal, words = FOUND[case]
    checked = check_job(make_job(**changes))
    (found, *_) = checked.findings
    assert (found.strategies, found.fatal) == (strategies, fatal)
    assert [word for word in words if word not in found.text] == [], found.text
    assert len(checked.findings) <= 1 + fatal and all(not f.fatal for f in checked.findings[1:])
    possible = {name: can_run(checked, name) for name in ("single", "ddp", "fsdp", "zero3")}
    assert possible == {name: not (fatal and name in strategies) for name in possible}


def can_run(checked: CheckedJob, name: str) -> bool:
    try:
        checked.plan(name, 2)
    except Unsupported as error:
        assert "0.extra" in str(error) or str(error) in [f.text for f in checked.findings]
        return False
    return True


def test_parameters_without_a_gradient_bar_those_who_decay_or_wait_for_them() -> None:
    checked = check_job(make_job(**of_model("unused", optimizer__weight_decay=0.1)))
    barred = {name for name in ("single", *SEVERAL[:-1]) if not can_run(checked, name)}
    assert barred == {"ddp", "zero1", "zero2", "zero3", "pipeline"}
    (kept,) = checked.warnings("fsdp")
    assert "leaves them as they are" in kept and checked.warnings("single") == [kept]


def test_every_luggage_is_looked_at() -> None:
    jobs = [changes for changes, *_ in (*BAD.values(), *FOUND.values())]
    for key, table in (("model__options", MODELS), ("data__options", DATA)):
        assert set(table) == {job.get(key, {}).get("kind", "plain") for job in jobs} & {*table}
    losses = {job["model"].get("options", {}).get("kind") for job in jobs if "model" in job}
    assert set(LOSSES) == losses - {None}


def test_a_lone_sample_in_a_batch_norm_bars_the_layouts_that_have_one() -> None:
    def plan(strategy: str, nproc: int, **train: int) -> str:
        changed = checked.job.train.model_copy(update=train)
        job = checked.job.model_copy(update={"train": changed})
        try:
            dataclasses.replace(checked, job=job).plan(strategy, nproc)
        except Unsupported as error:
            return str(error)
        return ""

    checked = check_job(make_job(**of_model("normed")))
    assert plan("single", 1) == plan("ddp", 2) == plan("pipeline", 2) == ""
    barred = plan("ddp", 4)  # 12 samples, 4 ranks, 2 micro-batches: some have one
    assert "1 (BatchNorm1d)" in barred and "a batch of 12 samples in 8 micro-batches" in barred
    last = plan("single", 1, global_batch=47, steps=2)  # the second batch has one
    assert "a batch of 1 sample in 2 micro-batches" in last and "train.global_batch" in last
    assert plan("single", 1, global_batch=47, steps=1) == ""


def test_a_check_says_what_stands_in_the_way_of_which_strategy(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    job = tmp_path / "job.json"
    settings = make_job(**of_model("scalar"), variant__bf16={"strategy": "ddp"})
    job.write_text(json.dumps(to_dict(settings)))
    arguments = ["check", str(job), "--json", "--nproc", "2"]
    monkeypatch.setattr("sys.argv", ["hybrid", *arguments, "--set", "schedule.warmup_steps=9"])
    with pytest.raises(SystemExit) as ended:
        main()
    answer = json.loads(capfd.readouterr().out)
    assert ended.value.code == 0 and answer["ok"] and answer["nproc"] == 2
    one = answer["strategies"]
    barred = {name for name, found in one.items() if not found["possible"]}
    assert barred == {"fsdp", "zero1", "zero2", "zero3", "pipeline", "2d"}
    assert all("0.extra" in one[name]["reason"] for name in barred - {"2d"})
    assert "2 stages x 2 or more columns" in one["2d"]["reason"]
    assert [f["fatal"] for f in answer["findings"]] == [False, True]
    assert all("warmup_steps" in one[name]["warnings"][0] for name in ("single", "ddp", "bf16"))


def test_what_was_found_stands_in_the_record_and_on_the_page(tmp_path: Path) -> None:
    checked = check_job(make_job(**of_model("moving")))
    assert checked.warnings("single") == [], "it is about those that cut the batch"
    assert "0.seen" in checked.warnings("ddp")[0]
    long = make_job(schedule__warmup_steps=8, train__steps=1)
    result = hybrid.compare(long, ["single"], 1, tmp_path)
    (line,) = result.strategies["single"].warnings
    assert "schedule.warmup_steps = 8" in line
    for name in ("compare.md", "report.html", "single/record.json"):
        assert "schedule.warmup_steps = 8" in (tmp_path / name).read_text(), name


def test_a_process_alone_records_what_it_found() -> None:
    record = hybrid.train(make_job(schedule__warmup_steps=8, train__steps=1), "single")
    assert "schedule.warmup_steps = 8" in record.warnings[0]


def test_a_sample_that_is_met_later_is_named_in_its_step() -> None:
    data = {"name": "tests.test_tryout:late"}
    with pytest.raises(RunError) as failed:
        hybrid.train(make_job(data=data, train__steps=4), "single")
    assert "the input of sample 41 of the train set is not finite" in str(failed.value)
    assert "lower optimizer.lr" not in str(failed.value)


def late() -> Any:
    """A set that only gives its samples one by one, one of them not finite."""
    sets = DATA["plain"]()
    sets[0].x[41] = float("inf")
    return sets


def test_a_try_out_takes_few_samples_and_one_backward(monkeypatch: Any) -> None:
    rows, backwards = list[int](), list[int]()
    monkeypatch.setattr("tests.test_tryout.NOTED", rows.append)
    whole = torch.Tensor.backward
    monkeypatch.setattr(
        torch.Tensor, "backward", lambda t, *a, **k: (backwards.append(1), whole(t, *a, **k))[1]
    )
    look_at_job(make_job(model={"name": "tests.test_tryout:noting"}))
    assert sum(rows) <= 5 + 6 * 8 and len(backwards) == 1  # 5 find what the layers return


NOTED: Any = print


class Noting(nn.Linear):
    """A linear map that notes how many rows it is given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, 16] to [batch, 4]."""
        NOTED(len(x))
        return super().forward(x)


def noting() -> Any:
    return [Noting(16, 4)], cross_entropy


def test_a_large_model_stays_without_values() -> None:
    model = {"name": "linear", "options": {"in_features": 16, "out_features": 4_000_000}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hybrid.training.tryout.run._run", lambda *_: pytest.fail("it has values"))
        checked = check_job(make_job(model=model, data__options={"kind": "late nan"}))
    assert ["sample 31" in found.text for found in checked.findings] == [True]


class Block(nn.Module):
    """Attention over tokens with a causal mask of -inf, and nn.Dropout; nanoGPT's, in short."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.out, self.drop = nn.Linear(width, width), nn.Dropout(0.2)
        self.register_buffer("mask", torch.full((16, 16), float("-inf")).triu(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, width] to the same."""
        rows, tokens, width = x.shape
        parts = self.qkv(self.norm(x)).view(rows, tokens, self.heads, -1).transpose(1, 2)
        q, k, v = parts.chunk(3, -1)
        scores = q @ k.transpose(2, 3) / 4 + self.mask[:tokens, :tokens]
        mixed = (self.drop(scores.softmax(-1)) @ v).transpose(1, 2).reshape(rows, tokens, width)
        return x + self.drop(self.out(mixed))


class Tokens(nn.Module):
    """Embeds tokens and their places."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(61, width), nn.Embedding(16, width)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """int64 [batch, tokens] to [batch, tokens, width]."""
        return self.words(ids) + self.places(torch.arange(ids.shape[1]))


def language() -> Any:
    """A small GPT with tied embeddings."""
    first, head = Tokens(21), nn.Linear(21, 61, bias=False)
    head.weight = first.words.weight
    return [first, *[Block(21, 3) for _ in range(5)], head], cross_entropy


class Pictures(nn.Module):
    """A small ResNet with batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6))
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, 16] to [batch, 4]."""
        x = self.first(x.view(-1, 1, 4, 4))
        return self.head(torch.relu(x + self.second(x)).mean((2, 3)))


class Patches(nn.Module):
    """A small ViT with torch's own encoder, without dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.cls = nn.Linear(4, 12), nn.Parameter(torch.zeros(1, 1, 12))
        layer = nn.TransformerEncoderLayer(12, 3, 24, 0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, 16] to [batch, 4]."""
        parts = self.embed(x.view(-1, 4, 4))
        return self.head(self.encoder(torch.cat([self.cls.expand(len(x), 1, 12), parts], 1))[:, 0])


class Classifier(nn.Module):
    """A small BERT: a dict of ids and a mask of padding, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.drop, self.head = nn.Embedding(61, 12), nn.Dropout(0.3), nn.Linear(12, 4)
        self.query, self.key = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """A dict of int64 [batch, tokens] to [batch, 4]."""
        x = self.drop(self.words(batch["ids"]))
        hidden = batch["mask"][:, None, :] == 0
        scores = (self.query(x) @ self.key(x).transpose(1, 2)).masked_fill(hidden, float("-inf"))
        return self.head((scores.softmax(-1) @ x)[:, 0])


class Recurrent(nn.Module):
    """An LSTM, which returns a tuple to the layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 9, batch_first=True, num_layers=2), nn.Linear(9, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, 16] to [batch, 4]."""
        return self.head(self.lstm(x.view(-1, 4, 4))[0][:, -1])


class Physics(nn.Module):
    """The slope of a net by its input, as equations of physics ask for."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 9), nn.Tanh(), nn.Linear(9, 1, bias=False))
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, 16] to [batch, 4]."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)
        return slope[:, :4] * self.scale


class Experts(nn.Module):
    """Two experts, both of which every sample meets, in shares of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.a, self.b = nn.Linear(16, 2), nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, 16] to [batch, 4], one class of which is masked."""
        share = self.gate(x).softmax(-1)
        scores = share[:, :1] * self.a(x) + share[:, 1:] * self.b(x)
        return torch.cat([scores[:, :3], scores[:, 3:] + torch.zeros(1)], 1)


def likelihood(output: torch.Tensor, target: torch.Tensor) -> Any:
    """Gaussian, with a mean and a logarithm of the variance; its sum can be near zero."""
    mean, spread = output.chunk(2, 1)
    return (spread + (target.view(-1, 1) - mean) ** 2 / spread.exp()).sum(), target.numel() * 2


def weighted(output: torch.Tensor, target: torch.Tensor) -> Any:
    weight = torch.tensor([1.0, 2.0, 0.5, 3.0])
    return F.cross_entropy(output, target, weight, reduction="sum"), len(target)


def ordinary(kind: str) -> Any:
    """Models, losses and data as anyone has them."""
    return ORDINARY[kind][0]()


def sentences(masks: bool = False) -> Any:
    """Token ids, with the next tokens of which some do not count, or a class and a mask."""
    ids = torch.randint(61, (30, 9), generator=torch.Generator().manual_seed(1))
    samples: list[Any] = []
    for i, row in enumerate(ids):
        mask = (torch.arange(8) < 3 + i % 5).long()
        target = row[1:].masked_fill(mask == 0, -100)
        samples.append(({"ids": row[:-1], "mask": mask}, i % 4) if masks else (row[:-1], target))
    return samples, samples[:7]


PLAIN = {"name": "random", "options": {"features": 16, "classes": 4, "samples": 50}}
LANGUAGE = {"name": "tests.test_tryout:sentences"}
MASKED = {"name": "tests.test_tryout:sentences", "options": {"masks": True}}
ORDINARY: dict[str, tuple[Any, dict[str, Any]]] = {
    "language": (language, LANGUAGE),
    "pictures": (lambda: ([Pictures()], cross_entropy), PLAIN),
    "patches": (lambda: ([Patches()], cross_entropy), PLAIN),
    "classifier": (lambda: ([Classifier()], cross_entropy), MASKED),
    "recurrent": (lambda: ([Recurrent()], cross_entropy), PLAIN),
    "physics": (lambda: ([Physics()], cross_entropy), PLAIN),
    "experts": (lambda: ([Experts()], cross_entropy), PLAIN),
    "weights": (lambda: ([nn.Linear(16, 4)], weighted), PLAIN),
    "instances": (
        lambda: (
            [nn.Unflatten(1, (4, 4)), nn.InstanceNorm1d(4), nn.Flatten(), nn.Linear(16, 4)],
            cross_entropy,
        ),
        PLAIN,
    ),
    "half frozen": (
        lambda: ([nn.Linear(16, 9).requires_grad_(False), nn.Linear(9, 4)], cross_entropy),
        PLAIN,
    ),
}


@pytest.mark.parametrize("kind", ORDINARY)
def test_what_is_ordinary_gives_no_finding(kind: str) -> None:
    model = {"name": "tests.test_tryout:ordinary", "options": {"kind": kind}}
    checked = look_at_job(make_job(model=model, data=ORDINARY[kind][1]))
    found = [f.text for f in checked.findings]
    if kind == "pictures":  # a batch norm is named, and mixes, and is no other finding
        assert len(found) == 1 and "0.first.1 (BatchNorm2d)" in found[0]
    else:
        assert found == []


def test_the_module_that_a_user_keeps_is_left_as_it_was() -> None:
    before = {n: t.clone() for n, t in KEPT.state_dict().items()}
    check_job(make_job(model={"name": "tests.test_tryout:kept"}))
    assert all(torch.equal(t, before[n]) for n, t in KEPT.state_dict().items())
    assert all(p.grad is None for p in KEPT.parameters()) and KEPT.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in KEPT.modules())


KEPT = nn.Sequential(nn.Linear(16, 12), nn.BatchNorm1d(12), nn.Linear(12, 4))


def kept() -> Any:
    """Each time the same modules."""
    return [*KEPT], cross_entropy
