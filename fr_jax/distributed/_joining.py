"""How the processes of a run, which all run the same program, find each other."""

from __future__ import annotations

import atexit
import ctypes
import os
import socket
from typing import Any

import jax

from fr_jax.distributed._coordination import Group, GroupError, distributed_state
from fr_jax.distributed._liveness import tell_of_silence
from fr_jax.distributed._rendezvous import meet

__all__ = ["COORDINATOR", "NUM_PROCESSES", "PROCESS_ID", "free_port", "group", "initialize", "is_first"]

HEARTBEAT_SECONDS = 60
STUCK = 10  # heartbeats that a process may take for what it does alone: a first compilation can take minutes
JOIN_SECONDS = 300
LEAVE_SECONDS = 20  # how long a process that ends waits for the others to end too
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
    """Makes this process a member of a group; call it before any other use of JAX. A second call does nothing.

    Between processes, GPUs exchange arrays over NCCL, and CPUs over one socket per process.

    Args:
      coordinator: ``HOST:PORT`` at which all processes can reach process 0. This and the next two are by default read
        from the environment made by ``python -m fr_jax.launch``.
      num_processes: number of processes.
      process_id: number of this process, from 0.
      detect: let JAX find all three from SLURM, Open MPI or Kubernetes.
      heartbeat_seconds: after so long without a sign of life from one process, JAX aborts the others (exit code 134);
        each names it first. One that is alive but does not come to a meeting is named every minute, and waited for
        ten times as long.
      join_seconds: how long to wait for all processes at the start. With ``detect``, or for a process that is lost
        just after all have come, JAX does the waiting and aborts (exit code 134).

    Returns:
      Whether this process is now one of several; False if nothing asks for a group.

    Raises:
      GroupError: some of the three are missing or out of range, no cluster was found, JAX is in use already, the port
        of the coordinator is taken or cannot be reached, or a process is missing after ``join_seconds``.

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
    try:
        if detect:
            address = known[0] or os.environ.get("JAX_COORDINATOR_ADDRESS") or _cluster_address(join_seconds)
            mine = _own_address(address)
        else:
            _check(*known)
            mine = _own_address(known[0])  # type: ignore[arg-type]
            meet(*known, join_seconds)  # type: ignore[arg-type]
        _prepare_cpu_transfers(mine)
        # JAX's preemption service would take SIGTERM away from Python and only record it.
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
    group().patience = STUCK * heartbeat_seconds
    if group().size > 1:
        tell_of_silence(group().index, group().size, heartbeat_seconds)
    return group().size > 1


_groups: dict[tuple[int, int], Group] = {}


def group() -> Group:
    """The group of this process, of size 1 for an ordinary process.

    Example:
      >>> from fr_jax import distributed
      >>> group = distributed.group()
      >>> group.index, group.size, group.exchange("seen by all")
      (0, 1, ['seen by all'])
    """
    where = (0, 1)
    if jax.distributed.is_initialized():
        where = (distributed_state().process_id, distributed_state().num_processes)
    return _groups.setdefault(where, Group(*where))


def is_first() -> bool:
    """Whether this is process 0, the one that prints, plots and writes; True in an ordinary process."""
    return group().index == 0


def free_port(host: str = "127.0.0.1") -> int:
    """A port of this machine that is free at the moment."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


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
    host, _, port = coordinator.rpartition(":")  # the last colon: an IPv6 address has more
    if not host or not port.isdecimal() or not 1 <= int(port) <= 65535:
        wanted = "HOST:PORT with a port of 1 to 65535, such as 10.0.0.1:8476"
        raise GroupError(f"--coordinator {coordinator} is not {wanted}.", 2)
    if num_processes < 1 or not 0 <= process_id < num_processes:
        given = f"--process-id {process_id} of --num-processes {num_processes}"
        raise GroupError(f"{given} is out of range; it can be 0 to {max(num_processes - 1, 0)}.", 2)


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


def _cluster_address(join_seconds: int) -> str:
    """The address of the coordinator as the cluster's scheduler states it."""
    from jax._src.clusters import ClusterEnv  # nothing public tells it before jax.distributed.initialize (jax 0.10.2)

    address, *_ = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, join_seconds)
    if address is None:
        raise ValueError("no SLURM, Open MPI or Kubernetes was found around this process")
    return address


def _own_address(coordinator: str) -> str:
    """The address of this machine for the others of the group."""
    # Connecting a UDP socket sends nothing, but selects the network interface on the way to the coordinator.
    host = coordinator.rpartition(":")[0]
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(host.strip("[]"), 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)
            mine = probe.getsockname()[0]
    except OSError as error:
        raise OSError(f"there is no way to the coordinator's host {host!r}: {error}") from error
    if mine.startswith("127.") and host != "localhost" and not host.startswith("127."):
        raise OSError(
            f"{host} is {mine} on this machine, which others cannot reach: give its IP address, or 127.0.0.1 if all "
            "processes run here"
        )
    return mine


def _prepare_cpu_transfers(mine: str) -> None:
    """Gives CPU devices sockets for what they send each other, at an explicit port: port 0 hangs (jax 0.10.2)."""
    from jax._src import xla_bridge

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_cross_host_transfer_socket_address", f"{mine}:{free_port(mine)}")
    jax.config.update("jax_cross_host_transport_addresses", ",".join([f"{mine}:0"] * 4))
    xla_bridge.register_backend_factory("cpu", lambda: _cpu_client(mine), priority=0, fail_quietly=False)


def _cpu_client(mine: str) -> Any:
    """JAX's own, whose collectives listen at this machine's address.

    JAX (0.10 to 0.12) lets them listen where the machine's own name leads. On many machines that is 127.0.0.1, which
    no other one can reach: a stage on CPUs of two machines failed after minutes.
    """
    from jax._src import xla_bridge
    from jax._src.lib import _jax

    client = distributed_state().client
    return xla_bridge.make_cpu_client(_jax.make_gloo_tcp_collectives(distributed_client=client, hostname=mine))


def _keep_clients() -> None:
    """Keeps JAX's clients from being destroyed at exit.

    The destructor of the CPU's transfer server waits for all connections to end, which sometimes never happens
    (jax 0.10.2): the process would hang after its work is done.
    """
    from jax._src import xla_bridge

    if xla_bridge.backends_are_initialized():
        for device in jax.local_devices():
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(device.client))
