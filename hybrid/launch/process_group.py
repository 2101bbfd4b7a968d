"""This module joins this process to the other ranks of its run, and leaves them again.

A run calls `join_process_group(placement)` first and `cleanup()` last. In between, ranks exchange
numbers through `hybrid.launch.exchange`."""

import dataclasses
import os
import socket
import sys
import time
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import timedelta

import torch
import torch.distributed as dist

from ..job.errors import JobError, StartError, first_line
from ..job.schema import Launch
from .accelerate_env import clear_accelerate_variables
from .blocking_calls import mark, set_message_timeout, unmark
from .devices import HIDDEN, announce, hides_gpus, settle
from .environment import num_local_ranks, restored_environment
from .farewell import abandon_groups
from .held_port import hold_port, is_held, take_held_port
from .placement import OWN, Placement, export_rank_variables, loopback_address
from .threads import set_num_threads, short_time_slices

DEFAULT_LIMITS = Launch()
_joined = ExitStack()  # what `cleanup` undoes
FAREWELL_S = 0.05
CONNECT_PAUSE_S = 0.1
_known = dict[str, Placement]()  # this rank's place in the group that it is in
_own_timeout: "weakref.WeakSet[dist.ProcessGroup]" = weakref.WeakSet()
_served = set[int]()  # ports on which this process has had a store
_ARRIVED = "hybrid/arrived/"  # keys of the store: each rank's host, once it has come


def join_process_group(placement: Placement, limits: Launch = DEFAULT_LIMITS) -> Placement:
    """Join the run's default process group, unless this process is in one.

    It uses nccl on GPUs and gloo on CPUs. MASTER_ADDR and MASTER_PORT name the rendezvous; a
    process alone needs neither. Returns the placement with the store where the ranks met. Raises
    StartError, which names the ranks that are missing, after `limits.start_timeout_s`."""
    if dist.is_initialized():
        return placement if placement.store else _place_in_group(placement)
    held = take_held_port()
    _joined.enter_context(restored_environment())
    export_rank_variables(placement)
    hide_gpus(placement.device_asked)
    if loopback_address(placement):
        _keep_to_loopback(placement)
    store = _open_store(placement, limits.start_timeout_s, held)
    placement = _known["here"] = _meet(store, placement, limits.start_timeout_s)
    set_num_threads(placement)
    device = placement.device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif placement.world_size > 1:
        _joined.enter_context(short_time_slices())
    timeout = timedelta(seconds=limits.setup_timeout_s)
    store.set_timeout(timeout)
    _set_default_timeouts(timeout, timeout)
    dist.init_process_group(
        placement.backend,
        store=store,
        rank=placement.rank,
        world_size=placement.world_size,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )
    mark()
    return dataclasses.replace(placement, store=store)


def hide_gpus(asked: str) -> None:
    """Show this process no GPU until `cleanup`, where a job on a host with GPUs asks for the CPU.

    Accelerate and DeepSpeed look for GPUs themselves. Raises JobError where torch has begun to use
    one, since that cannot be taken back."""
    if not hides_gpus(asked):
        return
    if torch.cuda.is_initialized():
        raise JobError(
            "launch.device = 'cpu': this process uses a GPU already; valid: a new process"
        )
    _joined.enter_context(restored_environment())
    os.environ.update(HIDDEN)


def name_device(placement: Placement) -> None:
    """Have LOCAL_RANK say this rank's GPU until `cleanup`, where its number is another one.

    DeepSpeed and Accelerate take it for the index of a device, which it is not where a scheduler
    shows each rank one device alone. DeepSpeed wants Open MPI's variable to say the same."""
    if placement.device.type != "cuda" or placement.gpu == placement.local_rank:
        return
    _joined.enter_context(restored_environment())
    for key in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"):
        if key in os.environ:
            os.environ[key] = str(placement.gpu)


def set_timeouts(seconds: float) -> None:
    """Set how long this process waits for others, in all its groups and those that it will make.

    Groups that `keep_timeout` was called for are left out. gloo takes a new timeout for collectives
    alone; its messages wait as long as the group was told first, unless the wait says otherwise."""
    if not dist.is_initialized():
        return
    timeout, of_all = timedelta(seconds=seconds), dist.distributed_c10d
    _set_default_timeouts(timeout, timeout)
    for group in list(of_all._world.pg_map):
        if group not in _own_timeout:
            of_all._set_pg_timeout(timeout, group)
    set_message_timeout(timeout if dist.get_backend() == "gloo" else None)


def keep_timeout(group: dist.ProcessGroup | None) -> None:
    """Have a group of this process keep the timeout that it was made with."""
    if group is not None:
        _own_timeout.add(group)


def hide_accelerate_configuration() -> None:
    """Delete accelerate's environment variables until `cleanup` restores them.

    The engines are built from the job, which was checked against accelerate's configuration;
    Accelerate would also read the configuration."""
    _joined.enter_context(restored_environment())
    clear_accelerate_variables()


def _set_default_timeouts(gloo: timedelta, nccl: timedelta | None) -> None:
    """Set the timeouts of groups that engines make without one; torch's default is half an hour."""
    dist.distributed_c10d.default_pg_timeout = gloo
    dist.distributed_c10d.default_pg_nccl_timeout = nccl


def _keep_to_loopback(placement: Placement) -> None:
    """Have gloo and nccl listen on the loopback, until `cleanup` restores the variables."""
    names = [name for _, name in socket.if_nameindex()]
    loopback = next((name for name in ("lo", "lo0") if name in names), "lo")  # macOS: lo0
    for variable, value in (("GLOO_SOCKET_IFNAME", loopback), ("NCCL_SOCKET_IFNAME", "=lo")):
        found = os.environ.get(variable, value)
        if found.removeprefix("=") != loopback and placement.rank == 0:
            why = "all ranks are on this host, and talk over its loopback"
            print(f"hybrid: warning: {variable} = {found!r} has no effect: {why}", file=sys.stderr)
        os.environ[variable] = value


def _place_in_group(placement: Placement) -> Placement:
    """Return this rank's place with the device that it has in the group which it is in already."""
    known = _known.get("here")
    if known is None and placement.device.type == "cuda":  # the caller has made the group
        store = dist.PrefixStore("hybrid/places", dist.distributed_c10d._get_default_store())
        known = _known["here"] = _meet(store, placement, DEFAULT_LIMITS.start_timeout_s)
    if known is None:
        return placement
    place = dataclasses.replace(placement, gpu=known.gpu, local_known=True)
    return dataclasses.replace(place, local_rank=known.local_rank)


def _meet(store: dist.Store, placement: Placement, seconds: int) -> Placement:
    """Return this rank's place once all ranks have come to the store."""
    rank, world_size = placement.rank, placement.world_size
    keys = [f"{_ARRIVED}{other}" for other in range(world_size)]
    announce(store, placement)
    store.set(keys[rank], placement.host)
    try:
        store.wait(keys, timedelta(seconds=seconds))
    except dist.DistError:
        missing = [other for other, key in enumerate(keys) if not store.check([key])]
        raise StartError(_missing(missing, world_size, seconds)) from None
    placement, local_ranks = settle(store, placement)
    os.environ.setdefault("LOCAL_RANK", str(placement.local_rank))
    if num_local_ranks() is None:
        os.environ["LOCAL_WORLD_SIZE"] = str(local_ranks)
    return placement


def _missing(ranks: Sequence[int], world_size: int, seconds: int) -> str:
    return (
        f"ranks {', '.join(map(str, ranks))} of {world_size} did not start within {seconds} s"
        " (launch.start_timeout_s)"
    )


def _open_store(placement: Placement, seconds: int, held: int | None) -> dist.Store:
    """Open the store at MASTER_ADDR:MASTER_PORT, which rank 0 holds unless torchrun does.

    held: the descriptor of a socket that has the port already, for rank 0. Where all ranks are on
    this host, the store listens on its loopback alone.
    torchrun's store outlives its ranks: after a restart (`--max-restarts`) it still has the keys of
    the first attempt. So each attempt has a prefix of its own, as under torch's `env://`."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    holds = placement.rank == 0 and not of_agent
    if not of_agent:
        address = loopback_address(placement) or address
    try:
        if holds:
            held = _bind(placement, port) if held is None else held
        else:
            _wait_for_port(address, port, seconds)
        store = dist.TCPStore(
            address,
            port,
            placement.world_size,
            is_master=holds,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,  # it would not say who is missing
            multi_tenant=True,
            master_listen_fd=held if holds else None,
        )
    except (dist.DistError, OSError) as error:
        if not holds and placement.launcher == OWN and is_held(address, port):
            raise StartError(_missing([0], placement.world_size, seconds)) from None
        where = f"rank 0 cannot listen on port {port}" if holds else f"within {seconds} s"
        raise StartError(
            f"no meeting of ranks at MASTER_ADDR:MASTER_PORT = {address}:{port}, {where}: "
            f"{first_line(error)}"
        ) from None
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"hybrid/attempt_{attempt}", store)


def _bind(placement: Placement, port: int) -> int | None:
    """Return the descriptor of a socket on the loopback, None: torch listens everywhere.

    A store that this process opened before, and still uses, keeps the port; torch shares it."""
    address = loopback_address(placement)
    if address is None:
        return None
    try:
        found = hold_port(address, port)
    except OSError:
        if port in _served:
            return None
        raise
    _served.add(found.getsockname()[1])
    return found.detach()


def _wait_for_port(address: str, port: int, seconds: int) -> None:
    """Wait until a process listens there; raises the last attempt's OSError after `seconds`.

    torch's client pauses longer after each attempt. With a timeout of 6 s it gave up after 7 to 17
    s, when its peers had failed long before."""
    deadline = time.monotonic() + seconds
    while True:
        left = deadline - time.monotonic()
        try:
            socket.create_connection((address, port), timeout=max(left, CONNECT_PAUSE_S)).close()
            return
        except OSError:
            if left < 0:
                raise
        time.sleep(CONNECT_PAUSE_S)


def cleanup(failed: bool = False) -> None:
    """Leave the process group, if this process is in one, and restore the environment variables.

    failed: nothing is waited for, since a peer may be gone."""
    try:
        set_message_timeout(None)
        unmark()
        if failed:
            abandon_groups()
        elif dist.is_initialized():
            _leave()
    finally:
        _known.clear()
        _joined.close()


def _leave() -> None:
    deepspeed = sys.modules.get("deepspeed.comm")
    if deepspeed and deepspeed.is_initialized():
        deepspeed.destroy_process_group()  # also destroys the groups that DeepSpeed keeps
    else:
        dist.destroy_process_group()
    # gloo's worker threads free the last collective's tensors asynchronously and need the GIL for
    # it. If the interpreter exits first, they abort the process (pytorch#190489), also where an
    # engine still refers to the group. Give them 50 ms.
    time.sleep(FAREWELL_S)
    constants = dist.constants
    _set_default_timeouts(constants.default_pg_timeout, constants.default_pg_nccl_timeout)
