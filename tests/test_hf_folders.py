"""Hugging Face folders that somebody made to do harm, or that are damaged: one line, no pickle."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hybrid.data.text.tokenizers import load_tokenizer
from hybrid.models.hf import hf
from hybrid.models.hf.folder import no_pickles

from .test_hf import make

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the weights of a tiny model."""
    folder = tmp_path_factory.mktemp("good")
    make("llama").save_pretrained(folder)
    return folder


def index_to(name: Any) -> Damage:
    """Place all tensors in the file `name`, as an index does, and have such a file of pickles."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).rename(folder / "other.safetensors")
        torch.save(tensors, folder / "w.bin")
        places = dict.fromkeys(tensors, name)
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))

    return damage


def index_of(text: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / "other.safetensors")
        (folder / INDEX).write_text(text)

    return damage


def link_to(name: str, target: str) -> Damage:
    def damage(folder: Path) -> None:
        index_to("a.safetensors")(folder)
        shutil.copy(folder / "other.safetensors", folder.parent / "outside.safetensors")
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return damage


def pipe(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return damage


def config_with(**values: Any) -> Damage:
    def damage(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return damage


def weights_of(change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    def damage(folder: Path) -> None:
        file = folder / WEIGHTS
        save_file({n: change(t) for n, t in load_file(file).items()}, file, {"format": "pt"})

    return damage


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "../other"}')


NO_NAME = "is no name of a file of safetensors in this folder"
CASES: dict[str, tuple[Damage, str]] = {
    "pickle": (index_to("w.bin"), NO_NAME),
    "above": (index_to("../good/model.safetensors"), NO_NAME),
    "absolute": (index_to("/tmp/model.safetensors"), NO_NAME),
    "number": (index_to(7), NO_NAME),
    "missing": (index_to("none.safetensors"), "there is no 'none.safetensors'"),
    "long": (index_to("a" * 10**5 + ".safetensors"), "File name too long"),
    "linked out": (link_to("a.safetensors", "../outside.safetensors"), "is a link out of"),
    "linked to a pickle": (link_to("a.safetensors", "w.bin"), "header too large"),
    "endless": (link_to("a.safetensors", "/dev/zero"), "is no regular file"),
    "no json": (index_of("{"), "not a JSON file"),
    "deep": (index_of("[" * 10**5), "nested too deeply"),
    "twice": (index_of('{"weight_map": {"a": "a.safetensors", "a": "w.bin"}}'), "stands twice"),
    "list": (index_of("[]"), "has no weight_map"),
    "pipe": (pipe(WEIGHTS), "is no regular file"),
    "pipe beside": (pipe("generation_config.json"), "is no regular file"),
    "adapter": (adapter, "is an adapter of another model"),
    "config names weights": (
        config_with(transformers_weights="adapter_model.bin"),
        "transformers_weights = 'adapter_model.bin'",
    ),
    "config names code": (config_with(attn_implementation="a/b"), "names code that is not run"),
    "layers without end": (config_with(num_hidden_layers=2**70), "valid: up to 10,000"),
    "shapes": (weights_of(lambda t: torch.zeros(3)), r"of shape [3], the model's is [97, 32]"),
    "nan": (weights_of(lambda t: t * torch.nan), "its weights are not finite"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_folder_that_must_not_be_read_is_one_line(
    case: str, good: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    damage, words = CASES[case]
    folder = tmp_path / "model"
    shutil.copytree(good, folder)
    damage(folder)
    with pytest.raises(ValueError) as refused:
        hf(str(folder))
    assert words in str(refused.value) and "\n" not in str(refused.value)
    assert len(str(refused.value)) < 1000
    assert capfd.readouterr() == ("", "")  # no bar, no table, no panic of a library


def test_a_whole_folder_in_several_files_is_loaded_and_no_code_beside_it_runs(
    good: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "models--a--b" / "snapshots" / "1"
    shutil.copytree(good, folder)
    index_to("a.safetensors")(folder)
    blobs = folder.parent.parent / "blobs"  # as the hub's cache has it
    blobs.mkdir()
    (folder / "other.safetensors").rename(blobs / "1234")
    (folder / "a.safetensors").symlink_to(blobs / "1234")
    config_with(auto_map={"AutoModelForCausalLM": "evil.Evil"})(folder)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    layers, _ = hf(str(folder))
    before = load_file(good / WEIGHTS)
    assert all(torch.equal(t, layers.tensors()[name]) for name, t in before.items())
    assert not (tmp_path / "ran").exists()
    assert capfd.readouterr() == ("", "")
    with no_pickles(), pytest.raises(ValueError, match="pickled"):
        torch.load(folder / "w.bin")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"model": null}', "[" * 10**5, '{"model": {"type": "BPE"}}', "\0"],
)
def test_a_tokenizer_that_is_none_is_one_line(
    text: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Trainer"}')
    for name in (tmp_path / "tokenizer.json", tmp_path):
        with pytest.raises(ValueError, match=r"^tokenizer = ") as refused:
            load_tokenizer(str(name))
        assert "\n" not in str(refused.value)
    assert capfd.readouterr() == ("", "")


def test_a_tokenizer_of_another_type_or_that_never_ends_is_one_line(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "vocab.txt")
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    wrong = [1, None, [], {}, "", "a\0b", "x" * 10**6, str(tmp_path), "/dev/zero", "~nobody-here/x"]
    for name in [*wrong, str(loop / "x.json")]:
        with pytest.raises(ValueError, match=r"^tokenizer = ") as refused:
            load_tokenizer(name)  # type: ignore[arg-type]
        assert len(str(refused.value)) < 400
