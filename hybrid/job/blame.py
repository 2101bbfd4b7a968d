"""This module tells an error of a user's code in one line, with the line of theirs. No torch."""

from .errors import first_line
from .user_code import user_line

LONGEST = 300  # characters of a message that are shown


def tell_error(error: BaseException) -> str:
    """Return an error in one line: its class, its message and the user's line, `(file.py:12)`."""
    message = " ".join(first_line(error).split())
    if len(message) > LONGEST:
        message = f"{message[:LONGEST]} ..."
    kind, place = type(error).__name__, user_line(error)
    words = kind if message == kind else f"{kind}: {message}"
    return f"{words} ({place})" if place else words
