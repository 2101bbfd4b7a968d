"""What ranks tell one another comes out as it went in, and none of it is run."""

from __future__ import annotations

import ast
import json
import math
import pickle
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pytest
import torch

from hybrid.checkpoint.manifest import Entry, FilePiece, Manifest
from hybrid.job.errors import JobError, Refused, RunError, Unsupported
from hybrid.launch.exchange import gather_by
from hybrid.launch.serialization import dumps, loads
from hybrid.records import StepRecord
from hybrid.training import step_log  # noqa: F401, whose records travel
from hybrid.training.resume import Chosen, Start
from tests.conftest import ROOT

ENTRY = Entry("F32", (3, 7), [FilePiece("a", "b", 0, 21), FilePiece("a", "c", 0, 2, ((0,), (2,)))])
VALUES: list[Any] = [
    None, True, 1, 2**80, -0.0, 0.1, 5e-324, math.inf, "", "é\ud800", b"\0\xff", [], (), {}, set(),
    {1: "int", (2, "b"): [None], None: {3.5: {}}, "dict": {"dict": 1}}, [{"float": "x"}],
    frozenset({1, (2,)}), Path("a/b"), torch.bfloat16, ENTRY,
    StepRecord(1, math.inf, None, 0.1, 4, "f"),
    Start(Chosen(Path("x"), Manifest({"step": 3}, {("w", "weight"): ENTRY}), ["a note"])),
]  # fmt: skip


def same(a: Any, b: Any) -> bool:
    """Equal, and of equal types all the way down."""
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return type(b) is dict and same([*a.items()], [*b.items()])
    return type(a) is type(b) and a == b and repr(a) == repr(b)


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_values_come_out_as_they_went_in(value: Any) -> None:
    assert same(loads(dumps(value)), value)
    json.loads(dumps([value, -math.inf]), parse_constant=pytest.fail)


def test_a_nan_keeps_its_bits() -> None:
    for bits in (b"\x7f\xf8\0\0\0\0\0\x2a", b"\xff\xf8\0\0\0\0\0\0"):
        (value,) = struct.unpack(">d", bits)
        assert struct.pack(">d", loads(dumps(value))) == bits


def test_numbers_of_other_libraries_become_python_s() -> None:
    given = [numpy.float64(0.1), numpy.float32(0.1), numpy.int64(-3), torch.Size([2, 3])]
    wanted = [0.1, float(numpy.float32(0.1)), -3, (2, 3)]
    assert same(loads(dumps(given)), wanted)


def test_errors_stay_what_they_are() -> None:
    for error in (
        JobError("a"),
        Refused("b"),
        Unsupported("c"),
        ModuleNotFoundError("d", name="e"),
    ):
        found = loads(dumps(error))
        assert type(found) is type(error) and str(found) == str(error)
    assert found.name == "e"

    class Own(JobError):
        """No other rank may know it."""

    assert type(loads(dumps(Own("why")))) is JobError


class _Own(NamedTuple):
    number: int


@pytest.mark.parametrize(
    "value",
    [_Own(1), object(), torch.zeros(2), ValueError("x"), 1j],
    ids=lambda v: type(v).__name__,
)
def test_what_is_not_sendable_is_refused_where_it_is_sent(value: Any) -> None:
    with pytest.raises(TypeError, match="cannot be sent to other ranks"):
        dumps({"a": [value]})


class _Runs:
    def __reduce__(self) -> Any:
        return pytest.fail, ("a pickle was read",)


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps(_Runs()),
        b'{"object": ["os.system", ["true"]]}',
        b'{"object": ["hybrid.job.errors.JobError", ["x"]]}',
        b'{"error": ["hybrid.checkpoint.manifest.Entry", [1, 2, 3], null]}',
        b'{"object": ["hybrid.checkpoint.manifest.Entry", [1]]}',
        b'{"dtype": "load"}',
        b'{"tuple": [1], "set": [2]}',
        b"{}",
        b'{"pickle": "gASVAAAA"}',
        b"NaN",
        b"[" * 100_000,
        b"",
    ],
)
def test_what_no_rank_sends_is_refused(data: bytes) -> None:
    with pytest.raises(RunError, match="a rank sent what no rank of this run sends"):
        loads(data)


def test_four_ranks_get_all_values_of_unlike_lengths() -> None:
    values = [None, [1.5] * 7, {"a": (2, math.inf)}, "é"]
    sent = [torch.frombuffer(bytearray(dumps(value)), dtype=torch.uint8) for value in values]
    longest = max(map(len, sent))

    def all_gather(mine: torch.Tensor) -> list[torch.Tensor]:
        if mine.dtype == torch.int64:
            return [torch.tensor([len(one)]) for one in sent]
        assert mine.shape == (longest,)
        return [torch.cat([one, one.new_zeros(longest - len(one))]) for one in sent]

    assert gather_by(all_gather, values[2], torch.device("cpu")) == values


UNPICKLE = {f"{kind}_object" for kind in ("all_gather", "gather", "broadcast", "scatter")}
UNPICKLE |= {f"{kind}_object_list" for kind in ("broadcast", "scatter", "send", "recv")}


def test_nothing_of_ours_unpickles_what_ranks_send() -> None:
    """Data sets and checkpoints have tests of their own."""
    for file in (ROOT / "hybrid").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute):
                loads = node.attr in ("load", "loads") and ast.unparse(node.value) == "pickle"
                assert node.attr not in UNPICKLE and not loads, f"{file}:{node.lineno}"
