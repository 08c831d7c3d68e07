"""The processes of a group wait for each other here before JAX connects them, at the same address.

JAX alone (0.10.2) would abort every process with exit code 134 and a C++ stack trace that does not name the missing
one. Of two processes with the same id it drops one, and processes that disagree on their number hang later.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time

from fr_jax.distributed._coordination import GroupError

__all__ = ["meet"]

RETRY_SECONDS = 0.1
GREETING_SECONDS = 2.0  # for a connection, and for what it has to send first
GO, NO = "go", "no: "


def meet(coordinator: str, num_processes: int, process_id: int, seconds: float) -> None:
    """Returns in every process once all have called it; the coordinator's port is free again then.

    Raises:
      GroupError: process 0 cannot listen there or cannot be reached, or after ``seconds`` a process is missing.
    """
    if process_id == 0:
        _admit_all(coordinator, num_processes, seconds)
    else:
        _ask_to_join(coordinator, num_processes, process_id, seconds)


def _admit_all(coordinator: str, num_processes: int, seconds: float) -> None:
    # Each other process connects, sends its id and the number of processes, and waits for the answer.
    deadline = time.monotonic() + seconds
    present: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as opened:
        with _listen(coordinator) as server:
            while len(present) < num_processes - 1:
                server.settimeout(max(deadline - time.monotonic(), 0.001))
                try:
                    peer = opened.enter_context(server.accept()[0])
                except TimeoutError:
                    present = _connected(present)
                    missing = ", ".join(str(index) for index in range(1, num_processes) if index not in present)
                    text = (
                        f"process {missing} of {num_processes} did not come to {coordinator} within {seconds:g} s. "
                        "Check that each is started, with the same --coordinator and a --process-id of its own, and "
                        "that this port is open to it."
                    )
                    _answer(NO + text, *present.values())
                    raise GroupError(text, 2) from None
                present = _connected(present)
                index, size = _greeting(peer)
                if size != num_processes:  # 0 for a stranger, such as a port scanner
                    _answer(f"{NO}process 0 has --num-processes {num_processes}. Give all processes the same.", peer)
                elif index in present:
                    _answer(f"{NO}another process has --process-id {index} too. Give each process its own.", peer)
                else:
                    present[index] = peer
        _answer(GO, *present.values())


def _ask_to_join(coordinator: str, num_processes: int, process_id: int, seconds: float) -> None:
    host, _, port = coordinator.rpartition(":")
    me = f"process {process_id} of {num_processes}"
    deadline = time.monotonic() + seconds
    reason = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        answer = ""
        try:
            with socket.create_connection((host.strip("[]"), int(port)), min(left, GREETING_SECONDS)) as connection:
                # Linux can connect a socket to itself if nothing listens at a port of the ephemeral range.
                if connection.getsockname() != connection.getpeername():
                    connection.sendall(f"{process_id} {num_processes}".encode())
                    connection.settimeout(left)
                    with connection.makefile(errors="replace") as answers:
                        answer = answers.read(4096)
                    reason = "another program listens there"
        except OSError as error:
            reason = error.strerror or str(error)
        if answer == GO:
            time.sleep(RETRY_SECONDS)  # JAX waits a second before it retries if its service does not listen yet
            return
        if answer.startswith(NO):
            raise GroupError(f"{me} cannot join the group at {coordinator}: {answer.removeprefix(NO)}", 2)
        time.sleep(min(RETRY_SECONDS, left))
    problem = f"no process 0 admitted it at {coordinator} within {seconds:g} s ({reason})"
    advice = "with the same --coordinator and on that host, and that this port is open to the other processes"
    raise GroupError(f"{me} could not join the group: {problem}. Check that process 0 is started, {advice}.", 2)


def _listen(coordinator: str) -> socket.socket:
    """Listens at the port of JAX's service, on all interfaces."""
    port = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", coordinator).rpartition(":")[2]
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", int(port)), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", int(port)))
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (")[0]
        raise GroupError(
            f"process 0 cannot listen at {coordinator} ({reason}). Give all processes a --coordinator with another "
            f"port, or end the program that uses port {port}, such as an earlier run.",
            2,
        ) from error


def _greeting(peer: socket.socket) -> tuple[int, int]:
    """The id of a new process and its number of processes; zeros if it sends anything else."""
    peer.settimeout(GREETING_SECONDS)
    try:
        index, size = map(int, peer.recv(64).split())
        return index, size
    except (OSError, ValueError):
        return 0, 0


def _connected(present: dict[int, socket.socket]) -> dict[int, socket.socket]:
    """Those that still wait: a process that was stopped in the meantime is missing, and may come again."""

    def waits(peer: socket.socket) -> bool:
        peer.setblocking(False)
        try:
            return bool(peer.recv(1))  # empty once it has closed the connection
        except BlockingIOError:
            return True
        except OSError:
            return False

    return {index: peer for index, peer in present.items() if waits(peer)}


def _answer(text: str, *peers: socket.socket) -> None:
    for peer in peers:
        with contextlib.suppress(OSError):  # it has closed the connection
            peer.setblocking(True)
            peer.sendall(text.encode())
            peer.shutdown(socket.SHUT_WR)
