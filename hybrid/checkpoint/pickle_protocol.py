"""Writes a pickle anew in protocol 2, the one that torch's restricted loader reads; loads nothing.

A pickle is a program for a small machine. Here it is translated instruction by instruction, with
the standard library's disassembler; instructions that protocol 2 has not stay as they are, and the
loader refuses them. https://docs.python.org/3/library/pickletools.html"""

import pickletools
import struct
from itertools import pairwise

_TEXTS = ("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE")
_PUTS = ("MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT")
_GETS = ("BINGET", "LONG_BINGET", "GET")
Token = tuple[bytes, str | None]  # an instruction, and the text that it pushes, if it pushes one


def in_protocol_2(data: bytes) -> bytes:
    """Return the same program in protocol 2.

    Raises ValueError where it is no pickle, or a global's name is not written out beside it."""
    operations = [*pickletools.genops(data), (None, None, len(data))]
    tokens: list[Token] = [(b"\x80\x02", None)]
    memo: dict[int, str | None] = {}
    for (operation, argument, begin), (_, _, end) in pairwise(operations):
        assert operation is not None and begin is not None
        name = operation.name
        if name in ("PROTO", "FRAME"):
            continue
        if name in _TEXTS:
            tokens.append(_text(str(argument)))
        elif name in _PUTS:
            place = len(memo) if name == "MEMOIZE" else int(argument or 0)
            memo[place] = tokens[-1][1]
            if memo[place] is None:
                tokens.append((b"r" + struct.pack("<I", place), None))
        elif name in _GETS:
            text = memo.get(int(argument or 0))
            get = b"j" + struct.pack("<I", int(argument or 0))
            tokens.append((get, None) if text is None else _text(text))
        elif name == "STACK_GLOBAL":
            tokens[-2:] = [_global(tokens[-2:])]
        else:
            tokens.append((data[begin:end], None))
    return b"".join(code for code, _ in tokens)


def _text(text: str) -> Token:
    """Return the instruction for a text; the memo needs none, since each use writes it out."""
    coded = text.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(coded)) + coded, text


def _global(names: list[Token]) -> Token:
    module, name = (text for _, text in names)
    if module is None or name is None or not f"{module}.{name}".replace(".", "a").isidentifier():
        raise ValueError(f"a global has the name {module!r}, {name!r}")
    return b"c" + f"{module}\n{name}\n".encode(), None
