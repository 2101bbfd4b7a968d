"""This module holds the port at which the ranks of one host meet, and hands it to rank 0.

Whoever starts the ranks binds a socket to the port before any of them runs, so that no other
process can take it in between. Rank 0 gets the socket, and listens on it once its store is there:
torch's client would wait without end on a port that listens while no store answers. The address is
the loopback's, which no other host reaches. The module needs no torch."""

import errno
import os
import socket

LOOPBACK = "127.0.0.1"
VARIABLE = "HYBRID_STORE_FD"  # the descriptor of the socket, in rank 0's environment


def hold_port(address: str = LOOPBACK, port: int = 0) -> socket.socket:
    """Return a socket that has this port, 0: a free one. Nobody can connect yet. Raises OSError."""
    held = socket.socket(_family(address))
    try:
        if port:  # the connections of a run before may still wait for their end
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind((address, port))
    except OSError:
        held.close()
        raise
    return held


def is_held(address: str, port: int) -> bool:
    """Tell whether some process has this port of the host, whether or not it listens there."""
    with socket.socket(_family(address)) as probe:
        try:
            probe.bind((address, port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False


def take_held_port() -> int | None:
    """Return the descriptor of the socket that this process was handed, None if it was not.

    A variable that another process left does not count: the socket must have MASTER_PORT. No
    process that this one starts gets the socket."""
    try:
        found = socket.socket(fileno=int(os.environ.pop(VARIABLE, "")))
    except (OSError, ValueError, OverflowError):
        return None
    try:
        if str(found.getsockname()[1]) != os.environ.get("MASTER_PORT"):
            return None
        found.set_inheritable(False)
        return found.fileno()
    except (OSError, LookupError, TypeError):
        return None
    finally:
        found.detach()  # whoever has it closes it


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
