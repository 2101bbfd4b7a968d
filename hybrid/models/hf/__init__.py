"""This package makes a model of any decoder-only causal language model of transformers.

A job names it by `model.name = "hf:NAME_OR_PATH"`. For every causal type of transformers,
`benchmarks/hf_models.md` says whether it can be cut into stages and whether the stages compute what
the whole model computes."""

import contextlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...job.reading import show
from ...launch.hushed import hushed
from ..first_values import KEY, is_making
from ..losses import Loss, cross_entropy
from ..presets import MOST_LAYERS
from .folder import check_folder, no_pickles
from .layers import HFLayers
from .probe import NotOnMeta, probe

LAYER_DROP = ("layerdrop", "decoder_layerdrop")  # the config fields that set it
LONGEST = 300  # characters shown of a message of transformers, which may list all its models


def hf(
    source: str, overrides: Mapping[str, Any] | None = None, weights: bool | None = None
) -> tuple[HFLayers, Loss]:
    """Makes the model that `source` names: a folder with a config.json, or a name on the hub.

    `overrides` are fields of its config to change. `weights` says whether to load its weights
    (safetensors only) or to start from random ones; by default, they are loaded where there are
    any. The model is in fp32. Its loss is the cross-entropy of logits [B, T, V] against the next
    tokens int64 [B, T], with -100 for a target that does not count.

    Under `torch.device("meta")`, and where `hybrid.models.first_values` is to give the values,
    nothing is loaded, and the caller fills in all that is there by name. Raises NotOnMeta where
    that would not give the same model, and a ValueError of one line for anything else wrong."""
    making = is_making()
    on_meta = making or torch.get_default_device().type == "meta"
    _check(source, weights is not False)
    config = _make_config(source, overrides or {})
    load = _has_weights(source) if weights is None else weights
    try:
        model = _make_model(source, config, load and not on_meta)
    except Exception as error:  # a family's own code may raise anything
        if on_meta:
            raise NotOnMeta(_one_line(error)) from error
        raise ValueError(f"source = {source!r}: {_one_line(error)}") from error
    try:
        layers = as_layers(model)
        layers.saved_in = _folder_of_weights(source) if making and load else None
        return layers, cross_entropy
    except ValueError as error:
        raise ValueError(f"source = {source!r}, a {config.model_type}: {error}") from error


def _folder_of_weights(source: str) -> Path:
    if not Path(source).is_dir():
        raise ValueError(f"{KEY}: is for a folder; download it first, or leave on_meta out")
    return Path(source)


def as_layers(model: Any) -> HFLayers:
    """Makes layers of a causal language model of transformers, which is changed in place.

    It then keeps no cache, and parameters that have no part in the logits do not train."""
    configs = _all_configs(model.config)
    for config in configs:
        config.use_cache = False
        if getattr(config, "output_router_logits", False):
            config.output_router_logits = False
            warnings.warn("output_router_logits: the router's loss is not trained", stacklevel=2)
    wrong = {str(p.dtype) for p in model.parameters() if p.dtype != torch.float32}
    if wrong:
        raise ValueError(f"it has parameters in {', '.join(sorted(wrong))}; valid: torch.float32")
    _complete_meta(model)
    text = model.config.get_text_config()
    plan = probe(model, text.vocab_size, getattr(text, "pad_token_id", None))
    dropped = [key for key in LAYER_DROP if any(getattr(c, key, 0) for c in configs)]
    if dropped:
        plan.problem = f"{dropped[0]} is not 0, so that a stage's layers may be skipped"
    _freeze_unused(model, plan.unused)
    return HFLayers(model.train(), plan)


def _check(source: str, weights: bool) -> None:
    """Raises ValueError where a folder has what must not, or cannot, be read."""
    if not isinstance(source, str) or not source or "\0" in source:
        raise ValueError(f"source = {source!r}: is no name of a folder or on the hub")
    try:
        if Path(source).is_dir():
            check_folder(Path(source), weights)
    except (OSError, ValueError) as error:  # OSError: such as a name that is too long
        words = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"source = {show(source)}: {words}") from None


def _make_config(source: str, overrides: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig, PreTrainedConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    here = Path(source).is_dir()
    if here and not Path(source, "config.json").is_file():
        raise ValueError(f"source = {source!r}: this folder has no config.json")
    if not here and (source[0] in "./~" or source.count("/") > 1):
        raise ValueError(f"source = {source!r}: there is no such folder")
    try:
        with hushed() if here else contextlib.nullcontext():
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
            fields, _ = PreTrainedConfig.get_config_dict(source)
    except Exception as error:  # a config's own code may raise anything
        words = f"config.json: {_one_line(error)}"
        if not here and isinstance(error, OSError):
            words = "no folder here has this name, and the hub gave no config (is there a network?)"
        raise ValueError(f"source = {source!r}: {words}") from error
    if config.model_type not in CAUSAL:
        raise ValueError(
            f"source = {source!r}: transformers has no causal language model of type "
            f"{config.model_type!r}; benchmarks/hf_models.md lists those that it has"
        )
    config = _override(config, fields, overrides) if overrides else config
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and layers > MOST_LAYERS:
        words = f"num_hidden_layers = {show(layers)}: valid: up to {MOST_LAYERS:,}"
        raise ValueError(f"source = {source!r}: {words}")
    return config


def _override(config: Any, fields: dict[str, Any], overrides: Mapping[str, Any]) -> Any:
    """Makes a new config, so that what it derives from its fields (layer types) is derived anew."""
    for key, value in overrides.items():
        if not hasattr(config, key) or key.startswith("_"):
            valid = ", ".join(sorted(k for k in config.to_dict() if not k.startswith("_")))
            raise ValueError(
                f"overrides.{key}: {config.model_type} has no such config field; valid: {valid}"
            )
        key = config.attribute_map.get(key, key)
        nested = isinstance(value, Mapping) and isinstance(fields.get(key), dict)
        fields[key] = {**fields[key], **value} if nested else value
    try:
        return type(config).from_dict(fields)
    except Exception as error:  # a config's own code may raise anything
        raise ValueError(f"overrides = {dict(overrides)}: {_one_line(error)}") from error


def _has_weights(source: str) -> bool:
    folder = Path(source)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return True
    pickled = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
    if pickled:
        raise ValueError(
            f"source = {source!r}: its weights are pickled ({pickled[0].name}); convert them to "
            "safetensors, or set weights = false to start from random ones"
        )
    return False


def _make_model(source: str, config: Any, load: bool) -> Any:
    """Makes the model with its weights, or with random ones from torch's default generator."""
    from transformers import AutoModelForCausalLM as Auto

    given: dict[str, Any] = {"dtype": torch.float32, "trust_remote_code": False}
    if not load:
        return Auto.from_config(config, **given)
    given |= {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    quiet = hushed() if Path(source).is_dir() else contextlib.nullcontext()
    with quiet, no_pickles():
        loaded: Any = Auto.from_pretrained(source, config=config, **given)
    model, info = loaded
    _require_whole(model, info["mismatched_keys"])
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"its weights lack {len(missing)} of the parameters, such as {missing[0]}")
    surplus = sorted(info["unexpected_keys"])
    if surplus:
        words = f"{len(surplus)} tensors of its weights are not used, such as {surplus[0]}"
        warnings.warn(f"source = {source!r}: {words}", stacklevel=2)
    return model


def _require_whole(model: nn.Module, unlike: Any) -> None:
    """Raises ValueError where weights have another shape than the model's, or are no numbers."""
    if unlike:
        name, there, here = min(unlike)
        more = f" ({len(unlike) - 1} more)" if len(unlike) > 1 else ""
        raise ValueError(
            f"its weights have {name} of shape {list(there)}, the model's is {list(here)}{more}"
        )
    for name, p in model.named_parameters():
        if not p.is_meta and not p.isfinite().all():
            raise ValueError(f"its weights are not finite, such as {name}")


def _all_configs(config: Any) -> list[Any]:
    parts = [getattr(config, key, None) for key in config.sub_configs]
    return [config, *[c for part in parts if part is not None for c in _all_configs(part)]]


def _complete_meta(model: nn.Module) -> None:
    """Moves all parameters of a model on meta there, also those that `torch.normal` made.

    `torch.normal` ignores the default device. Raises NotOnMeta where something on meta is neither a
    parameter nor a buffer, since it has no name by which to fill it in."""
    if not any(p.is_meta for p in model.parameters()):
        return
    moved: dict[nn.Parameter, nn.Parameter] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, torch.Tensor) and value.is_meta:
                raise NotOnMeta(f"{name}.{key} is neither parameter nor buffer")
        for key, p in module._parameters.items():
            if p is not None and not p.is_meta:
                empty = nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
                module._parameters[key] = moved.setdefault(p, empty)


def _freeze_unused(model: nn.Module, names: list[str]) -> None:
    """Freezes parameters without gradients; some engines fail on them, others would decay them."""
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    if names:
        words = f"{len(names)} parameters have no part in the logits and are not trained, such as"
        warnings.warn(f"{words} {names[0]}", stacklevel=3)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
