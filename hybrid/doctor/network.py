"""Which network interface ranks would talk through. No torch.

gloo takes the interface that the host's own name resolves to, unless GLOO_SOCKET_IFNAME names one;
nccl takes one that is not the loopback, unless NCCL_SOCKET_IFNAME says otherwise.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
import sys
from collections.abc import Iterator, Mapping

from .finding import Finding

GET_ADDRESS = 0x8915  # SIOCGIFADDR, netdevice(7)


def check_network() -> Iterator[Finding]:
    """The host's name, the interfaces' variables, and where the ranks are to meet."""
    there = interfaces()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 0))
    several = int(os.environ.get("WORLD_SIZE", 0)) > local > 0
    chosen = os.environ.get("GLOO_SOCKET_IFNAME")
    yield check_name(socket.gethostname(), _resolve(socket.gethostname()), there, several, chosen)
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if variable in os.environ:
            yield check_variable(variable, os.environ[variable], there)
    if address := os.environ.get("MASTER_ADDR"):
        yield check_meeting_point(address, _resolve(address))


def interfaces() -> dict[str, str]:
    """Names of the interfaces that are there, with their IPv4 address, empty where they have none
    or the system does not say."""
    return {name: _address_of(name) for _, name in socket.if_nameindex()}


def check_name(
    host: str, address: str | None, there: Mapping[str, str], several: bool, chosen: str | None
) -> Finding:
    """What the host's own name resolves to; `several`: hosts in this run; `chosen`: by variable."""
    usable = [name for name, ip in there.items() if ip and not _is_loopback(ip)]
    example = usable[0] if usable else "the interface"
    mend = f"for runs on several hosts: GLOO_SOCKET_IFNAME={example}"
    if chosen:
        return Finding("network", "ok", f"GLOO_SOCKET_IFNAME={chosen} is taken on {host}")
    if address is None:
        found = f"the host's name {host} does not resolve"
        return Finding("network", "warning", found, f"add it to /etc/hosts; {mend}")
    if _is_loopback(address):
        found = f"{host} resolves to {address}, the loopback: other hosts cannot reach ranks here"
        # On one host the loopback is right, so without a run of several this is no fault.
        return Finding("network", "warning" if several else "ok", found, mend)
    name = next((n for n, ip in there.items() if ip == address), None)
    if name is None and "." in address and any(there.values()):  # of IPv6 none is known
        found = f"{host} resolves to {address}, which no interface here has"
        return Finding("network", "warning", found, f"mend /etc/hosts; {mend}")
    return Finding("network", "ok", f"{host} resolves to {address}, on {name or 'an interface'}")


def check_variable(variable: str, value: str, there: Mapping[str, str]) -> Finding:
    """Whether the interfaces that a variable names exist. NCCL_SOCKET_IFNAME lists beginnings of
    names, or whole ones after a `=`, or after a `^` those that are not to be taken."""
    nccl = variable.startswith("NCCL")
    if nccl and value.startswith("^"):
        return Finding(variable, "ok", f"{value}: all but these")
    exact = not nccl or value.startswith("=")
    names = [n.strip() for n in value.removeprefix("=" if nccl else "").split(",") if n.strip()]
    missing = [
        n for n in names if not any(t == n or (not exact and t.startswith(n)) for t in there)
    ]
    if missing or not names:
        found = f"{value!r}: no such interface here"
        mend = (
            f"one of: {', '.join(name for name, ip in there.items() if ip) or 'none'}; or unset it"
        )
        return Finding(variable, "error", found, mend)
    return Finding(variable, "ok", value)


def check_meeting_point(name: str, address: str | None) -> Finding:
    """Where the ranks of this run are to meet."""
    if address is None:
        mend = "give the first host's address in place of its name"
        return Finding("MASTER_ADDR", "error", f"{name}: does not resolve", mend)
    return Finding("MASTER_ADDR", "ok", name if name == address else f"{name}, {address}")


def _resolve(name: str) -> str | None:
    try:
        return str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])
    except (OSError, UnicodeError):
        return None


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _address_of(interface: str) -> str:
    if sys.platform != "linux":
        return ""
    import fcntl

    request = struct.pack("256s", interface.encode()[:15])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe, GET_ADDRESS, request)
        except OSError:
            return ""
    return socket.inet_ntoa(answer[20:24])
