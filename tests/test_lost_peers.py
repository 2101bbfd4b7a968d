"""Each message by which a lost peer is known: the library says it here, or its source is named."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hybrid.job.errors import StartError
from hybrid.job.schema import Launch
from hybrid.launch import process_group
from hybrid.launch.heartbeat import LOST_MEETING
from hybrid.launch.lost_peers import PEER_LOSS_MESSAGES, effect_in, is_mismatch, is_peer_loss
from hybrid.launch.placement import Placement

SOURCE = "https://github.com/pytorch/pytorch/blob/v2.11.0/torch/csrc/distributed/c10d"
# What NCCL's group says, which no CPU can: words of the message, its text, the file at SOURCE.
OF_NCCL = [
    (
        "Watchdog caught collective operation timeout",
        "[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=6463, "
        "OpType=ALLREDUCE, NumelIn=1, NumelOut=1, Timeout(ms)=1800000) ran for 1800017 "
        "milliseconds before timing out.",
        "ProcessGroupNCCL.cpp",
    ),
    (
        "Some NCCL operations have failed or timed out",
        "[Rank 1] Some NCCL operations have failed or timed out. Due to the asynchronous nature of "
        "CUDA kernels, subsequent GPU operations might run on corrupted/incomplete data.",
        "ProcessGroupNCCL.cpp",
    ),
    (
        "taking the entire process down",
        "[Rank 1] To avoid data inconsistency, we are taking the entire process down.",
        "ProcessGroupNCCL.cpp",
    ),
    (
        "NCCL communicator was aborted",
        "NCCL communicator was aborted on rank 2.  Original reason for failure was: [Rank 2] ...",
        "NCCLUtils.cpp",
    ),
    (
        "ncclRemoteError",
        "NCCL error: ncclRemoteError: A call failed possibly due to a network error or a remote "
        "process exiting prematurely.",
        "NCCLUtils.hpp",
    ),
]


def seconds(value: float) -> timedelta:
    return timedelta(seconds=value)


def groups(size: int, timeout_s: float, come: int | None = None) -> list[Any]:
    """The gloo groups of ranks that are threads of this process, or the errors of making them."""
    store, found = dist.HashStore(), [None] * size
    gloo: Any = dist.ProcessGroupGloo

    def join(rank: int) -> None:
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname="127.0.0.1")]
        options._timeout, options._threads = seconds(timeout_s), 1
        try:
            found[rank] = gloo(store, rank, size, options)
        except RuntimeError as error:
            found[rank] = error  # type: ignore[call-overload]

    threads = [threading.Thread(target=join, args=(r,)) for r in range(come or size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def said(call: Callable[[], Any]) -> str:
    """What a call raises."""
    with pytest.raises((RuntimeError, OSError)) as raised:
        call()
    return str(raised.value)


def a_peer_ends() -> str:
    """Now and then the connection is reset instead, which gloo says in the system's words."""
    for _ in range(25):
        first, second = groups(2, 9)
        work = first.recv([torch.ones(3)], 1, 0)
        del second
        text = said(work.wait)
        assert is_peer_loss(text)
        if "closed by peer" in text:
            break
    return text


def a_peer_does_not_come() -> str:
    first, _other = groups(2, 0.2)
    return said(lambda: first.allreduce([torch.ones(3)]).wait())


def another_collective_timed_out() -> str:
    first, _other = groups(2, 0.2)
    said(lambda: first.allreduce([torch.ones(3)]).wait())
    return said(lambda: first.allreduce([torch.ones(3)]).wait())


def a_group_lacks_a_rank() -> str:
    return str(groups(2, 0.2, come=1)[0])


def a_barrier_lacks_a_rank() -> str:
    first, _other = groups(2, 9)
    return said(lambda: first.monitored_barrier(seconds(0.2)))


def stores() -> tuple[Any, Any]:
    """A store and its client."""
    server = dist.TCPStore("127.0.0.1", 0, 2, True, seconds(9), wait_for_workers=False)
    return server, dist.TCPStore("127.0.0.1", server.port, 2, False, seconds(9), False)


def a_key_is_not_set() -> str:
    _server, client = stores()
    return said(lambda: client.wait(["x"], seconds(0.2)))


def the_store_is_gone() -> str:
    server, client = stores()
    del server
    return said(lambda: client.get("x"))


def nobody_meets() -> str:
    server, client = stores()
    limits, here = Launch(start_timeout_s=1), Placement(0, 2, 0, "hybrid")
    with pytest.raises(StartError) as raised:
        process_group._meet(client, here, limits.start_timeout_s)
    del server
    return str(raised.value)


REAL = {
    "closed by peer": a_peer_ends,
    "Timed out waiting": a_peer_does_not_come,
    "Application timeout caused pair closure": another_collective_timed_out,
    "Wait timeout": a_group_lacks_a_rank,
    "failed to pass monitoredBarrier": a_barrier_lacks_a_rank,
    "wait timeout after": a_key_is_not_set,
    "Connection was likely closed": the_store_is_gone,
    "did not start within": nobody_meets,
    "gone or cut off, and with it the meeting point": lambda: LOST_MEETING,
    # gloo puts the system's words behind its own (gloo/transport/tcp/pair.cc).
    "reset by peer": lambda: os.strerror(errno.ECONNRESET),
    "Broken pipe": lambda: os.strerror(errno.EPIPE),
    "Connection refused": lambda: os.strerror(errno.ECONNREFUSED),
}
# By name in torch 2.13's library; to see them takes a network that breaks in between.
RECORDED = {
    "Socket closed": "Socket closed ",  # gloo/transport/tcp/socket.cc
    "Gloo connectFullMesh failed": "Gloo connectFullMesh failed with ",  # ProcessGroupGloo.cpp
}


@pytest.mark.parametrize("words", REAL)
def test_the_library_says_so_itself(words: str) -> None:
    text = REAL[words]()
    assert words in text and is_peer_loss(text)


@pytest.mark.parametrize("words", RECORDED)
def test_the_library_has_these_words(words: str) -> None:
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if not library.exists():
        pytest.skip("torch has its library elsewhere here")
    assert RECORDED[words].encode() in library.read_bytes() and is_peer_loss(words)


@pytest.mark.parametrize(("words", "text", "file"), OF_NCCL)
def test_words_of_nccl_are_effects(words: str, text: str, file: str) -> None:
    assert words in text and is_peer_loss(text) and file
    log = f"first\n[rank1]:[E1003 ProcessGroupNCCL.cpp:621] {text}\nframe #0: x\n"
    assert text in effect_in(log)


def test_each_message_has_its_test() -> None:
    assert set(PEER_LOSS_MESSAGES) == {*REAL, *RECORDED, *(words for words, _, _ in OF_NCCL)}


def test_unlike_collectives_are_no_lost_peer() -> None:
    text = "[enforce fail at pair.cc:456] op.preamble.length <= op.nbytes. 3000 vs 8. Received data"
    assert is_mismatch(text) and not is_peer_loss(text)
    assert effect_in("all is well\n") == ""
