"""Which keys a DeepSpeed configuration may hold, read off the installed DeepSpeed.

    python -m tests.deepspeed_keys      writes hybrid/engines/deepspeed_keys.json

DeepSpeed accepts unknown keys in silence, and importing it costs seconds; so the toolkit checks a
file against this table. A section has `properties`; a value has `type`, `minimum`, ... as in JSON
Schema, all alternatives of a union in one list of types. `{}` takes anything.
"""

from __future__ import annotations

import contextlib
import json
import typing
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BaseModel, TypeAdapter
from pydantic.errors import PydanticInvalidForJsonSchema

from hybrid.engines.deepspeed_config import KEYS_FILE, NOT_HERE, OWNED_BY_JOB

Section = dict[str, Any]
KINDS = {bool: "boolean", int: "number", float: "number", str: "string"}
ENOUGH = {"train_micro_batch_size_per_gpu": 1}  # the least that DeepSpeed reads


class Asked(dict[str, Any]):
    """A section without keys that notes which it is asked for, and the defaults it is given."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.asked: dict[str, Any] = {}

    def get(self, key: str, default: Any = None) -> Any:
        self.asked[key] = default if default is not None else self.asked.get(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.asked.setdefault(str(key), None)
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.setdefault(key, None)
        return super().__getitem__(key)

    def keys(self) -> Any:
        return self

    def __copy__(self) -> Asked:
        return self


def models() -> dict[tuple[str, ...], type[BaseModel]]:
    """Sections that DeepSpeed has pydantic models of: these it does not ask key by key."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.inference.config import WeightQuantConfig
    from deepspeed.monitor import config as monitor
    from deepspeed.runtime.config import HybridEngineConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    return {
        ("zero_optimization",): DeepSpeedZeroConfig,
        ("comms_logger",): CommsLoggerConfig,
        ("compile",): CompileConfig,
        ("hybrid_engine",): HybridEngineConfig,
        ("weight_quantization",): WeightQuantConfig,
        ("timers", "throughput"): DeepSpeedThroughputTimerConfig,
        **{
            (name,): f.annotation for name, f in monitor.DeepSpeedMonitorConfig.model_fields.items()
        },
    }


def of_model(model: type[BaseModel]) -> Section:
    """The keys of a pydantic model, by their names and their aliases."""
    found: Section = {}
    for name, field in model.model_fields.items():
        kinds = (field.annotation, *typing.get_args(field.annotation))
        inner = [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]
        if inner:
            nullable = ["null"] if type(None) in kinds else []
            value = {"type": ["object", *nullable], **of_model(inner[0])}
        else:
            value = of_value(field.annotation, field.metadata)
        found |= dict.fromkeys(filter(None, (name, field.alias)), value)
    return {"properties": found}


def of_value(annotation: Any, metadata: list[Any]) -> Section:
    """What a value may be: JSON Schema's words, the alternatives of a union in one list."""
    kind: Any = Annotated[annotation, *metadata] if metadata else annotation
    try:
        schema = TypeAdapter(kind).json_schema()
    except PydanticInvalidForJsonSchema:  # only code can make such a value
        return {}
    found: Section = {}
    for one in schema.get("anyOf", [schema]):
        one = schema["$defs"][one["$ref"].split("/")[-1]] if "$ref" in one else one
        if "type" not in one:
            return {}
        found["type"] = [*found.get("type", []), one["type"]]
        bounds = ("enum", "minimum", "maximum", "exclusiveMinimum")
        found |= {key: one[key] for key in bounds if key in one}
    if "enum" in found:  # an alias of a value stands there twice
        found["enum"] = list(dict.fromkeys(found["enum"]))
    return found


def ask(path: tuple[str, ...]) -> dict[str, Any]:
    """The keys that DeepSpeed asks a section for when the file holds that section and no other."""
    from deepspeed.runtime.config import DeepSpeedConfig

    root = section = Asked(ENOUGH)
    for name in path:
        inside = Asked()
        section[name] = inside
        section = inside
    with contextlib.suppress(Exception):  # it wanted no section here, or more in it
        DeepSpeedConfig(root)
    return section.asked


def of_section(path: tuple[str, ...] = ()) -> Iterator[tuple[str, Section]]:
    """Name and description of each key that DeepSpeed asks a section for."""
    from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS

    asked, known = ask(path), models()
    for name, default in asked.items():
        inside = (*path, name)
        if name in (*_REMOVED_TOP_LEVEL_CONFIG_KEYS, *OWNED_BY_JOB, *NOT_HERE) and not path:
            continue
        if inside in known:
            yield name, {"type": ["object"], **of_model(known[inside])}
        elif inside == ("pipeline",):
            yield name, {"type": ["object"], "properties": dict(of_pipeline())}
        elif keys := dict(of_section(inside)):
            yield name, {"type": ["object"], "properties": keys}
        else:
            kind = KINDS.get(type(default))
            yield name, {"type": [kind]} if kind else {}


def of_pipeline() -> Iterator[tuple[str, Section]]:
    """DeepSpeed takes any key here; those it knows are the ones it has defaults for."""
    from deepspeed.runtime.config import get_pipeline_config

    for name, default in get_pipeline_config({}).items():
        yield name, {} if default == "auto" else {"type": [KINDS[type(default)]]}


def text() -> str:
    """The whole table as its file has it, a line a key."""
    import deepspeed

    keys = _lines(dict(of_section()), " ")
    return f'{{"deepspeed": "{deepspeed.__version__}", "properties": {{\n{keys}\n}}}}\n'


def _lines(section: Section, indent: str) -> str:
    lines = []
    for name, value in section.items():
        if inner := value.get("properties"):
            head = f'"type": {json.dumps(value["type"])}, "properties"'
            shown = f"{{{head}: {{\n{_lines(inner, indent + ' ')}\n{indent}}}}}"
        else:
            shown = json.dumps(value)
        lines.append(f"{indent}{json.dumps(name)}: {shown}")
    return ",\n".join(lines)


if __name__ == "__main__":
    KEYS_FILE.write_text(text())
