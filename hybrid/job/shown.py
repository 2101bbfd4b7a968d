"""This module makes texts of users and of files fit to be shown: no control characters, no end.

An escape sequence in a name or a message could rewrite a terminal, and a message may have a million
letters. What is written to JSON stays whole."""

import re

LONGEST_LINE = 2000  # characters of a line that are shown
# Control characters but for the new line and the tab; marks that turn the direction of writing, or
# break lines; the halves of characters that stand for bytes of a file's name that is no UTF-8.
_HIDDEN = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(line: str) -> str:
    """Return a line in which what cannot be shown, such as a part of a file's name, is escaped."""
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def without_controls(text: str) -> str:
    """Return a text, of several lines perhaps, in which control characters are escaped."""
    return _HIDDEN.sub(lambda found: ascii(found[0])[1:-1], text)


def on_one_line(text: str, longest: int = LONGEST_LINE) -> str:
    """Return a text as one line that can be shown, without the middle of a very long one."""
    return printable(cut(" ".join(text.split()), longest))


def cut(text: str, longest: int = LONGEST_LINE) -> str:
    """Return a text without its middle where it is longer; what is valid stands at the end."""
    if len(text) <= longest:
        return text
    end = longest // 3
    return f"{text[: longest - end]} [... {len(text) - longest} characters ...] {text[-end:]}"


def cut_lines(text: str) -> str:
    """Return a text of several lines, such as a traceback, each of which can be shown."""
    return "\n".join(without_controls(cut(line)) for line in text.split("\n"))
