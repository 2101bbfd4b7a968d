"""Configs, weights and names of `hf:NAME_OR_PATH`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hybrid.job.errors import JobError
from hybrid.models import build_model
from hybrid.models.hf import hf
from hybrid.models.hf.layers import HFLayers
from hybrid.models.losses import cross_entropy

from .conftest import small_job
from .test_hf import make, write_config


def test_a_model_that_sees_later_tokens_is_refused(tmp_path: Path) -> None:
    for model_type, changes in {"bert": {"is_decoder": False}, "xlnet": {}}.items():
        folder = write_config(tmp_path / model_type, model_type, **changes)
        with pytest.raises(JobError, match="not causal: another last token") as refused:
            build_model(small_job(model={"name": f"hf:{folder}"}))
        assert "\n" not in str(refused.value)
    hf(str(tmp_path / "bert"), overrides={"is_decoder": True})


def test_a_config_alone_starts_from_the_seed(tmp_path: Path) -> None:
    job = small_job(model={"name": f"hf:{write_config(tmp_path)}"})

    def weights() -> dict[str, torch.Tensor]:
        layers, loss = build_model(job)
        assert loss is cross_entropy and isinstance(layers, HFLayers)
        assert layers.model.training and layers.model.config.use_cache is False
        return layers.tensors()

    first, second = weights(), weights()
    assert all(torch.equal(first[n], second[n]) for n in first)
    torch.manual_seed(job.train.seed)
    config = AutoConfig.from_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    after = torch.rand(1)
    assert all(torch.equal(first[n], p) for n, p in plain.named_parameters())
    build_model(job)
    assert torch.equal(torch.rand(1), after)  # looking at the model draws no numbers


def test_weights_in_a_folder_are_loaded(tmp_path: Path) -> None:
    model = make("gpt2").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    torch.manual_seed(5)
    layers, _ = hf(str(tmp_path))
    for name, p in layers.model.named_parameters():
        assert p.dtype == torch.float32 and torch.equal(p, model.get_parameter(name).float())
    fresh, _ = hf(str(tmp_path), weights=False)
    assert not torch.equal(fresh.model.transformer.wte.weight, layers.model.transformer.wte.weight)
    with pytest.raises(ValueError, match=r"its weights lack .* such as transformer\.h\.4"):
        hf(str(tmp_path), overrides={"n_layer": 5})
    with pytest.warns(UserWarning, match=r"tensors of its weights are not used, such as .*h\.3"):
        hf(str(tmp_path), overrides={"n_layer": 3})
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickled .*convert them to safetensors"):
        hf(str(tmp_path))


def test_overrides_make_the_config_anew(tmp_path: Path) -> None:
    folder = write_config(tmp_path, "gpt2")
    layers, _ = hf(folder, overrides={"num_hidden_layers": 2, "n_inner": 24})
    assert len(layers) == 4 and layers.model.config.n_layer == 2
    folder = write_config(tmp_path / "two", "qwen2", layer_types=None)
    layers, _ = hf(folder, overrides={"num_hidden_layers": 6})
    assert len(layers.model.config.layer_types) == 6
    with pytest.raises(
        ValueError, match=r"overrides\.n_layers: qwen2 has no such .*valid: .*vocab"
    ):
        hf(folder, overrides={"n_layers": 2})
    with pytest.raises(ValueError, match=r"overrides = .*hidden_size") as refused:
        hf(folder, overrides={"hidden_size": "wide"})
    assert "\n" not in str(refused.value)


def test_wrong_names_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    wrong = {
        "nobody/no-such-model": "the hub gave no config",
        "no-such-model": "the hub gave no config",
        "./no-such-folder": "there is no such folder",
        str(tmp_path / "empty"): "has no config.json",
        str(tmp_path / "broken"): "config.json",
        write_config(tmp_path / "vit", "vit"): "no causal language model of type 'vit'",
        write_config(tmp_path / "t5", "t5"): "no causal language model of type 't5'",
        write_config(tmp_path / "new", "of-tomorrow"): "of-tomorrow",
    }
    for name, words in wrong.items():
        with pytest.raises(JobError, match=re.escape(words)) as refused:
            build_model(small_job(model={"name": f"hf:{name}"}))
        assert "\n" not in str(refused.value), name
    with pytest.raises(JobError, match="valid: source, overrides, weights"):
        build_model(small_job(model={"name": "hf:x", "options": {"dtype": "bf16"}}))
