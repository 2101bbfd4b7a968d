"""Lets one rank of `hybrid doctor` start commands on all ranks that a launcher has started.

The first rank compares strategies with `Relay.template` as the launcher of each run. That is this
module as a program: it leaves what to run in a store, and the ranks, which wait in `Relay.serve`,
start it with the variables of a rank. So each run has processes of its own, where the launcher has
put the ranks, and one that hangs or dies ends no other. It imports torch."""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..launch.environment import num_local_ranks, without_launcher
from ..launch.exchange import gather_objects
from ..launch.orphans import end_with_parent
from ..launch.placement import Placement, loopback_address
from ..launch.stopping import end_group

POLL_S = 0.05
PATIENCE_S = 10.0  # for the other ranks of a run to end by themselves, once one has failed
TAIL = 2000  # characters of what a failed rank said
_END, _RUNS = "end", "runs"


@dataclasses.dataclass(frozen=True)
class Relay:
    """Is one rank's end of the relay; `store` is on the first rank's host, at `address:port`."""

    store: dist.TCPStore
    address: str
    port: int
    rank: int
    variables: dict[str, str]  # of this process as a rank of all
    beside_first: bool  # on the first rank's host

    @classmethod
    def open(cls, placement: Placement) -> "Relay":
        """Connect all ranks of the process group; collective. The group may end afterwards."""
        address = loopback_address(placement) or os.environ["MASTER_ADDR"]
        store = None
        if placement.rank == 0:
            store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False)
        port = int(gather_objects(store.port if store else 0)[0])
        store = store or dist.TCPStore(address, port, is_master=False)
        variables = {"LOCAL_RANK": placement.local_rank, "LOCAL_WORLD_SIZE": num_local_ranks()}
        own = {key: str(value) for key, value in variables.items()}
        beside = gather_objects(placement.host_id)[0] == placement.host_id
        return cls(store, address, port, placement.rank, without_launcher() | own, beside)

    @property
    def template(self) -> str:
        """Return the launcher for `compare`, which starts so many ranks by the relay."""
        return f"{sys.executable} -m {__name__} {self.address} {self.port} {{nproc}}"

    @contextlib.contextmanager
    def serving(self, folder: Path) -> Iterator[None]:
        """Have a thread of the first rank serve while this lasts, and send all ranks home then.

        folder: of the runs, which ranks on other hosts then remove there."""
        thread = threading.Thread(target=self.serve, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self.store.set(_END, str(folder))
            thread.join(PATIENCE_S)

    def serve(self) -> None:
        """Run what the relay asks of this rank, until it is sent home or the first rank is gone."""
        number = 1
        with contextlib.suppress(dist.DistError):
            while not self.store.check([_END]):
                if self.store.check([key := f"run/{number}"]):
                    self._run(key, json.loads(self.store.get(key)))
                    number += 1
                time.sleep(POLL_S)
            if self.rank > 0 and not self.beside_first:
                shutil.rmtree(self.store.get(_END).decode(), ignore_errors=True)

    def _run(self, key: str, asked: dict[str, Any]) -> None:
        if self.rank >= asked["nproc"]:
            return
        told = {"RANK": self.rank, "WORLD_SIZE": asked["nproc"], "PYTHONUNBUFFERED": 1}
        told |= {"MASTER_ADDR": self.address, "MASTER_PORT": asked["port"]}
        environ = self.variables | {name: str(value) for name, value in told.items()}
        if asked["nproc"] == 1:
            environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        end = functools.partial(end_with_parent, os.getpid(), signal.SIGTERM)
        with tempfile.TemporaryFile() as said:
            child = subprocess.Popen(
                [sys.executable, *asked["arguments"]],
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=end if sys.platform == "linux" else None,
            )
            try:
                while child.poll() is None and not self.store.check([f"{key}/stop"]):
                    time.sleep(POLL_S)
            finally:
                end_group(child, PATIENCE_S)
            said.seek(0)
            text = said.read().decode(errors="replace")[-TAIL:]
        self.store.set(f"{key}/done/{self.rank}", json.dumps([child.returncode, text]))


def main() -> int:
    """Run `python ARGUMENTS` on the ranks: the arguments are address, port, nproc, python, ..."""
    address, port, nproc, _, *arguments = sys.argv[1:]
    store = dist.TCPStore(address, int(port), is_master=False)
    key = f"run/{store.add(_RUNS, 1)}"
    signal.signal(signal.SIGTERM, lambda *_: store.set(f"{key}/stop", ""))
    with socket.socket() as held:  # nobody else is handed the port where the ranks meet, here
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # but rank 0 can listen there
        held.bind(("", 0))
        asked = {"nproc": int(nproc), "arguments": arguments, "port": held.getsockname()[1]}
        store.set(key, json.dumps(asked))
        return _wait_for_ranks(store, key, int(nproc))


def _wait_for_ranks(store: dist.Store, key: str, nproc: int) -> int:
    """Return the first status that is not 0. Where a rank fails, the others soon have to end."""
    waiting, codes, failed = list(range(nproc)), list[int](), 0.0
    while waiting:
        for rank in [rank for rank in waiting if store.check([f"{key}/done/{rank}"])]:
            waiting.remove(rank)
            code, said = json.loads(store.get(f"{key}/done/{rank}"))
            codes.append(code)
            if code:
                print(f"rank {rank} ended with status {code}: {said}", file=sys.stderr, flush=True)
                failed = failed or time.monotonic()
        if failed and time.monotonic() - failed > PATIENCE_S:
            store.set(f"{key}/stop", "")
        time.sleep(POLL_S)
    return next((abs(code) for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(main())
