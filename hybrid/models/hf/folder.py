"""This module looks into a Hugging Face folder before transformers reads it, since anyone made it.

transformers opens what the folder names: an index may place tensors in a pickle or in a file of
another folder, a config may name weights, adapters of another model, or code. Such a folder is
refused in one line. No torch."""

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...job.errors import JobError
from ...job.reading import read_json, require_plain, show

INDEX = "model.safetensors.index.json"
SUFFIX = ".safetensors"
LARGE = 2**28  # bytes of a JSON file: an index of a million tensors, a tokenizer's vocabulary
# Files that transformers reads where they are there.
READ = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja",
    "chat_template.json", "processor_config.json", "model.safetensors", INDEX,
)  # fmt: skip
ADAPTER = "adapter_config.json"
# By these a config has transformers read another file, or fetch code that computes attention.
NAMES_WEIGHTS = "transformers_weights"
NAMES_CODE = ("attn_implementation", "experts_implementation")
TYPES = ("auto_mappings", "configuration_auto")  # files of transformers in which it lists its types


def check_folder(folder: Path, weights: bool = False) -> None:
    """Raises ValueError, one line, where a file of the folder must not or cannot be read.

    weights: the folder's weights are going to be read too."""
    try:
        for name in READ:
            require_plain(folder / name, None if name.endswith(SUFFIX) else LARGE)
        _check_config(folder)
        if weights and (folder / ADAPTER).exists():
            raise ValueError(
                f"{ADAPTER}: this is an adapter of another model; valid: a folder of the merged "
                "model"
            )
        if weights and not (folder / "model.safetensors").is_file():
            _check_index(folder)
    except JobError as error:
        raise ValueError(str(error)) from None


def _check_config(folder: Path) -> None:
    """Raises ValueError or JobError where the config is no JSON, or names what is not read."""
    file = folder / "config.json"
    if not file.is_file():
        return
    values = read_json(file, file.name)
    if not isinstance(values, dict):
        raise ValueError(f"{file.name}: holds a {type(values).__name__}, not an object")
    for key, value in _all_items(values):
        if key == NAMES_WEIGHTS and value is not None:
            raise ValueError(
                f"{file.name}: {key} = {show(value)}: weights of this name are not read"
            )
        if key.lstrip("_").removesuffix("_internal") in NAMES_CODE and "/" in str(value):
            raise ValueError(f"{file.name}: {key} = {show(value)}: names code that is not run")
    kind = values.get("model_type")
    if isinstance(kind, str) and not _may_be_known(kind):
        raise ValueError(
            f"{file.name}: model_type = {show(kind)}: transformers has no such model, and code "
            "that a folder brings is not run; valid: a type that transformers has"
        )


def _may_be_known(kind: str) -> bool:
    """Tells whether transformers lists a type of models, as its source has it.

    Its import takes a second, and where it is imported, by whoever may have added a type, it says
    so itself."""
    found = None if "transformers" in sys.modules else importlib.util.find_spec("transformers")
    folders = found.submodule_search_locations if found else None
    if not folders:
        return True
    files = [Path(folders[0], "models", "auto", f"{name}.py") for name in TYPES]
    texts = [file.read_text() for file in files if file.is_file()]
    return not texts or any(f'"{kind}"' in text for text in texts)


def _all_items(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields the keys and values of an object and of the objects in it."""
    left = [values]
    while left:
        for key, value in left.pop().items():
            yield key, value
            if isinstance(value, Mapping):
                left.append(value)


def _check_index(folder: Path) -> None:
    """Raises ValueError unless an index names plain files of safetensors in its folder."""
    file = folder / INDEX
    if not file.is_file():
        return
    index = read_json(file, INDEX, LARGE)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{INDEX}: has no weight_map, which says in which file a tensor is")
    if not isinstance(index.get("metadata", {}), dict):
        raise ValueError(f"{INDEX}: metadata = {show(index['metadata'])}: is no object")
    for name in dict.fromkeys(map(_plain_name, places.values())):
        path = folder / name
        require_plain(path)
        if not path.exists():
            raise ValueError(f"{INDEX}: there is no {show(name)}, which it names")
        if not _is_inside(path, folder):
            raise ValueError(f"{name}: is a link out of the folder; valid: the file itself")


def _plain_name(name: Any) -> str:
    if not isinstance(name, str) or os.path.basename(name) != name or not name.endswith(SUFFIX):
        raise ValueError(
            f"{INDEX}: {show(name)} is no name of a file of safetensors in this folder"
        )
    return name


def _is_inside(path: Path, folder: Path) -> bool:
    """Tells whether a file is in its folder, or where the hub's cache keeps it: in `blobs`."""
    real, folder = path.resolve(), folder.resolve()
    cache = folder.parent.parent
    return real.is_relative_to(folder) or (
        folder.parent.name == "snapshots" and real.parent == cache / "blobs"
    )


@contextlib.contextmanager
def no_pickles() -> Iterator[None]:
    """Refuses every call of `torch.load` while the context lasts, whatever a folder names."""
    import torch

    def refuse(*_: Any, **__: Any) -> Any:
        raise ValueError("its weights are pickled; valid: safetensors")

    load, torch.load = torch.load, refuse
    try:
        yield
    finally:
        torch.load = load
