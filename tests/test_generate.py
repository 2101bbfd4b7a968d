"""Text from a run's final weights: what the model would write, and mistakes in one line."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hybrid import records
from hybrid.checkpoint.tensors import parts_of
from hybrid.checkpoint.weights import save_weights
from hybrid.job.errors import JobError
from hybrid.job.file import load_job, to_dict
from hybrid.models import build_model
from hybrid.models.losses import Loss, cross_entropy
from hybrid.training.generate import generate as generate_text

CONTEXT = 12
END = 256
ME = "tests.test_generate"
generate = functools.partial(generate_text, trust=True)  # these jobs name functions of this file


class Causal(nn.Module):
    """Mixes each place with the ones before it; refuses more than it was made for."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix, self.dropout = nn.Linear(width, width), nn.Dropout(0.5)
        self.register_buffer("decay", torch.linspace(1.0, 0.2, CONTEXT))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, width] to the same."""
        tokens = x.shape[1]
        assert tokens <= CONTEXT
        ago = (torch.arange(tokens)[:, None] - torch.arange(tokens)).clamp(min=0)
        seen = torch.ones(tokens, tokens).tril() * self.decay[ago]
        return self.dropout(torch.tanh(self.mix(seen @ x)))


def small(vocab_size: int = 257, width: int = 24) -> tuple[list[nn.Module], Loss]:
    """Embedding, one causal layer, head; whatever it was initialised to."""
    layers = [nn.Embedding(vocab_size, width), Causal(width), nn.Linear(width, vocab_size)]
    return layers, cross_entropy


def table() -> tuple[list[nn.Module], Loss]:
    """Logits of the next token from a row for each token."""
    return [nn.Embedding(257, 257)], cross_entropy


def pooled() -> tuple[list[nn.Module], Loss]:
    """No language model: it has lost the axis of the tokens."""
    return [nn.EmbeddingBag(257, 257)], cross_entropy


def make_run(folder: Path, model: str = "small", **changes: Any) -> dict[str, torch.Tensor]:
    """The folder of a run that ended with the weights that it began with; returns these."""
    job = load_job(
        {
            "model": {"name": f"{ME}:{model}"},
            "data": {"name": "text", "options": {"context": CONTEXT}},
            "optimizer": {"name": "sgd", "lr": 0.1},
            "train": {"global_batch": 4, "steps": 1},
        },
        changes,
    )
    records.write(to_dict(job), folder / "job.json")
    model_of_job = build_model(job)[0].whole()
    state = dict(model_of_job.named_parameters()) | dict(model_of_job.named_buffers())
    return save(folder, {name: tensor.detach() for name, tensor in state.items()})


def save(folder: Path, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Make these the run's final weights."""
    save_weights(parts_of(state), folder / "checkpoints" / "final", {"step": 1})
    return state


def make_table(folder: Path, following: dict[int, dict[int, float]]) -> None:
    """A run whose model gives each token's successors these probabilities."""
    state = make_run(folder, "table")
    state["0.weight"].fill_(-math.inf)
    for token, successors in following.items():
        for successor, probability in successors.items():
            state["0.weight"][token, successor] = math.log(probability)
    save(folder, state)


def test_greedy_text_is_what_the_weights_say(tmp_path: Path) -> None:
    cycle = {ord(a): {ord(b): 0.6, END: 0.4} for a, b in ("ab", "bc", "ca")}
    make_table(tmp_path, cycle | {END: {ord("c"): 1.0}})
    assert generate(tmp_path, "xb", 5, temperature=0) == "xbcabca"
    assert generate(tmp_path, "", 4, temperature=0) == "cabc"  # a document's beginning


def test_it_stops_where_the_document_ends(tmp_path: Path) -> None:
    make_table(tmp_path, {ord("a"): {ord("b"): 1.0}, ord("b"): {END: 1.0}, END: {ord("a"): 1.0}})
    assert generate(tmp_path, "a", 50, temperature=0) == "ab"
    assert generate(tmp_path, "", 50) == "ab"


def test_draws_follow_the_probabilities(tmp_path: Path) -> None:
    either = {ord("a"): 0.5, ord("b"): 0.3, ord("c"): 0.2}
    make_table(tmp_path, {END: either} | {token: either for token in either})

    def shares(**options: Any) -> list[float]:
        text = generate(tmp_path, "", 2000, **options)
        assert len(text) == 2000
        return [text.count(letter) / 2000 for letter in "abc"]

    assert shares(temperature=1.0) == pytest.approx([0.5, 0.3, 0.2], abs=0.04)
    squares = [0.25 / 0.38, 0.09 / 0.38, 0.04 / 0.38]  # half the temperature
    assert shares(temperature=0.5, seed=3) == pytest.approx(squares, abs=0.04)
    assert shares(temperature=1.0, top_k=2) == pytest.approx([0.625, 0.375, 0], abs=0.04)
    assert shares(temperature=1.0, top_k=1) == shares(temperature=1e-320) == [1, 0, 0]


def test_the_same_arguments_give_the_same_text(tmp_path: Path) -> None:
    make_run(tmp_path, **{"launch.device": "cuda"})  # on another host
    torch.manual_seed(5)
    first = generate(tmp_path, "def ", 30, 1.0, seed=1)
    torch.manual_seed(6)
    assert generate(tmp_path, "def ", 30, 1.0, seed=1) == first
    assert generate(tmp_path, "def ", 30, 1.0, seed=2) != first
    assert generate(tmp_path, "def ", 40, 1.0, seed=1).startswith(first)
    assert first.startswith("def ")


@pytest.mark.parametrize("num_tokens", [5, 40])
def test_it_is_the_model_without_dropout_on_the_last_tokens(
    num_tokens: int, tmp_path: Path
) -> None:
    make_run(tmp_path)
    model = build_model(load_job(tmp_path / "job.json"))[0].whole().eval()
    ids = [END, *b"def"]
    for _ in range(num_tokens):
        window = ids[-CONTEXT:]
        # a fixed length, filled up on the right: what comes later changes nothing before it
        padded = torch.tensor([window + [7] * (CONTEXT - len(window))])
        ids.append(int(model(padded)[0, len(window) - 1].argmax()))
        if ids[-1] == END:
            break
    expected = bytes(i for i in ids if i != END).decode(errors="replace")
    assert generate(tmp_path, "def", num_tokens, temperature=0) == expected
    assert len(ids) > 4


def test_the_final_weights_are_used_not_the_first(tmp_path: Path) -> None:
    state = make_run(tmp_path)
    before = generate(tmp_path, "def ", 20, temperature=0)
    save(tmp_path, {name: -tensor for name, tensor in state.items()})
    assert generate(tmp_path, "def ", 20, temperature=0) != before


def test_tokens_that_no_text_has_are_never_written(tmp_path: Path) -> None:
    state = make_run(tmp_path, **{"model.options.vocab_size": 300})
    state["2.bias"][257:] = 1000.0  # an embedding padded to a round size
    save(tmp_path, state)
    assert len(generate(tmp_path, "a", 10, temperature=0).encode(errors="replace")) > 1


def flip_a_byte(folder: Path) -> None:
    """Damage the weights."""
    file = folder / "checkpoints" / "final" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def change_state(change: Any) -> Any:
    """Make a run, then other weights of it, written as they should be."""

    def apply(folder: Path) -> None:
        state = make_run(folder)
        change(state)
        save(folder, state)

    return apply


def remove(name: str) -> Any:
    """Make a run, then remove a file of it."""

    def apply(folder: Path) -> None:
        make_run(folder)
        (folder / name).unlink()

    return apply


def rewrite(name: str, text: str) -> Any:
    """Make a run, then put other text into a file of it."""

    def apply(folder: Path) -> None:
        make_run(folder)
        (folder / name).write_text(text)

    return apply


CHECKPOINT = "checkpoints/final/checkpoint.json"
# name: (what makes the folder, words of the message)
FOLDERS: dict[str, tuple[Any, list[str]]] = {
    "nothing": (lambda folder: None, ["no run's folder", "job.json"]),
    "a comparison": (
        lambda folder: [make_run(folder / name) for name in ("single", "ddp")],
        ["no job.json", "runs below it", "/ddp, ", "/single"],
    ),
    "no weights": (remove("checkpoints/final/model.safetensors"), ["No such file", "has ended"]),
    "no checksum": (remove(CHECKPOINT), ["checkpoint.json", "No such file"]),
    "not JSON": (rewrite(CHECKPOINT, "{"), ["checkpoint.json", "not a JSON file"]),
    "another JSON": (rewrite(CHECKPOINT, "[]"), ["checkpoint.json", "sha256"]),
    "no job": (rewrite("job.json", "{}"), ["job.json", "missing"]),
    "damaged": (
        lambda folder: (make_run(folder), flip_a_byte(folder)),
        ["model.safetensors", "damaged", "SHA-256"],
    ),
    "a tensor too few": (change_state(lambda s: s.pop("1.mix.bias")), ["has no 1.mix.bias"]),
    "a tensor too many": (
        change_state(lambda s: s.update(more=torch.ones(2))),
        ["has more, which the model has not"],
    ),
    "another shape": (
        change_state(lambda s: s.update({"2.bias": torch.ones(9)})),
        ["2.bias has shape [9]", "[257]"],
    ),
    "no numbers": (
        change_state(lambda s: s["2.bias"].fill_(math.nan)),
        ["logits that are no numbers"],
    ),
    "other data": (
        lambda folder: make_run(folder, **{"data.name": "random", "data.options": {}}),
        ["data.name = 'random'", "'text'"],
    ),
    "a small vocabulary": (
        lambda folder: make_run(folder, **{"model.options.vocab_size": 100}),
        ["logits of 100 tokens", "257"],
    ),
    "no tokenizer": (
        lambda folder: make_run(folder, **{"data.options.tokenizer": "./gone"}),
        ["data.options.tokenizer = './gone'", "no such"],
    ),
    "no language model": (lambda folder: make_run(folder, "pooled"), ["no logits of shape"]),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_has_no_text_to_give(case: str, tmp_path: Path) -> None:
    make, words = FOLDERS[case]
    make(tmp_path)
    with pytest.raises(JobError) as found:
        generate(tmp_path, "\x01", 3, temperature=0)
    message = str(found.value)
    assert "\n" not in message and not [w for w in words if w not in message], message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_tokens": 0}, "tokens = 0: valid: 1 or more"),
        ({"temperature": -0.1}, "temperature = -0.1"),
        ({"temperature": math.nan}, "temperature = nan"),
        ({"temperature": math.inf}, "temperature = inf"),
        ({"seed": -1}, "seed = -1"),
        ({"seed": 2**32}, "seed = 4294967296"),
        ({"top_k": 0}, "top_k = 0: valid: 1 or more"),
        ({"prompt": "\udcff"}, "prompt = .* is not UTF-8"),
    ],
)
def test_a_wrong_argument(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    make_run(tmp_path)
    with pytest.raises(JobError, match=words):
        generate(tmp_path, **options)


def test_a_run_of_a_hugging_face_tokenizer(tmp_path: Path) -> None:
    from tests.test_tokenizers import make_tokenizer

    folder = make_tokenizer(tmp_path / "bpe", ["def text(self):\n    return self\n"])
    changes = {"model.options.vocab_size": 320, "data.options.tokenizer": str(folder)}
    make_run(tmp_path / "run", **changes)
    assert generate(tmp_path / "run", "return self", 10, 1.0).startswith("return self")
    saved = json.loads((tmp_path / "run" / "job.json").read_text())
    assert saved["data"]["options"]["tokenizer"] == str(folder)
