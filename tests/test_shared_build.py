"""One whole copy of a model on a host: the other ranks map it, and no file of it stays.

Started as a program, this file is one rank of such a build: it writes what it holds to
OUT/KINDN.json.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import hybrid
from hybrid.checkpoint import tensors
from hybrid.job.errors import NoRoom
from hybrid.launch.exchange import gather_objects
from hybrid.launch.local import run_ranks
from hybrid.launch.placement import Placement, find_placement
from hybrid.launch.process_group import cleanup, join_process_group
from hybrid.models import build_model
from hybrid.models import shared as shared_module
from hybrid.models.layers import Layers
from hybrid.models.losses import cross_entropy
from hybrid.models.shared import _fill, build_shared, tempfile, write_nameless
from hybrid.strategies import registry
from tests.conftest import small_job

PROGRAM = (sys.executable, "-m", "tests.test_shared_build")
GPT = {"num_layers": 3, "width": 512, "num_heads": 8, "context": 16, "vocab_size": 2003}
SIZE = 4 * (3 * (12 * 512**2 + 10 * 512) + 2 * 512 + 2003 * 512)  # bytes of parameters: 40 MiB


# --- one rank ---


def digest(tensor: torch.Tensor) -> str:
    """A hash of a tensor's bits."""
    return hashlib.sha256(tensor.detach().contiguous().view(torch.uint8).numpy()).hexdigest()


def is_mapped(tensor: torch.Tensor) -> bool:
    """Whether a tensor's memory is a mapping of the file that the first rank wrote."""
    maps = Path("/proc/self/maps").read_text()
    for low, high, name in re.findall(r"^(\w+)-(\w+) (?:\S+ +){4}(.*)$", maps, re.MULTILINE):
        if int(low, 16) <= tensor.data_ptr() < int(high, 16):
            return os.environ["TMPDIR"] in name and name.endswith(" (deleted)")
    raise AssertionError("the tensor's memory is nowhere")


def own_bytes() -> int:
    """Memory of this process alone, mapped files left out."""
    (kib,) = re.findall(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(kib) * 1024


def describe(layers: Layers, grown: int) -> dict[str, Any]:
    """What a rank holds."""
    tensors = layers.tensors()
    ties = [(a, b) for a, x in enumerate(layers) for b in range(a) if shares(x, layers[b])]
    return {
        "digests": {name: digest(t) for name, t in tensors.items()},
        "devices": sorted({t.device.type for t in tensors.values()}),
        "mapped": sorted(name for name, t in tensors.items() if is_mapped(t)),
        "trained": sorted(name for name, t in tensors.items() if t.requires_grad),
        "ties": ties,
        "grown": grown,
    }


def shares(a: nn.Module, b: nn.Module) -> bool:
    """Whether two layers hold one parameter."""
    return not set(a.parameters()).isdisjoint(b.parameters())


def frozen_gpt() -> Any:
    """A GPT whose first norm is not trained."""
    layers, loss = build_model(gpt_job())
    layers[1].norm1.requires_grad_(False)
    return layers, loss


def own_model(folder: str) -> tuple[list[nn.Module], Any]:
    """A user's own function: notes in a folder that a rank has called it."""
    (Path(folder) / f"called{os.environ['RANK']}").touch()
    return [nn.Linear(3, 4), nn.Linear(4, 2)], cross_entropy


def gpt_job() -> hybrid.Job:
    """The GPT that is shared."""
    return small_job(model={"name": "gpt", "options": GPT}, train__seed=11)


def main(out: Path) -> None:
    """Build each kind of model, describe it, and change a tensor on the last rank alone."""
    torch.set_num_threads(1)
    own = {"name": "tests.test_shared_build:own_model", "options": {"folder": str(out)}}
    ranks = find_placement()
    join_process_group(ranks)
    with torch.device("meta"):  # torch imports much when a weight is first made so
        build_model(small_job(model={"name": "gpt", "options": GPT | {"num_layers": 1}}))
    for kind, job in (("gpt", gpt_job()), ("own", small_job(model=own)), ("frozen", gpt_job())):
        if kind == "frozen":
            shared_module.build_model = lambda job: frozen_gpt()
        before = own_bytes()
        layers, _ = build_shared(job, ranks)
        found = describe(layers, own_bytes() - before)
        gather_objects(None)
        first = next(iter(layers.tensors().values()))
        if ranks.rank == ranks.world_size - 1:
            first.detach().fill_(7.0)
        gather_objects(None)
        found["after"] = digest(first)
        (out / f"{kind}{ranks.rank}.json").write_text(json.dumps(found))
    cleanup()


# --- all ranks ---


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What three ranks left; their temporary files went to its `tmp`."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "tmp").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder / "tmp"))
        run_ranks(
            3, [str(folder)], folder, program=PROGRAM, modules=["pytest", *registry.EVERY_RANK]
        )
    return folder


def read(out: Path, kind: str) -> list[dict[str, Any]]:
    """What each rank found of one kind of model."""
    return [json.loads((out / f"{kind}{rank}.json").read_text()) for rank in range(3)]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's list of mappings")
def test_later_ranks_map_what_the_first_made(out: Path) -> None:
    first, *others = read(out, "gpt")
    alone = build_model(gpt_job())[0].tensors()
    assert first["digests"] == {name: digest(t) for name, t in alone.items()}
    assert first["mapped"] == [] and first["ties"] == [[4, 0]]
    # A buffer is copied: it outlives the parameters and would keep the whole file mapped.
    parameters = sorted(name for name, t in alone.items() if isinstance(t, nn.Parameter))
    for rank in others:
        assert rank["digests"] == first["digests"]
        assert rank["mapped"] == parameters
        assert rank["devices"] == ["cpu"]
        assert rank["ties"] == [[4, 0]], "the head is a copy of the embedding"
        assert rank["trained"] == first["trained"]
        assert rank["grown"] < 0.2 * SIZE < 0.8 * SIZE < first["grown"]
    # A tensor that the last rank changes is changed for itself alone.
    assert others[0]["after"] == first["after"] == first["digests"]["0.token.weight"]
    assert others[1]["after"] != first["after"]
    left = [path.name for path in (out / "tmp").iterdir()]
    assert [name for name in left if not name.startswith("torchinductor_")] == [], "left behind"


@pytest.mark.slow
def test_what_is_not_trained_stays_so(out: Path) -> None:
    first, *others = read(out, "frozen")
    names = set(first["digests"]) - {f"{i}.attention.inverse_frequency" for i in (1, 2, 3)}
    assert set(first["trained"]) == names - {"1.norm1.weight", "1.norm1.bias"}
    assert all(r["trained"] == first["trained"] for r in others)
    assert all(r["digests"] == first["digests"] and r["mapped"] for r in others)


@pytest.mark.slow
def test_a_users_own_function_is_called_on_every_rank(out: Path) -> None:
    ranks = read(out, "own")
    assert sorted(p.name for p in out.glob("called*")) == ["called0", "called1", "called2"]
    assert all(r["digests"] == ranks[0]["digests"] and r["devices"] == ["cpu"] for r in ranks)
    assert all(r["mapped"] == [] for r in ranks)


def test_a_process_alone_makes_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_module, "write_nameless", None)
    layers, _ = build_shared(small_job(), Placement())
    assert not any(t.is_meta for t in layers.tensors().values())


def test_a_file_that_cannot_be_written_names_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", functools.partial(open, "/dev/full", "wb"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    said = f"{tmp_path}: cannot be written to: No space left on device (the tensors of the model"
    with pytest.raises(NoRoom, match=re.escape(said)):
        build_shared(small_job(), Placement(0, 2, 0))


def test_nothing_stays_when_the_rank_that_writes_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(tensors, "raw_bytes", lambda t: os.kill(os.getpid(), signal.SIGKILL))
    if (child := os.fork()) == 0:
        write_nameless({"a": torch.ones(3)})
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_may_not_open_the_file_makes_a_copy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = Placement(1, 2, 1)
    gone = [[here.host_id, "/proc/self/fd/999"], [here.host_id, ""]]
    monkeypatch.setattr(shared_module, "gather_objects", lambda value: gone)
    layers, _ = build_shared(small_job(), here)
    assert not any(t.is_meta for t in layers.tensors().values())
    assert (
        "makes a copy of the model: /proc/self/fd/999 cannot be opened" in capsys.readouterr().err
    )


def test_maps_take_no_descriptors_and_end_with_their_tensors(tmp_path: Path) -> None:
    file, held = tmp_path / "start.safetensors", Path("/proc/self/fd")
    saved = {f"layer{i}": torch.full((37 + i, 11), float(i)) for i in range(101)}
    saved |= {"none": torch.empty(0), "half": torch.ones(7, dtype=torch.bfloat16)}
    save_file(saved, file)
    gc.collect()  # what other tests left open
    before = len(list(held.iterdir()))
    found = shared_module._open(file)
    assert len(list(held.iterdir())) == before
    assert all(torch.equal(found[name], value) for name, value in saved.items())
    found["layer3"].add_(1)  # in a copy of the page
    assert torch.equal(shared_module._open(file)["layer3"], saved["layer3"])
    part = found["layer5"][1]
    del found
    gc.collect()
    maps = Path("/proc/self/maps").read_text().count(file.name)
    assert (maps, part.sum().item()) == (1, 55.0)


def test_a_file_with_other_tensors_is_refused(tmp_path: Path) -> None:
    layers, _ = build_model(small_job())
    more = {**layers.tensors(), "9.weight": torch.ones(2)}
    file = write_nameless(more)
    with torch.device("meta"):
        shape, _ = build_model(small_job())
    with pytest.raises(RuntimeError, match=r"tensors that the model has not: \['9.weight'\]"):
        _fill(shape, Path(f"/proc/self/fd/{file}"))
    os.close(file)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
