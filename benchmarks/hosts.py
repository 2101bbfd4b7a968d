"""Several hosts on one machine: network namespaces, a bridge between them, links of a given rate.

    with Hosts(2, mbit=100) as hosts:
        hosts.start(0, [sys.executable, "-m", "hybrid", ...], {"RANK": "0", ...})

Needs root and iproute2 (`why_not` says what is missing). A host has an address, a name, its own
loopback and its own `/etc/hosts`; files and processors are the machine's. Rates are by tbf, on what
a host sends; latency is the machine's. The hosts also know one another as node1, node2 and so on,
and with `start_ssh` they reach one another over ssh.
benchmarks/several_hosts.py measures on them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

NETWORK = "10.77.0"
PORT = "29511"  # where ranks meet; each set of hosts has all of its own
TOOLS = ("ip", "tc", "nsenter", "unshare")  # Debian's iproute2 and util-linux
SSHD = "/usr/sbin/sshd"
SSH_TOOLS = ("ssh", "ssh-keygen", SSHD)  # openssh-client, openssh-server


def why_not(*tools: str) -> str | None:
    """What keeps this machine from having hosts with these tools; None where nothing does."""
    if missing := [tool for tool in (*TOOLS, *tools) if not shutil.which(tool)]:
        return f"not installed: {', '.join(missing)}"
    if os.geteuid():
        return "only root can make network namespaces"
    probe = subprocess.run(["ip", "netns", "add", f"hyprobe{os.getpid()}"], capture_output=True)
    if probe.returncode:
        return f"no network namespaces: {probe.stderr.decode().strip()}"
    _run("ip", "netns", "del", f"hyprobe{os.getpid()}")
    return None


def address(host: int) -> str:
    """The address of a host, counted from 0."""
    return f"{NETWORK}.{host + 1}"


class Hosts:
    """`count` hosts that can reach one another, until the end of the `with`."""

    def __init__(self, count: int, mbit: int | None = None) -> None:
        self.count, self.mbit = count, mbit
        self.bridge = f"hybr{os.getpid() % 10_000}"
        self._files = tempfile.TemporaryDirectory()
        self._started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        names = [f"{address(i)} {self.name(i)} node{i + 1}" for i in range(self.count)]
        table = "\n".join(["127.0.0.1 localhost", *names, ""])
        (Path(self._files.name) / "hosts").write_text(table)
        try:
            _run("ip", "link", "add", self.bridge, "type", "bridge")
            _run("ip", "link", "set", self.bridge, "up")
            for host in range(self.count):
                self._add(host)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self._started:
            if process.poll() is None:
                process.kill()
            process.wait()
        for host in range(self.count):
            # The link first: a namespace takes its own with it only some time later.
            subprocess.run(["ip", "link", "del", self._link(host)], capture_output=True)
            subprocess.run(["ip", "netns", "del", self.name(host)], capture_output=True)
        subprocess.run(["ip", "link", "del", self.bridge], capture_output=True)
        self._files.cleanup()

    def name(self, host: int) -> str:
        """The host's name, which is also its namespace's."""
        return f"{self.bridge}h{host + 1}"

    def _link(self, host: int) -> str:
        """The bridge's end of the host's cable."""
        return f"{self.bridge}v{host + 1}"

    def _add(self, host: int) -> None:
        name, outside = self.name(host), self._link(host)
        _run("ip", "netns", "add", name)
        veth = ("ip", "link", "add", outside, "type", "veth", "peer", "name", "eth0")
        _run(*veth, "netns", name)
        _run("ip", "link", "set", outside, "master", self.bridge, "up")
        _run("ip", "-n", name, "addr", "add", f"{address(host)}/24", "dev", "eth0")
        _run("ip", "-n", name, "link", "set", "eth0", "up")
        _run("ip", "-n", name, "link", "set", "lo", "up")
        if self.mbit:
            burst = max(64, self.mbit // 4)  # kB; two milliseconds, or fast links stay idle
            limit = ("root", "tbf", "rate", f"{self.mbit}mbit", "burst", f"{burst}kb")
            limit += ("latency", "50ms")
            _run("tc", "-n", name, "qdisc", "add", "dev", "eth0", *limit)

    def start(
        self, host: int, command: Sequence[str], environ: Mapping[str, str], log: Path
    ) -> subprocess.Popen[bytes]:
        """A command on a host, in the background, its output in `log`."""
        table = Path(self._files.name) / "hosts"
        script = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'
        inside = ["nsenter", f"--net=/run/netns/{self.name(host)}", "unshare", "--uts", "--mount"]
        with log.open("wb") as file:
            process = subprocess.Popen(
                [*inside, "sh", "-c", script, self.name(host), str(table), *command],
                env=os.environ | {"GLOO_SOCKET_IFNAME": "eth0"} | dict(environ),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self._started.append(process)
        return process

    def start_ranks(
        self, place: Sequence[int], arguments: Sequence[str], out: Path
    ) -> list[subprocess.Popen[bytes]]:
        """`hybrid ARGUMENTS` as ranks, r on host place[r], as a scheduler starts them one by one;
        each prints to `out/rankR.log`."""
        started = []
        for rank, host in enumerate(place):
            environ = {
                "RANK": str(rank),
                "WORLD_SIZE": str(len(place)),
                "LOCAL_RANK": str(place[:rank].count(host)),
                "MASTER_ADDR": address(place[0]),
                "MASTER_PORT": PORT,
                "OMP_NUM_THREADS": "1",
            }
            command = [sys.executable, "-m", "hybrid", *arguments]
            started.append(self.start(host, command, environ, out / f"rank{rank}.log"))
        return started

    def start_ssh(self) -> dict[str, str]:
        """Let the hosts reach one another over ssh without a password. Returns the variables that a
        command needs for it: a PATH whose `ssh` knows the key.

        Each host's daemon has processes of its own, so that `pkill` over ssh, which deepspeed's
        launcher runs at its end, ends none of another host."""
        folder = Path(self._files.name)
        ours = Path(sys.executable).parent
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key"))
        known = f"SetEnv PATH={ours}:{os.environ['PATH']} GLOO_SOCKET_IFNAME=eth0"
        lines = [f"HostKey {folder}/key", f"AuthorizedKeysFile {folder}/key.pub", known]
        lines += ["StrictModes no", "UsePAM no", "PidFile none", "PermitRootLogin yes", ""]
        (folder / "sshd_config").write_text("\n".join(lines))
        Path("/run/sshd").mkdir(exist_ok=True)  # it drops its privileges there
        apart = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
        daemon = [SSHD, "-D", "-e", "-f", str(folder / "sshd_config")]
        for host in range(self.count):
            log = folder / f"sshd{host}.log"
            self.start(host, [*apart, *daemon], {}, log)
            deadline = time.monotonic() + 10
            while "listening" not in log.read_text():
                if time.monotonic() > deadline:
                    raise OSError(f"{SSHD} does not start: {log.read_text()}")
                time.sleep(0.02)
        options = ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR"]
        words = " ".join(["-i", f"{folder}/key", *(f"-o {option}" for option in options)])
        (folder / "bin").mkdir()
        client = folder / "bin" / "ssh"
        client.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} {words} "$@"\n')
        client.chmod(0o755)
        return {"PATH": f"{client.parent}:{ours}:{os.environ['PATH']}"}

    def sent(self, host: int) -> int:
        """Bytes that the host's link has carried out so far, headers and all."""
        shown = _run("ip", "-n", self.name(host), "-s", "-j", "link", "show", "eth0")
        return int(json.loads(shown)[0]["stats64"]["tx"]["bytes"])

    def cut(self, host: int) -> None:
        """Pull the host's cable."""
        _run("ip", "-n", self.name(host), "link", "set", "eth0", "down")


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
