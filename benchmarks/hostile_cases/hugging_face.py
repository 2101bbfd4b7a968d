"""Draws Hugging Face folders: indexes, configs, weights and tokenizers of strangers."""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .case import EITHER, MINE, WRONG, Case, draw_in_turn, job_with, laid, train, write
from .damage import ANY, TEXTS, mutate
from .grounds import CONFIG, TOUCH, Bomb, lay_hugging_face, llama_shapes, safetensors, tokenizer

KIND = "hugging_face"
INDEX = "hf/model.safetensors.index.json"
TEXT_DATA = 'options = { path = "text.txt", context = 8, cache = "tokens"'
PLACES = (
    ('name = "mlp"', 'name = "hf:hf"'),
    ("options = { sizes = [8, 7, 6, 2] }", ""),
    ('name = "random"', 'name = "text"'),
    ("options = { samples = 23, test_samples = 9, features = 8, classes = 2 }",
     TEXT_DATA + ', tokenizer = "hf" }'),
)  # fmt: skip
CODE = {
    "AutoConfig": "modeling_evil.C",
    "AutoModelForCausalLM": "modeling_evil.M",
    "AutoModel": "modeling_evil.M",
}
EVIL = TOUCH + "class C: model_type = 'llama'\nclass M: pass\nclass T: pass\n"


def _config(**fields: Any) -> Callable[[Path], None]:
    held = {k: v for k, v in (CONFIG | fields).items() if v is not ...}
    return lambda f: write(f, {"hf/config.json": json.dumps(held), "hf/modeling_evil.py": EVIL})


# In words: a config, and whether it must be refused.
CONFIGS: dict[str, tuple[Callable[[Path], None], frozenset[int]]] = {
    "code by auto_map": (_config(auto_map=CODE), EITHER),
    "code by auto_map of an unknown type": (_config(model_type="evil", auto_map=CODE), WRONG),
    "code of a hub": (
        _config(model_type="evil", auto_map={k: f"some/repo--{v}" for k, v in CODE.items()}),
        WRONG,
    ),
    "an unknown type": (_config(model_type="nosuch"), WRONG),
    "no type": (_config(model_type=...), WRONG),
    "a type that is a list": (_config(model_type=["llama"]), WRONG),
    "no causal model": (_config(model_type="vit"), WRONG),
    "a width of 0": (_config(hidden_size=0), WRONG),
    "a negative width": (_config(hidden_size=-16), WRONG),
    "a width that is a text": (_config(hidden_size="16"), WRONG),
    "a width without end": (_config(hidden_size=10**15), WRONG),
    "no heads": (_config(num_attention_heads=0), WRONG),
    "heads that do not divide": (_config(num_attention_heads=3, num_key_value_heads=2), WRONG),
    "no layers": (_config(num_hidden_layers=0), EITHER),
    "layers without end": (_config(num_hidden_layers=10**12), WRONG),
    "an unknown activation": (_config(hidden_act="nosuch"), WRONG),
    "an activation that is code": (_config(hidden_act="__import__('os').system('x')"), WRONG),
    "a vocabulary too small": (_config(vocab_size=3), WRONG),
    "quantized": (_config(quantization_config={"quant_method": "nosuch"}), EITHER),
    "an unknown dtype": (_config(torch_dtype="os.system"), EITHER),
    "an attention that is not there": (_config(_attn_implementation="nosuch"), EITHER),
    "a kernel of a hub": (_config(_attn_implementation="some/repo:evil"), EITHER),
    "rope that is nonsense": (_config(rope_scaling={"rope_type": "nosuch", "factor": "x"}), WRONG),
    "another's path": (_config(_name_or_path="/etc", name_or_path="../.."), EITHER),
    "architectures that are code": (_config(architectures=["os.system"]), EITHER),
    "an id beyond the vocabulary": (_config(pad_token_id=10**9, eos_token_id=-5), EITHER),
}


def _index(value: Any, **files: bytes) -> Callable[[Path], None]:
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": value})

    def make(folder: Path) -> None:
        (folder / "hf/model.safetensors").rename(folder / "hf/part.safetensors")
        write(folder, {INDEX: text} | {f"hf/{k.replace('__', '.')}": v for k, v in files.items()})

    return make


NAMES = list(llama_shapes())
BOMB = pickle.dumps(Bomb())
INDEXES: dict[str, Callable[[Path], None]] = {
    "a pickle": _index(dict.fromkeys(NAMES, "w.bin"), w__bin=BOMB),
    "a pickle by another name": _index(dict.fromkeys(NAMES, "w.safetensors"), w__safetensors=BOMB),
    "a folder above": _index(dict.fromkeys(NAMES, "../other.safetensors")),
    "an absolute path": _index(dict.fromkeys(NAMES, "/etc/passwd")),
    "an absolute safetensors": _index(dict.fromkeys(NAMES, "/tmp/x.safetensors")),
    "a file that is not there": _index(dict.fromkeys(NAMES, "nosuch.safetensors")),
    "a device": _index(dict.fromkeys(NAMES, "/dev/zero")),
    "numbers": _index(dict.fromkeys(NAMES, 7)),
    "null": _index(dict.fromkeys(NAMES)),
    "lists": _index({n: ["part.safetensors"] for n in NAMES}),
    "no text": _index(dict.fromkeys(NAMES, "")),
    "a dot": _index(dict.fromkeys(NAMES, ".")),
    "another case": _index(dict.fromkeys(NAMES, "part.SafeTensors")),
    "nothing": _index({}),
    "a list": _index([]),
    "a text": _index("part.safetensors"),
    "half to a pickle": _index(
        dict.fromkeys(NAMES, "part.safetensors") | {NAMES[0]: "w.pt"}, w__pt=BOMB
    ),
    "a folder within": _index(dict.fromkeys(NAMES, "inner/../../other.safetensors")),
    "a link out": laid(
        _index(dict.fromkeys(NAMES, "l.safetensors")),
        lambda f: (f / "hf/l.safetensors").symlink_to("../other.safetensors"),
    ),
    "names that are not in the file": _index({f"x.{n}": "part.safetensors" for n in NAMES}),
    "a NUL": _index(dict.fromkeys(NAMES, "part\0.safetensors")),
    "an escape": _index(dict.fromkeys(NAMES, "\x1b[31m.safetensors")),
    "a long name": _index(dict.fromkeys(NAMES, "n" * 5000 + ".safetensors")),
}
MAY_LOAD = {"a link out": EITHER, "nothing": EITHER}  # as the hub's own caches do


def _weights(content: bytes) -> Callable[[Path], None]:
    return lambda f: write(f, {"hf/model.safetensors": content})


HELD = safetensors(llama_shapes())
SHAPES = llama_shapes()
WEIGHTS: dict[str, Callable[[Path], None]] = {
    "are a pickle": _weights(BOMB),
    "have another shape": _weights(safetensors({n: (3,) for n in NAMES})),
    "lack one": _weights(safetensors({n: s for n, s in SHAPES.items() if n != NAMES[0]})),
    "have a header without end": _weights(b"\xff" * 8 + HELD[8:]),
    "have a header that is no JSON": _weights(HELD[:8] + b"x" * (len(HELD) - 8)),
    "have offsets outside": _weights(HELD.replace(b'"data_offsets": [0,', b'"data_offsets": [9,',
                                                  1)),
    "are of no type": _weights(HELD.replace(b'"F32"', b'"X99"', 1)),
    "have a negative shape": _weights(HELD.replace(b'"shape": [16,', b'"shape": [-1,', 1)),
    "are pickled beside a decoy": lambda f: (
        (f / "hf/model.safetensors").rename(f / "hf/decoy.safetensors"), write(f,
            {"hf/pytorch_model.bin": BOMB})
    ),
    "are pickled alone": lambda f: ((f / "hf/model.safetensors").unlink(), write(f,
        {"hf/pytorch_model.bin": BOMB})),
    "have an adapter beside them": lambda f: write(f, {
        "hf/adapter_config.json": json.dumps({"base_model_name_or_path": "../evil",
                                              "peft_type": "LORA"}),
        "hf/adapter_model.bin": BOMB}),
    "have code to generate beside them": lambda f: write(f, {
        "hf/generation_config.json": json.dumps({"custom_generate": "evil", "max_length": -1}),
        "hf/custom_generate/generate.py": EVIL}),
}  # fmt: skip
MAY_RUN = ("have an adapter beside them", "have code to generate beside them")
TOKENIZERS: dict[str, dict[str, Any]] = {
    "code by auto_map": {
        "tokenizer_class": "T",
        "auto_map": {"AutoTokenizer": ["modeling_evil.T", None]},
    },
    "a class that is not there": {"tokenizer_class": "os.system"},
    "a class that is a list": {"tokenizer_class": ["a"]},
    "a template that is code": {
        "chat_template": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "eos_token": "<eos>",
    },
    "no end": {"tokenizer_class": "PreTrainedTokenizerFast"},
    "an end that is a number": {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": 7},
    "an end that is not there": {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<nosuch>",
    },
    "a length without end": {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<eos>",
        "model_max_length": 10**40,
    },
}


def _case(number: int, what: str, *steps: Callable[[Path], object], **more: Any) -> Case:
    job = job_with(*PLACES)
    files: dict[str, str | bytes] = {
        "job.toml": job,
        "mine.txt": MINE,
        "other.safetensors": HELD,
        "hf/modeling_evil.py": EVIL,
    }
    make = laid(lay_hugging_face, lambda f: write(f, files), *steps)
    return Case(
        KIND, number, what, train(), make, starts=True, out=("out", "tokens"), words=("hf",), **more
    )


def configs(draw: random.Random, number: int) -> Case:
    """Give a config that means harm or nonsense."""
    key = draw.choice(list(CONFIGS))
    make, ends = CONFIGS[key]
    return _case(number, f"config.json: {key}", make, ends=ends)


def indexes(draw: random.Random, number: int) -> Case:
    """Give an index of weights that leads elsewhere."""
    key = list(INDEXES)[number % len(INDEXES)]
    return _case(
        number,
        f"the index leads to {key}",
        INDEXES[key],
        ends=MAY_LOAD.get(key, WRONG),
    )


def weights(draw: random.Random, number: int) -> Case:
    """Give weights that are none."""
    key = list(WEIGHTS)[number % len(WEIGHTS)]
    return _case(
        number,
        f"the weights {key}",
        WEIGHTS[key],
        ends=EITHER if key in MAY_RUN else WRONG,
    )


def tokenizers(draw: random.Random, number: int) -> Case:
    """Give the configuration of a tokenizer that means harm or nonsense."""
    key = draw.choice(list(TOKENIZERS))
    text = json.dumps(TOKENIZERS[key])
    return _case(number, f"tokenizer_config.json: {key}", lambda f: write(f,
        {"hf/tokenizer_config.json": text}),
                 ends=EITHER)  # fmt: skip


def damaged(draw: random.Random, number: int) -> Case:
    """Damage a file of the folder."""
    name = draw.choice(
        ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    )
    way, seed = draw.choice([w for w in ANY if w != "is huge and sparse"]), draw.random()
    return _case(number, f"{name} {way}", lambda f: ANY[way](f / "hf" / name, random.Random(seed)),
                 ends=EITHER)  # fmt: skip


def rewritten(draw: random.Random, number: int) -> Case:
    """Write something else in place of a file of JSON."""
    name = draw.choice(
        ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
    )
    key = draw.choice(list(TEXTS))
    return _case(
        number,
        f"{name} is {key}",
        lambda f: write(f, {f"hf/{name}": TEXTS[key]}),
        ends=EITHER,
    )


def mutated(draw: random.Random, number: int) -> Case:
    """Change one value in a config or a tokenizer."""
    name = draw.choice(["config.json", "tokenizer.json"])
    value = json.loads(json.dumps(CONFIG if name == "config.json" else tokenizer()))
    words = mutate(value, draw)
    text = json.dumps(value)
    return _case(
        number,
        f"{name}: {words}",
        lambda f: write(f, {f"hf/{name}": text}),
        ends=EITHER,
    )


def pickled_start(draw: random.Random, number: int) -> Case:
    """Start from weights that are a pickle, trusted or not; nothing in it may run."""
    name = draw.choice(["w.bin", "w.pt", "w.safetensors", "w", "pytorch_model.bin", "w.ckpt"])
    trusted = draw.random() < 0.5
    job = job_with(('name = "mlp"', f'name = "mlp"\nweights = "{name}"'))
    content = pickle.dumps(Bomb(), protocol=draw.choice([0, 2, 4, 5]))
    words = train(*(["--trust-pickle"] if trusted else []))
    how = "trusted" if trusted else "not trusted"
    return Case(KIND, number, f"weights = {name}, a pickle, {how}", words,
                lambda f: write(f, {"job.toml": job, name: content, "mine.txt": MINE}),
                words=("weights", name),
                starts=True)  # fmt: skip


TAKEN = [
    indexes,
    configs,
    weights,
    indexes,
    configs,
    tokenizers,
    damaged,
    mutated,
    rewritten,
    pickled_start,
]


def draw(source: random.Random, number: int) -> Case:
    """Return the case of a number."""
    return draw_in_turn(TAKEN, source, number, (indexes, weights))
