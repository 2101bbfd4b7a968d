"""Checks which network interface ranks would talk through.

gloo takes the interface that the host's own name resolves to, unless GLOO_SOCKET_IFNAME names one.
nccl takes one that is not the loopback, unless NCCL_SOCKET_IFNAME says otherwise."""

import fnmatch
import ipaddress
import os
import socket
from collections.abc import Iterator, Mapping

import psutil

from .finding import Finding


def check_network() -> Iterator[Finding]:
    """Check the host's name, the variables that name interfaces, and the rendezvous."""
    there, host = interfaces(), socket.gethostname()
    several = int(os.environ.get("WORLD_SIZE", 0)) > int(os.environ.get("LOCAL_WORLD_SIZE", 0)) > 0
    yield check_name(host, _resolve(host), there, several, os.environ.get("GLOO_SOCKET_IFNAME"))
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if variable in os.environ:
            yield check_variable(variable, os.environ[variable], there)
    if name := os.environ.get("MASTER_ADDR"):
        if address := _resolve(name):
            yield Finding("MASTER_ADDR", "ok", name if name == address else f"{name}, {address}")
        else:
            mend = "give the first host's address in place of its name"
            yield Finding("MASTER_ADDR", "error", f"{name}: does not resolve", mend)


def interfaces() -> dict[str, str]:
    """Map each interface of this host to its IPv4 address, or to "" where it has none."""
    return {
        name: next((a.address for a in addresses if a.family == socket.AF_INET), "")
        for name, addresses in psutil.net_if_addrs().items()
    }


def check_name(
    host: str, address: str | None, there: Mapping[str, str], several: bool, chosen: str | None
) -> Finding:
    """Check the host's address, for a run of several hosts or one; `chosen` is an interface."""
    example = next((n for n, ip in there.items() if ip and not _is_loopback(ip)), "the interface")
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
    if name is None and "." in address and any(there.values()):  # IPv6 addresses are not looked up
        found = f"{host} resolves to {address}, which no interface here has"
        return Finding("network", "warning", found, f"correct /etc/hosts; {mend}")
    return Finding("network", "ok", f"{host} resolves to {address}, on {name or 'an interface'}")


def check_variable(variable: str, value: str, there: Mapping[str, str]) -> Finding:
    """Check that the interfaces which a variable names exist."""
    # NCCL_SOCKET_IFNAME lists beginnings of names, whole names after a `=`, or after a `^` those
    # that nccl must not take.
    nccl = variable.startswith("NCCL")
    if nccl and value.startswith("^"):
        return Finding(variable, "ok", f"{value}: all but these")
    end = "*" if nccl and not value.startswith("=") else ""
    names = [n.strip() for n in value.removeprefix("=" if nccl else "").split(",") if n.strip()]
    if names and all(fnmatch.filter(there, name + end) for name in names):
        return Finding(variable, "ok", value)
    usable = ", ".join(name for name, ip in there.items() if ip) or "none"
    found, mend = f"{value!r}: no such interface here", f"one of: {usable}; or unset it"
    return Finding(variable, "error", found, mend)


def _resolve(name: str) -> str | None:
    try:
        return str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])
    except (OSError, UnicodeError):
        return None


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
