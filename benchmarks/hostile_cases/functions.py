"""Draws functions of a user: they raise every kind of thing, or return the wrong one."""

from __future__ import annotations

import random
from typing import Any

from .case import EITHER, LACKS, WRONG, Case, draw_in_turn, job_with, train, write

KIND = "functions"
HEAD = "import os, sys, torch\nfrom torch import nn\n"
# How a user's code ends, as statements of Python.
RAISES = {
    "KeyError": "{}['k']",
    "a missing file": "open('/nonexistent/x')",
    "an ImportError": "import nosuch_module",
    "a name that is not in a module": "from json import nosuch",
    "sys.exit(0)": "sys.exit(0)",
    "sys.exit('words')": "sys.exit('words')",
    "exit()": "exit()",
    "a recursion without end": "(lambda f: f(f))(lambda f: f(f))",
    "MemoryError": "raise MemoryError",
    "StopIteration": "raise StopIteration",
    "GeneratorExit": "raise GeneratorExit",
    "KeyboardInterrupt": "raise KeyboardInterrupt",
    "a BaseException of its own": "raise type('Mine', (BaseException,), {})('words')",
    "one whose __str__ raises": "raise type('Mine', (Exception,), {'__str__': lambda s: 1 / 0})",
    "one whose __str__ is no text": "raise type('Mine', (Exception,), {'__str__': lambda s: 7})",
    "one whose __repr__ raises": "raise type('Mine', (ValueError,), {'__repr__': lambda s: 1 / 0})",
    "a message of a million letters": "raise ValueError('x' * 10**6)",
    "a message of many lines": "raise ValueError('a\\n' * 1000)",
    "a message with escapes": "raise ValueError('\\x1b[31mred\\x07\\n\\rback')",
    "a message that is no UTF-8": "raise ValueError('\\udcff')",
    "an empty message": "raise ValueError",
    "a group of errors": "raise ExceptionGroup('many', [ValueError('a'), KeyError('b')])",
    "a UnicodeDecodeError": "b'\\xff'.decode()",
    "an assertion": "assert False, 'it holds not'",
    "NotImplementedError": "raise NotImplementedError",
    "a division by zero": "1 / 0",
    "an OSError of a full disk": "raise OSError(28, 'No space left on device')",
    "a PermissionError": "raise PermissionError(13, 'Permission denied', 'out')",
    "a BrokenPipeError": "raise BrokenPipeError",
    "an error of torch": "torch.zeros(2) @ torch.zeros(3)",
    "an error with a cause": "raise ValueError('outer') from KeyError('inner')",
    "a warning as an error": "raise DeprecationWarning('old')",
    "one that no pickle makes": "raise type('M', (Exception,), {'__init__': lambda s, a: None})(1)",
    "TimeoutError": "raise TimeoutError",
    "os._exit(0)": "os._exit(0)",
    "os._exit(7)": "os._exit(7)",
    "SIGKILL of itself": "os.kill(os.getpid(), 9)",
    "SIGSEGV of itself": "os.kill(os.getpid(), 11)",
    "os.abort()": "os.abort()",
}
DIES = ("os._exit(0)", "os._exit(7)", "SIGKILL of itself", "SIGSEGV of itself", "os.abort()")
PRINTED = "\x1b[31mred"
GOOD = {
    "model": "def make():\n"
    "    return nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 2)), nn.CrossEntropyLoss()\n",
    "data": (
        "class D:\n    def __len__(self): return 23\n"
        "    def __getitem__(self, i): return torch.ones(8) * i, torch.tensor(i % 2)\n"
        "def make():\n    return D(), D()\n"
    ),
    "optimizer": "def make(parameters, lr):\n    return torch.optim.SGD(parameters, lr=lr)\n",
    "schedule": "def make(step):\n    return 1.0\n",
    "metric": "def make(outputs, targets):\n    return 0.0, 1\n",
}
PLACES = {
    "model": (('name = "mlp"', 'name = "mm:make"'), ("options = { sizes = [8, 7, 6, 2] }", "")),
    "data": (
        ('name = "random"', 'name = "mm:make"'),
        ("options = { samples = 23, test_samples = 9, features = 8, classes = 2 }", ""),
    ),
    "optimizer": (('name = "sgd"', 'name = "mm:make"'),),
    "schedule": (("[train]", '[schedule]\nname = "mm:make"\n[train]'),),
    "metric": (("steps = 3", 'steps = 3\nmetrics = ["mm:make"]'),),
}
FIELDS = {
    "model": "model",
    "data": "data",
    "optimizer": "optimizer",
    "schedule": "schedule",
    "metric": "metrics",
}
# Statements that a model, a loss or a data set runs while it is used.
INSIDE = {
    "forward": (
        "model",
        "class M(nn.Module):\n    def __init__(self):\n"
        "        super().__init__()\n        self.a = nn.Linear(8, 2)\n"
        "    def forward(self, x):\n        @\n        return self.a(x)\n"
        "def make():\n    return M(), nn.CrossEntropyLoss()\n",
    ),
    "the loss": (
        "model",
        "def loss(o, t):\n    @\n"
        "    return nn.functional.cross_entropy(o, t, reduction='sum'), t.numel()\n"
        "def make():\n    return [nn.Linear(8, 6), nn.Linear(6, 2)], loss\n",
    ),
    "__getitem__": (
        "data",
        "class D:\n    def __len__(self): return 23\n    def __getitem__(self, i):\n        @\n"
        "        return torch.ones(8), torch.tensor(1)\n"
        "def make():\n    return D(), D()\n",
    ),
    "__len__": (
        "data",
        "class D:\n    def __len__(self):\n        @\n        return 23\n"
        "    def __getitem__(self, i): return torch.ones(8), torch.tensor(1)\n"
        "def make():\n    return D(), D()\n",
    ),
}  # fmt: skip
# What a function returns in place of what it should.
RETURNS: dict[str, list[str]] = {
    "model": ["None", "5", "()", "(1, 2, 3)", "(nn.Linear(8, 2),)", "(nn.Linear(8, 2), None)",
              "'text'", "nn.Linear",
              "([], nn.CrossEntropyLoss())", "([1], nn.CrossEntropyLoss())",
              "(nn.Linear(8, 2), nn.CrossEntropyLoss)",
              "(None, None)", "(x for x in (1, 2))", "{'model': 1}",
              "(nn.Linear(8, 2), lambda o, t: None)",
              "(nn.Linear(8, 2), lambda o, t: o.sum())", "([nn.Linear(8, 2)], lambda o, t: (o, 1))",
              "([nn.Linear(8, 2)], lambda o, t: (o.detach().sum(), 1))",
              "([nn.Linear(8, 2)], lambda o, t: (1.0, 1))",
              "([nn.Linear(8, 2)], lambda o, t: (o.sum(), None))", "([nn.Linear(8, 2)], lambda: 1)",
              "([nn.Linear(9, 2)], nn.CrossEntropyLoss())", "(nn.ReLU(), nn.CrossEntropyLoss())",
              "([nn.Linear(8, 2)], lambda o, t: (o.sum() * float('nan'), 1))"],
    "data": ["None", "5", "()", "([],)", "([], [])", "(1, 2)", "(1, 2, 3, 4)", "('ab', 'cd')",
             "({}, {})", "[[(1, 2)]]",
             "([(torch.ones(8), 0)] * 9, [])", "([None] * 9, [None] * 9)", "([5] * 9, [5] * 9)",
             "([(torch.ones(8), 5)] * 9, [(torch.ones(8), 5)] * 9)",
             "([(torch.ones(8), 0.5)] * 9, [(torch.ones(8), 0.5)] * 9)",
             "([(torch.ones(8), -7)] * 9, [(torch.ones(8), 0)] * 9)",
             "([(torch.ones(8 + i % 2), 0) for i in range(9)], [(torch.ones(8), 0)] * 9)",
             "([(torch.full((8,), float('nan')), 0)] * 9, [(torch.ones(8), 0)] * 9)",
             "([(torch.ones(8), 0)] * 9, [(torch.full((8,), float('nan')), 0)] * 9)",
             "([(torch.ones(8, dtype=torch.long), 0)] * 9, [(torch.ones(8), 0)] * 9)",
             "([(torch.ones(8), 0)] * 9, [(torch.ones(9), 0)] * 9)",
             "([('a', 'b')] * 9, [('a', 'b')] * 9)",
             "([(torch.ones(8), 0, 1)] * 9, [(torch.ones(8), 0, 1)] * 9)", "(iter([1]), iter([1]))",
             "(torch.ones(9), torch.ones(9))", "([{'input': 1}] * 9, [{'input': 1}] * 9)"],
    "optimizer": ["None", "5", "torch.optim.SGD", "'sgd'", "(torch.optim.SGD(parameters, lr=lr),)",
                  "lambda: None",
                  "torch.optim.SGD([torch.ones(2, requires_grad=True)], lr=lr)",
                  "torch.optim.SGD(parameters, lr=9)"],
    "schedule": ["None", "'1'", "float('nan')", "float('inf')", "-1.0", "(1, 2)", "torch.ones(2)",
                 "1e300"],
    "metric": ["None", "'x'", "5", "(1,)", "(1, 0)", "(float('nan'), 1)", "torch.ones(3)",
               "(None, None)", "{}"],
}  # fmt: skip
BROKEN = {
    "no Python": "def make(:\n", "a NUL": "x = 1\0\n", "not UTF-8": b"x = '\xff'\n", "empty": "",
    "tabs and spaces": "if 1:\n\tx\n  y\n",
    "a coding that is not there": "# coding: nosuch\n", "make is a number": "make = 5\n",
    "make is None": "make = None\n",
    "make wants more": "def make(a, b, c): pass\n",
    "make is a coroutine": "async def make(): pass\n",
    "make is a generator": "def make():\n    yield 1\n", "make is a class": "class make: pass\n",
    "a million levels": "x = " + "(" * 5000 + ")" * 5000 + "\n",
    "print at import": f"print({PRINTED!r})\ndef make(): pass\n",
    "it imports hybrid": "import hybrid.cli\nhybrid.cli.main()\n",
    "it changes folder": "import os\nos.chdir('/')\ndef make(): pass\n",
}  # fmt: skip


def _case(
    draw: random.Random, number: int, what: str, section: str, code: str | bytes, **more: Any
) -> Case:
    job = job_with(*PLACES[section])
    many = draw.random() < 0.2
    words = train(strategy="ddp" if many else "single", nproc="2" if many else "1")
    if draw.random() < 0.15:
        words = ["check", "job.toml", "--strategies", "single", "--nproc", "1"]
    make = lambda folder: write(folder, {"job.toml": job, "mm.py": code, "mine.txt": "mine"})  # noqa: E731
    return Case(KIND, number, what, words, make, starts=True, **more)


def raises(draw: random.Random, number: int) -> Case:
    """Have a module raise while it is imported, or a function while it is called."""
    key = list(RAISES)[number % len(RAISES)]
    section = draw.choice(["model", "model", "data", "data", "optimizer", "schedule", "metric"])
    at_import = draw.random() < 0.4
    if at_import:
        code = HEAD + RAISES[key] + "\n" + GOOD[section]
    else:
        head, _, rest = GOOD[section].rpartition("    return")
        code = f"{HEAD}{head}    {RAISES[key]}\n    return{rest}"
    late = section in ("optimizer", "schedule", "metric")
    ends = WRONG if not late else WRONG | {1}
    ends = {"an ImportError": LACKS | ends, "KeyboardInterrupt": ends | {130, 1}}.get(key, ends)
    ends |= (
        {1, 3}
        if key in DIES or key in ("MemoryError", "an OSError of a full disk", "a PermissionError")
        else set()
    )
    words = (
        () if key in (*DIES, "KeyboardInterrupt", "MemoryError") else (FIELDS[section] + "|mm.py",)
    )
    where = "at import" if at_import else "when it is called"
    return _case(
        draw,
        number,
        f"{section} {where}: {key}",
        section,
        code,
        ends=ends,
        words=words,
        own_code=1 in ends,
    )


def raises_inside(draw: random.Random, number: int) -> Case:
    """Have a model, a loss or a data set raise while it is used."""
    key, place = list(RAISES)[number % len(RAISES)], draw.choice(list(INSIDE))
    section, code = INSIDE[place]
    ends = frozenset({1, 2, 3, 130} if key == "KeyboardInterrupt" else {1, 2, 3})
    return _case(
        draw,
        number,
        f"{place}: {key}",
        section,
        HEAD + code.replace("@", RAISES[key]),
        ends=ends,
        own_code=True,
    )


def returns(draw: random.Random, number: int) -> Case:
    """Have a function return the wrong thing."""
    section = draw.choice(
        ["model", "model", "data", "data", "data", "optimizer", "schedule", "metric"]
    )
    value = RETURNS[section][number % len(RETURNS[section])]
    head = GOOD[section].rpartition("    return")[0]
    late = section in ("optimizer", "schedule", "metric") or "nan" in value
    ends = EITHER | {1} if late else WRONG
    return _case(
        draw,
        number,
        f"{section} returns {value[:50]}",
        section,
        f"{HEAD}{head}    return {value}\n",
        ends=ends,
    )


def broken(draw: random.Random, number: int) -> Case:
    """Have a module that is no module, or a function that is none."""
    key, section = draw.choice(list(BROKEN)), draw.choice(list(PLACES))
    late = section in ("optimizer", "schedule", "metric")
    ends = WRONG | {1} if late else WRONG
    printed = PRINTED if key == "print at import" else ""
    return _case(draw, number, f"{section}: {key}", section, BROKEN[key], ends=ends, prints=printed)


TAKEN = [raises, returns, raises, raises_inside, returns, broken, raises, returns]


def draw(source: random.Random, number: int) -> Case:
    """Return the case of a number."""
    return draw_in_turn(TAKEN, source, number, (raises, raises_inside))
