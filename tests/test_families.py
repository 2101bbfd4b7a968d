"""Twelve families of Hugging Face models under five strategies, against plain transformers: each
model trained by a loop that uses nothing of this project."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from hybrid import records
from hybrid.engines.layers import prepare_layers
from hybrid.engines.optimizer import no_decay_names
from hybrid.job.file import load_job
from hybrid.launch.local import run_ranks
from hybrid.launch.warm import warm_ranks
from hybrid.models import build_model
from hybrid.models.dropout import Dropout
from hybrid.strategies import registry
from tests.conftest import ROOT
from tests.workloads import sentences

STEPS = 2  # the second has what the first one's update led to
NPROC = {"ddp": 2, "fsdp": 2, "zero3": 2, "pipeline": 3, "2d": 4}
FAMILIES = (
    *("gpt2", "llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "olmo2"),
    *("gpt_neox", "mixtral", "gpt_oss"),
)
MODULES = [family.removesuffix("_text") for family in FAMILIES]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A configuration alone of each family, without dropout."""
    from transformers import AutoConfig

    fields = json.loads((ROOT / "benchmarks" / "hf_tiny_configs.json").read_text())
    made = {}
    for family in FAMILIES:
        own = {k: v for k, v in fields[family].items() if k != "model_type"}
        config = AutoConfig.for_model(family, **own)
        for name, value in config.to_dict().items():
            if "drop" in name and isinstance(value, float):
                setattr(config, name, 0.0)
        made[family] = tmp_path_factory.mktemp("configs") / family
        config.save_pretrained(made[family])
    return made


@pytest.fixture(scope="module")
def plain(folders: dict[str, Path]) -> dict[str, list[tuple[float, float]]]:
    """Loss and gradient norm of each step of each family."""
    return {family: plain_loop(folder) for family, folder in folders.items()}


def plain_loop(folder: Path) -> list[tuple[float, float]]:
    """What anyone would write."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    samples = [sentences(16)[0][i] for i in range(16)]
    ids, target = (torch.stack(x) for x in zip(*samples, strict=True))
    found = []
    for _ in range(STEPS):
        logits = model(ids, use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1), target.flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append((loss.item(), norm.item()))
    return found


def write_job(folder: Path, file: Path) -> Path:
    """A job on one full batch in two micro-batches a rank."""
    job: dict[str, Any] = {
        "model": {"name": f"hf:{folder}"},
        "data": {"name": "tests.workloads:sentences", "options": {"size": 16}},
        "optimizer": {"name": "adamw", "lr": 1e-3, "weight_decay": 0.1},
        "train": {"global_batch": 16, "micro_batches": 2, "steps": STEPS, "clip_norm": 1.0},
    }
    file.write_text(json.dumps(job))
    return file


def test_what_lies_outside_the_decoder_layers_is_not_forgotten(folders: dict[str, Path]) -> None:
    job = load_job(
        {
            "model": {"name": f"hf:{folders['gpt2']}"},
            "data": {"name": "tests.workloads:sentences"},
            "optimizer": {"name": "adamw", "lr": 1e-3},
            "train": {"global_batch": 2, "steps": 1},
        }
    )
    layers, _ = build_model(job)
    spared = no_decay_names(layers, ["norms", "embeddings"])
    outside = {"transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.weight"}
    assert outside < spared and "transformer.h.0.mlp.c_fc.weight" not in spared
    prepare_layers(job, layers)
    dropouts = [m for m in layers.modules() if isinstance(m, torch.nn.Dropout)]
    assert len(dropouts) > 1 and all(type(m) is Dropout for m in dropouts)
    assert [m.place for m in dropouts if isinstance(m, Dropout)] == list(range(len(dropouts)))


@pytest.fixture(scope="module")
def imported_once() -> Iterator[list[str]]:
    """A warm process of this file's own, and what it imports: the families' modules."""
    with warm_ranks(fresh=True), warm_ranks():
        yield [f"transformers.models.{family}.modeling_{family}" for family in MODULES]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("strategy", NPROC)
def test_families_agree_with_plain_transformers(
    strategy: str,
    family: str,
    folders: dict[str, Path],
    plain: dict[str, Any],
    imported_once: list[str],
    tmp_path: Path,
) -> None:
    arguments = ["train", str(write_job(folders[family], tmp_path / "job.json"))]
    arguments += ["--strategy", strategy, "--out", str(tmp_path), "--parent", str(os.getpid())]
    modules = [*imported_once, *registry.modules(strategy)]
    run_ranks(NPROC[strategy], arguments, tmp_path, modules=modules)
    record = records.read(records.Record, tmp_path / "record.json")
    assert record.receipt and record.receipt.engaged
    pairs = list(zip(record.steps, plain[family], strict=True))
    loss = max(abs(step.loss - want) / want for step, (want, _) in pairs)
    norm = max(abs((step.grad_norm or 0) - want) / want for step, (_, want) in pairs)
    assert loss < 1e-6 and norm < 1e-4, (loss, norm)
