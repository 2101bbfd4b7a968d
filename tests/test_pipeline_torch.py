"""A pipeline that torch runs: equal under both schedules, and whatever else a run can do."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import hybrid
from hybrid.job.errors import JobError, RunFailed, Unsupported
from hybrid.job.file import to_dict
from hybrid.layout import Layout
from hybrid.stages.checks import ModelSummary
from hybrid.strategies import pipeline, registry
from hybrid.training.progress import Watcher
from hybrid.training.run import launch
from tests.conftest import ROOT, hybrid_command, small_job
from tests.guarded import Steep
from tests.test_brought import job_of
from tests.test_guard import guarded, plan
from tests.test_pipeline_checkpoints import JOB
from tests.workloads import squared_error

TORCH, GPIPE = {"engine": "torch"}, {"schedule": "gpipe"}
VARIANTS = {
    "by_torch": {"strategy": "pipeline", **TORCH},
    "gpipe": {"strategy": "pipeline", **TORCH, **GPIPE},
}
RANKS = 4


def language_job(**changes: Any) -> hybrid.Job:
    """A GPT of 7 layers with a tied weight on the first and the last of four stages."""
    changes = {"train__micro_batches": 5, "variant": VARIANTS, **changes}
    return small_job(**{**JOB, **changes})


def unguarded(bad: list[int], model: str, changes: dict[str, Any] | None = None) -> hybrid.Job:
    """A model on points of which some are large, in four micro-batches."""
    job = to_dict(guarded(bad, "spike", model={"name": model}, variant=VARIANTS)) | {"guard": None}
    return hybrid.load_job(job, {"train.micro_batches": 4, **(changes or {})})


def of_torch(record: Any) -> dict[str, Any]:
    """The evidence of a run that torch's schedule has made."""
    assert record.status == "ok" and record.receipt.engaged, (record.reason, record.receipt)
    evidence: dict[str, Any] = record.receipt.evidence
    assert evidence["model"] == "PipelineStage" and evidence["stages"] == RANKS
    assert evidence["engine"] == "torch.distributed.pipelining.schedules"
    return evidence


def test_both_schedules_train_a_tied_model_as_one_process_does(tmp_path: Path) -> None:
    """11 samples in 5 micro-batches, dropout, clipping, and groups without decay."""
    result = hybrid.compare(language_job(), list(VARIANTS), RANKS, tmp_path)
    assert result.ok, {n: p.first_difference for n, p in result.parity.items()}
    for name, schedule in (("by_torch", "Schedule1F1B"), ("gpipe", "ScheduleGPipe")):
        parity, evidence = result.parity[name], of_torch(result.strategies[name])
        assert parity.max_loss_diff < 1e-6 and parity.max_weight_diff < 1e-5
        assert evidence["schedule"] == schedule and evidence["micro_batches"] == 5
        assert evidence["layers_by_stage"] == [[0, 1], [2, 3], [4, 5], [6]]
        assert set(evidence["ranks"][0]["tied"]) == set(evidence["ranks"][3]["tied"]) != set()


def assert_ledger(evidence: dict[str, Any], precision: str) -> None:
    """It computed in a precision, and all else was in fp32."""
    ledger = evidence["precision"]
    assert ledger["computing"] == ledger["activations"] == precision
    assert ledger["stored"] == ledger["gradients"] == ledger["master_weights"] == "fp32"


def test_a_run_in_bf16_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    changes = {"train__steps": 6, "train__precision": "bf16", "checkpoint": {"every": 2}}
    result = hybrid.compare(language_job(**changes), ["by_torch"], RANKS, tmp_path, interrupt=3)
    assert result.ok, result.parity["by_torch"]
    assert_ledger(of_torch(result.strategies["by_torch"]), "bf16")


def steep() -> tuple[list[nn.Module], Any]:
    """A layer for each of four stages; the gradients of the first two may not be finite.
    Those after them see no large number."""
    second = nn.Sequential(nn.Linear(12, 12), Steep(100.0), nn.Tanh())
    return [nn.Linear(12, 12), second, nn.Linear(12, 12), nn.Linear(12, 3)], squared_error


def test_all_stages_skip_a_step_in_which_some_overflow(tmp_path: Path) -> None:
    bad = random.Random("overflow").choice(plan(1).batch(2))
    changes = {"train.precision": "fp16", "train.clip_norm": 0.0}
    changes["optimizer"] = {"name": "sgd", "lr": 0.01}  # AdamW would hide another scale
    job = unguarded([bad], "tests.test_pipeline_torch:steep", changes)
    result = hybrid.compare(job, ["by_torch"], RANKS, tmp_path)
    assert result.ok, result.parity
    assert_ledger(of_torch(result.strategies["by_torch"]), "fp16")
    for name in ("single", "by_torch"):
        scales = [step.loss_scale for step in result.strategies[name].steps]
        assert scales == [2.0**16] * 3 + [2.0**15] * 2, name


def test_buffers_do_not_see_the_pass_by_which_torch_learns_shapes(tmp_path: Path) -> None:
    options = {"model.options": {"norm": True, "dropout": 0.3}, "train.global_batch": 17}
    options["optimizer"] = {"name": "sgd", "lr": 0.01}  # AdamW makes steps of roundings before it
    job = unguarded([], "tests.guarded:brittle", options)
    result = hybrid.compare(job, ["by_torch"], RANKS, tmp_path)
    assert result.ok, {n: p.first_difference for n, p in result.parity.items()}
    assert result.parity["by_torch"].max_weight_diff < 1e-5, "running statistics are among these"


def test_a_module_that_is_cut_gets_its_inputs_on_all_stages(tmp_path: Path) -> None:
    job = job_of("bert", variant=VARIANTS, train__micro_batches=4)
    result = hybrid.compare(job, ["by_torch"], RANKS, tmp_path)
    assert result.ok, result.parity


class Fork(nn.Module):
    """A layer that passes three tensors on, one of which has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(12, 5), nn.Linear(12, 9)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[batch, 12] to [batch, 5], [batch, 9] whose rows lie apart, and int64 [batch]."""
        return self.one(x), self.other(x).t().contiguous().t(), (x > 0).sum(1)


class Pass(nn.Module):
    """A layer that changes the first of three tensors, and watches the gradient of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 5)
        self.passes = self.seen = 0

    def see(self, gradient: torch.Tensor) -> None:
        """Count gradients: there is one for each pass."""
        self.seen += 1
        if self.seen > self.passes:
            raise ValueError(f"{self.seen} gradients of {self.passes} passes")

    def forward(self, given: Any) -> tuple[torch.Tensor, ...]:
        """[batch, 5], [batch, 9] and int64 [batch] to the same."""
        if given[0].requires_grad:
            self.passes += 1
            given[0].register_hook(self.see)
        return self.inner(given[0]), *given[1:]


class Rectify(Pass):
    """A layer that begins by changing what it is given."""

    def forward(self, given: Any) -> tuple[torch.Tensor, ...]:
        """[batch, 5], [batch, 9] and int64 [batch] to the same."""
        return super().forward((functional.relu(given[0], inplace=True), *given[1:]))


class Join(nn.Module):
    """A layer that takes three tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(15, 3)

    def forward(self, given: Any) -> dict[str, torch.Tensor]:
        """[batch, 5], [batch, 9] and int64 [batch] to a dict with [batch, 3]."""
        one, other, count = given
        return {"out": self.inner(torch.cat([one, other, count[:, None]], 1))}


def forked_error(output: dict[str, torch.Tensor], target: torch.Tensor) -> Any:
    return squared_error(output["out"], target)


def forked() -> tuple[list[nn.Module], Any]:
    """Four layers between which three tensors pass; the last returns a dict."""
    return [Fork(), Pass(), Rectify(), Join()], forked_error


def test_several_tensors_pass_between_stages(tmp_path: Path) -> None:
    job = unguarded([], "tests.test_pipeline_torch:forked")
    result = hybrid.compare(job, ["by_torch"], RANKS, tmp_path)
    assert result.ok, {n: p.first_difference for n, p in result.parity.items()}


def test_the_guard_names_rank_sample_and_layer(tmp_path: Path) -> None:
    draw = random.Random("by torch")
    step = draw.randrange(1, 4)
    sample = draw.choice([i for ids in plan(1).micro_batch_ids(step, 0) for i in ids])
    policy = {"spike_factor": 50.0, "window": 1}
    settings = TORCH | GPIPE  # which needs no more micro-batches
    job = guarded([sample], "layer", guard=policy, strategy__pipeline=settings)
    with pytest.raises(RunFailed) as raised:
        launch(job, "pipeline", RANKS, tmp_path, Watcher())
    words = f"; rank 1, sample {sample} of the train set, layer 3: its output is not finite"
    assert f"step {step}: loss " in str(raised.value) and words in str(raised.value)


class Fails(nn.Linear):
    """A layer that raises in its third forward pass in training."""

    calls = 0

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[batch, 12] to [batch, 12]."""
        self.calls += self.training
        if self.calls > 9 and self.training:
            raise ValueError("planted: no such sample")  # the line that is to be named
        return super().forward(input)


def failing() -> tuple[list[nn.Module], Any]:
    """Four layers, the third of which raises in step 1."""
    return [nn.Linear(12, 12), nn.Linear(12, 12), Fails(12, 12), nn.Linear(12, 3)], squared_error


@pytest.mark.usefixtures("without_tryout")
def test_what_a_layer_raises_is_the_first_cause(tmp_path: Path) -> None:
    """torch raises its own error in place of it, which tells the shapes of all arguments."""
    job = unguarded([], "tests.test_pipeline_torch:failing", {"train.micro_batches": 5})
    with pytest.raises(RunFailed) as raised:
        launch(job, "by_torch", RANKS, tmp_path, Watcher())
    lines = Path(__file__).read_text().splitlines()
    line = 1 + next(i for i, text in enumerate(lines) if "the line that is to be named" in text)
    words = str(raised.value)
    assert words.startswith("rank 2 on ") and "ValueError: planted: no such sample" in words
    assert f"tests/test_pipeline_torch.py:{line}" in words and "Stage 2" not in words


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (GPIPE, "engine = 'deepspeed' runs 1f1b alone; valid: '1f1b'"),
        ({"engine": "gpipe"}, "strategy.pipeline.engine = 'gpipe'"),
        (TORCH | {"schedule": "zero-bubble"}, "strategy.pipeline.schedule = 'zero-bubble'"),
    ],
)
def test_a_setting_that_no_engine_has_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(JobError) as raised:
        small_job(strategy__pipeline=settings)
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_a_file_for_deepspeed_and_too_few_micro_batches_are_refused() -> None:
    layout, summary = Layout(pp=4), ModelSummary([1, 1, 1, 1])
    few = {"train__micro_batches": 3, "train__global_batch": 12}
    with pytest.raises(Unsupported, match="as many micro-batches as stages, 4, not 3: set"):
        pipeline.check(small_job(strategy__pipeline=TORCH, **few), layout, summary)
    pipeline.check(small_job(strategy__pipeline=TORCH | GPIPE, **few), layout, summary)
    settings = ["--set", 'strategy.pipeline={engine="torch", ds_config="pipeline"}']
    path = str(ROOT / "launch/jobs/mlp.toml")
    done = hybrid_command("train", path, "--strategy", "pipeline", "--nproc", "2", *settings)
    assert done.returncode == 2 and "runs no DeepSpeed, which alone reads it" in done.stderr


@pytest.mark.parametrize(("release", "taken"), [("2.12.1", False), ("2.13.0+cu130", True)])
def test_an_earlier_torch_is_refused(
    release: str, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "version", lambda _: release)
    job, layout = small_job(strategy__pipeline=TORCH), Layout(pp=2)
    if taken:
        pipeline.check(job, layout, ModelSummary([1, 1]))
        return
    with pytest.raises(
        Unsupported, match=r"torch 2\.12\.1 is installed, and this needs 2\.13 or later"
    ):
        pipeline.check(job, layout, ModelSummary([1, 1]))


def test_ranks_import_no_deepspeed() -> None:
    names = registry.modules("pipeline", small_job(strategy__pipeline=TORCH))
    assert not [name for name in names if "deepspeed" in name]
    lines = [
        "import sys",
        "import hybrid.engines.pipeline_torch",
        "print('deepspeed' in sys.modules)",
    ]
    done = subprocess.run([sys.executable, "-c", "; ".join(lines)], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
