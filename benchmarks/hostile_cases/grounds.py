"""Makes once what many cases start from: the folders of two runs, and a Hugging Face model."""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from .case import JOB, SANDBOX, TEXT_JOB, write

TEXT = "the cat sat on the mat, and the dog sat on the cat\n" * 40
CONFIG: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 16,
    "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 32,
    "tie_word_embeddings": False, "torch_dtype": "float32",
}  # fmt: skip
_LOCK = threading.Lock()


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="hybrid-grounds-")


def _make(name: str) -> Path:
    """Return the folder of a run that went well, which runs once."""
    with _LOCK:
        folder = Path(_folder().name) / name
        if (folder / "out" / "record.json").is_file():
            return folder
        folder.mkdir(parents=True, exist_ok=True)
        write(folder, {"job.toml": TEXT_JOB if name == "text_run" else JOB, "text.txt": TEXT})
        words = ["train", "job.toml", "--strategy", "single", "--nproc", "1", "--out", "out"]
        root = str(Path(__file__).parent.parent.parent)
        variables = os.environ | {"PYTHONPATH": root, "HOME": str(folder)}
        done = subprocess.run(
            [sys.executable, "-m", "hybrid", *words], cwd=folder, env=variables,
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"the run that cases start from failed: {done.stderr}")
    return folder


def lay_run(folder: Path) -> None:
    """Copy a run on random numbers to `run`, with its checkpoints and final weights."""
    shutil.copytree(_make("run") / "out", folder / "run")


def lay_text_run(folder: Path) -> None:
    """Copy a run on text to `text_run`, and its text."""
    made = _make("text_run")
    shutil.copytree(made / "out", folder / "text_run")
    write(folder, {"text.txt": TEXT})


def safetensors(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> bytes:
    """Return a file in the safetensors format with random fp32 tensors."""
    draw, header, data = random.Random(seed), dict[str, Any](), b""
    for name, shape in shapes.items():
        size = 1
        for length in shape:
            size *= length
        held = struct.pack(f"<{size}f", *(draw.gauss(0, 0.02) for _ in range(size)))
        header[name] = {
            "dtype": "F32",
            "shape": shape,
            "data_offsets": [len(data), len(data) + len(held)],
        }
        data += held
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def llama_shapes() -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the weights that CONFIG asks for."""
    inner = {f"self_attn.{k}_proj": (16, 16) for k in "qkvo"}
    inner |= {"mlp.gate_proj": (24, 16), "mlp.up_proj": (24, 16), "mlp.down_proj": (16, 24)}
    norms = {"input_layernorm": (16,), "post_attention_layernorm": (16,)}
    layer = {f"model.layers.0.{k}.weight": shape for k, shape in (inner | norms).items()}
    rest = {
        "model.embed_tokens.weight": (64, 16),
        "model.norm.weight": (16,),
        "lm_head.weight": (64, 16),
    }
    return layer | rest


def tokenizer() -> dict[str, Any]:
    """Return a tokenizer.json of whole words."""
    words = ["<eos>", "<unk>", "the", "cat", "sat", "on", "mat", "and", "dog"]
    special = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None,
        "added_tokens": [{"id": 0, "content": "<eos>", **special}],
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": {w: i for i, w in enumerate(words)},
                  "unk_token": "<unk>"},
    }  # fmt: skip


def lay_hugging_face(folder: Path) -> None:
    """Write a Hugging Face folder `hf`: a config, weights, a tokenizer."""
    files: dict[str, str | bytes] = {
        "hf/config.json": json.dumps(CONFIG), "hf/model.safetensors": safetensors(llama_shapes()),
        "hf/tokenizer.json": json.dumps(tokenizer()), "text.txt": TEXT,
        "hf/tokenizer_config.json": json.dumps(
            {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>",
             "unk_token": "<unk>"}
        ),
    }  # fmt: skip
    write(folder, files)


class Bomb:
    """Makes a file where it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, (f'touch "$SANDBOX/{SANDBOX}"',)


TOUCH = f"import os, pathlib\npathlib.Path(os.environ['SANDBOX'], '{SANDBOX}').touch()\n"
