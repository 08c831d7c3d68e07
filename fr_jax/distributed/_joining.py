"""A run of several processes: how they find each other, and how they tell each other small things.

Every process runs the same program; what JAX calls an array may live on a device of another process, and
``jax.device_put`` moves it there. The hosts agree on settings, on metrics and on when to stop through :func:`group`.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import socket
from typing import Any

import jax

from fr_jax.distributed._coordination import Group, GroupError, joined
from fr_jax.distributed._rendezvous import meet

__all__ = ["Group", "GroupError", "free_port", "group", "initialize", "is_first"]

HEARTBEAT_SECONDS = 60
"""After so long without a sign of life of one process, the others end."""
JOIN_SECONDS = 300
LEAVE_SECONDS = 20
"""How long a process that ends waits for the others to end too."""
COORDINATOR, NUM_PROCESSES, PROCESS_ID = "FR_JAX_COORDINATOR", "FR_JAX_NUM_PROCESSES", "FR_JAX_PROCESS_ID"


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    detect: bool = False,
    heartbeat_seconds: int = HEARTBEAT_SECONDS,
    join_seconds: int = JOIN_SECONDS,
) -> bool:
    """Makes this process one of a group; call it before anything else is asked of JAX.

    What is not given is taken from the environment that ``python -m fr_jax.launch`` makes. GPUs then send features
    over NCCL, CPUs over a socket of their own for each process. Calling it again in a process of the group does
    nothing.

    Args:
      coordinator: ``HOST:PORT`` where process 0 listens, as every process reaches it.
      num_processes: how many there are.
      process_id: which this one is, from 0.
      detect: let JAX find all three from SLURM, Open MPI or Kubernetes.
      heartbeat_seconds: after so long without a sign of life of one process, the others end with a message
        (JAX aborts them: exit code 134).
      join_seconds: how long to wait at the start for all processes. Where JAX waits for them (with ``detect``, or
        for one that is lost just after all have come), it aborts then: exit code 134.

    Returns:
      Whether this process is now one of several; False where nothing asked for it.

    Raises:
      GroupError: some of the three are given and others are missing or out of range, no cluster was found, JAX is in
        use already, the coordinator's port is taken or out of reach, or the others did not come in time.

    Example:
      >>> from fr_jax import distributed
      >>> distributed.initialize()  # nothing asks for a group: an ordinary process
      False
    """
    if jax.distributed.is_initialized():
        return group().size > 1
    known = _from_environment(coordinator, num_processes, process_id)
    if not detect and known == (None, None, None):
        return False
    if not detect:
        _check(*known)
    host = (known[0] or os.environ.get("JAX_COORDINATOR_ADDRESS") or "").rpartition(":")[0]
    try:
        mine = _own_address(host or _cluster_host(join_seconds))
        if not detect:
            _meet(*known, join_seconds)  # type: ignore[arg-type]
        _prepare_cpu_transfers(mine)
        # It would take SIGTERM away from Python, and only make a note of it for those who ask.
        jax.config.update("jax_enable_preemption_service", False)
        jax.distributed.initialize(
            *known,
            initialization_timeout=join_seconds,
            heartbeat_timeout_seconds=heartbeat_seconds,
            shutdown_timeout_seconds=min(heartbeat_seconds, LEAVE_SECONDS),
            cluster_detection_method=None if detect else "deactivate",
        )
    except GroupError:
        raise
    except (RuntimeError, ValueError, OSError) as error:
        raise GroupError(_why_not_joined(known, error), 2) from error
    atexit.register(_keep_clients)
    return group().size > 1


def _keep_clients() -> None:
    """Keeps JAX's clients from being destroyed at exit.

    The destructor of the CPU's transfer server waits for all connections to end, which sometimes never happens
    (jax 0.10.2): the process would hang after its work is done.
    """
    from jax._src import xla_bridge

    if xla_bridge.backends_are_initialized():
        for device in jax.local_devices():
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(device.client))


def is_first() -> bool:
    """Whether this is process 0, the one that prints, plots and writes; True in an ordinary process.

    Example:
      >>> from fr_jax import distributed
      >>> if distributed.is_first():
      ...     print("step 1: loss 2.30")
      step 1: loss 2.30
    """
    return group().index == 0


def _from_environment(*given: Any) -> tuple[str | None, int | None, int | None]:
    coordinator, *numbers = (
        os.environ.get(name) if value is None else value
        for value, name in zip(given, (COORDINATOR, NUM_PROCESSES, PROCESS_ID), strict=True)
    )
    try:
        return coordinator, *(None if number is None else int(number) for number in numbers)  # type: ignore[return-value]
    except ValueError as error:
        raise GroupError(f"{NUM_PROCESSES} and {PROCESS_ID} must be whole numbers: {error}.", 2) from None


def _check(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    names = {"--coordinator": coordinator, "--num-processes": num_processes, "--process-id": process_id}
    if missing := [name for name, value in names.items() if value is None]:
        raise GroupError(
            f"a run of several processes needs --coordinator, --num-processes and --process-id; {', '.join(missing)} "
            "is missing. Give all three, or --distributed to find them from SLURM, Open MPI or Kubernetes.",
            2,
        )
    assert coordinator is not None and num_processes is not None and process_id is not None
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise GroupError(
            f"--coordinator {coordinator} is not HOST:PORT with a port of 1 to 65535, such as 10.0.0.1:8476.", 2
        )
    if num_processes < 1 or not 0 <= process_id < num_processes:
        raise GroupError(
            f"--process-id {process_id} of --num-processes {num_processes} is out of range; it can be 0 to "
            f"{max(num_processes - 1, 0)}.",
            2,
        )


def _meet(coordinator: str, num_processes: int, process_id: int, seconds: int) -> None:
    try:
        meet(coordinator, num_processes, process_id, seconds)
    except OSError as error:
        raise GroupError(str(error), 2) from error


def _why_not_joined(known: tuple, error: Exception) -> str:
    coordinator, num_processes, process_id = known
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if coordinator is None:
        return f"could not join the group that --distributed asks for: {reason}"
    return (
        f"process {process_id} of {num_processes} could not join the group at {coordinator} ({reason}). Check that all "
        "processes are given the same --coordinator, that process 0 runs on that host, and that JAX was not used "
        "before."
    )


def _cluster_host(join_seconds: int) -> str:
    """The coordinator's host where a cluster knows it."""
    from jax._src.clusters import ClusterEnv  # no public way asks before jax.distributed.initialize

    address, *_ = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, join_seconds)
    if address is None:
        raise ValueError("no SLURM, Open MPI or Kubernetes was found around this process")
    return address.rpartition(":")[0]


def _own_address(host: str) -> str:
    """The address at which the others of the group reach this machine."""
    mine = address_towards(host.strip("[]"))
    if mine.startswith("127.") and host != "localhost" and not host.startswith("127."):
        raise OSError(
            f"{host} is {mine} on this machine, which others cannot reach: give its IP address, or 127.0.0.1 if all "
            "processes run here"
        )
    return mine


def _prepare_cpu_transfers(mine: str) -> None:
    """Sockets for what CPU devices send each other; an explicit port each, because port 0 hangs (jax 0.10.2)."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_cross_host_transfer_socket_address", f"{mine}:{free_port(mine)}")
    jax.config.update("jax_cross_host_transport_addresses", ",".join([f"{mine}:0"] * 4))


def address_towards(host: str) -> str:
    """The address of this machine on the way to ``host``; nothing is sent.

    Raises OSError where the host is unknown, or there is no way to it.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            return probe.getsockname()[0]
    except OSError as error:
        raise OSError(f"there is no way to the coordinator's host {host!r}: {error}") from error


def free_port(host: str = "127.0.0.1") -> int:
    """A port of this machine that was free a moment ago.

    Example:
      >>> from fr_jax.distributed._joining import free_port
      >>> 1 <= free_port() <= 65535
      True
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


_groups: dict[tuple[int, int], Group] = {}


def group() -> Group:
    """The group that this process belongs to, of size 1 for an ordinary process.

    Example:
      >>> from fr_jax import distributed
      >>> group = distributed.group()
      >>> group.index, group.size, group.exchange("seen by all")
      (0, 1, ['seen by all'])
    """
    where = (0, 1)
    if jax.distributed.is_initialized():
        where = (joined().process_id, joined().num_processes)
    return _groups.setdefault(where, Group(*where))
