"""Forty things that people bring which no run could train: each is one line with its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hybrid.cli import main
from hybrid.job.errors import JobError
from hybrid.training.check import check_job
from tests.bad_luggage import MODELS
from tests.tryout_jobs import HERE, make_job, of_data, of_loss, of_model

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
        {"model": {"name": "tests.test_tryout_refused:squares"}, **of_data("nan target")},
        [OWN_DATA, "target of sample 2", "not finite"],
    ),
    "a sample that raises": (
        of_data("fails"),
        [OWN_DATA, "IndexError", "tests/bad_data.py:"],
    ),
    "lengths that vary": (of_data("lengths"), [OWN_DATA, "[3]", "[4]"]),
    "words": (of_data("words"), [OWN_DATA]),
    "no target": (of_data("no target"), [OWN_DATA, "sample 0"]),
    "targets of None": (of_data("targets of None"), [OWN_DATA, "None"]),
    "too many classes": (
        of_data("classes"),
        [OWN_DATA, OWN, "train sample 4 is 4", "valid: 0 to 3, or -100"],
    ),
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
