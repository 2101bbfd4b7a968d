"""This module tells the errors by which a rank learns that another one is gone or did not come.

They are effects of another rank's failure, never its first cause. Each has a test that has the
library say it, or its text with a link to the source (tests/test_lost_peers.py)."""

# Words of gloo, of torch's store, of NCCL with its watchdog, and our own.
PEER_LOSS_MESSAGES = (
    *("closed by peer", "reset by peer", "Broken pipe", "Socket closed"),
    *("Connection was likely closed", "Timed out waiting", "Connection refused"),
    "wait timeout after",  # the store: a key that another rank sets
    "Application timeout caused pair closure",  # gloo: another collective had timed out
    "Wait timeout",  # gloo, whose peers did not come to a new group
    "Gloo connectFullMesh failed",
    "failed to pass monitoredBarrier",
    "NCCL communicator was aborted",
    "Watchdog caught collective operation timeout",
    "Some NCCL operations have failed or timed out",
    "taking the entire process down",
    "ncclRemoteError",
    "did not start within",
    "gone or cut off, and with it the meeting point",  # `Heartbeat.first_cause`
)
# Words of a collective that another rank did not take part in alike.
MISMATCHES = ("collective mismatch in your code", "op.preamble.length <= op.nbytes")


NO_MEETING = "no meeting of ranks"


def is_peer_loss(message: str) -> bool:
    """Tell whether an error says that another rank is gone or did not come.

    A rank that found nobody at the rendezvous is itself the one that did not come."""
    return NO_MEETING not in message and any(words in message for words in PEER_LOSS_MESSAGES)


def is_mismatch(message: str) -> bool:
    """Tell whether an error says that ranks called unlike collectives: one of them is to blame."""
    return any(words in message for words in MISMATCHES)


def effect_in(log: str) -> str:
    """Return the last line of a log that tells of a lost peer, empty if there is none.

    For a rank that a library aborted, such as NCCL's watchdog."""
    lines = (line.strip() for line in reversed(log.splitlines()))
    return next((line for line in lines if is_peer_loss(line)), "")
