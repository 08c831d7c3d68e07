"""Where the processes of a group wait for each other before JAX does, which would abort without saying who is missing.

Process 0 listens at the coordinator's address. The others knock there, and are let go when all are here.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Container

__all__ = ["meet"]

RETRY_SECONDS = 0.1
GREETING_SECONDS = 2.0
"""How long process 0 listens to one that knocks, and how long one tries to connect before it tries anew."""
GO, NO = "go", "no: "


def meet(coordinator: str, num_processes: int, process_id: int, seconds: float) -> None:
    """Returns in every process once all have called it; the coordinator's port is free again then.

    Args:
      coordinator: ``HOST:PORT`` of process 0.
      num_processes: how many there are.
      process_id: which this one is, from 0.
      seconds: how long to wait for the others.

    Raises:
      OSError: process 0 cannot listen there or is not reached, or another process did not come. The message says
        what to check.

    Example:
      >>> from threading import Thread
      >>> from fr_jax.distributed._joining import free_port
      >>> from fr_jax.distributed._rendezvous import meet
      >>> coordinator = f"127.0.0.1:{free_port()}"
      >>> other = Thread(target=meet, args=(coordinator, 2, 1, 10))
      >>> other.start()
      >>> meet(coordinator, 2, 0, seconds=10)
      >>> other.join()
    """
    if process_id == 0:
        _wait_for_guests(coordinator, num_processes, seconds)
    else:
        _knock(coordinator, num_processes, process_id, seconds)


def _wait_for_guests(coordinator: str, num_processes: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    guests: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as opened:
        with _listen(coordinator) as door:
            while len(guests) < num_processes - 1:
                door.settimeout(max(deadline - time.monotonic(), 0.001))
                try:
                    guest = opened.enter_context(door.accept()[0])
                except TimeoutError:
                    text = _who_is_missing(coordinator, num_processes, _still_here(guests), seconds)
                    _answer(NO + text, *guests.values())
                    raise TimeoutError(text) from None
                guests = _still_here(guests)
                index, size = _greeting(guest)
                if size != num_processes:  # 0 for somebody who only looks for open ports
                    _answer(f"{NO}process 0 has --num-processes {num_processes}. Give all processes the same.", guest)
                elif index in guests:
                    _answer(f"{NO}another one has --process-id {index} too. Give each process its own.", guest)
                else:
                    guests[index] = guest
        _answer(GO, *guests.values())


def _knock(coordinator: str, num_processes: int, process_id: int, seconds: float) -> None:
    host, _, port = coordinator.rpartition(":")
    deadline = time.monotonic() + seconds
    reason = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        answer = ""
        try:
            with socket.create_connection((host.strip("[]"), int(port)), min(left, GREETING_SECONDS)) as door:
                if door.getsockname() != door.getpeername():  # TCP may find itself where nobody listens
                    door.sendall(f"{process_id} {num_processes}".encode())
                    door.settimeout(left)
                    with door.makefile(errors="replace") as answers:
                        answer = answers.read(4096)
                    reason = "another program listens there"
        except OSError as error:
            reason = error.strerror or str(error)
        if answer == GO:
            time.sleep(RETRY_SECONDS)  # JAX tries again only after a second where its service does not listen yet
            return
        if answer.startswith(NO):
            raise ConnectionError(
                f"process {process_id} of {num_processes} cannot join the group at {coordinator}: "
                f"{answer.removeprefix(NO)}"
            )
        time.sleep(min(RETRY_SECONDS, left))
    raise TimeoutError(
        f"process {process_id} of {num_processes} could not join the group: nobody let it in at {coordinator} within "
        f"{seconds:g} s ({reason}). Check that process 0 is started, with the same --coordinator and on that host, and "
        "that this port is open to the other processes."
    )


def _listen(coordinator: str) -> socket.socket:
    """Listens where JAX's service will."""
    at = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", f"[::]:{coordinator.rpartition(':')[2]}")
    host, _, port = at.rpartition(":")
    host = host.strip("[]")
    try:
        if host != "::":
            return socket.create_server((host, int(port)), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", int(port)), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", int(port)))
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (")[0]
        raise OSError(
            f"process 0 cannot listen at {coordinator} ({reason}). Give all processes a --coordinator "
            f"with another port, or end the program that uses port {port}, such as an earlier run."
        ) from error


def _greeting(guest: socket.socket) -> tuple[int, int]:
    """What a guest says of itself: its process and how many it believes there are; zeros where it says nothing."""
    guest.settimeout(GREETING_SECONDS)
    try:
        index, size = map(int, guest.recv(64).split())
        return index, size
    except (OSError, ValueError):
        return 0, 0


def _still_here(guests: dict[int, socket.socket]) -> dict[int, socket.socket]:
    def has_left(guest: socket.socket) -> bool:
        guest.setblocking(False)
        try:
            return not guest.recv(1)
        except BlockingIOError:
            return False
        except OSError:
            return True

    return {index: guest for index, guest in guests.items() if not has_left(guest)}


def _answer(text: str, *guests: socket.socket) -> None:
    for guest in guests:
        with contextlib.suppress(OSError):  # it has left
            guest.setblocking(True)
            guest.sendall(text.encode())
            guest.shutdown(socket.SHUT_WR)


def _who_is_missing(coordinator: str, num_processes: int, here: Container[int], seconds: float) -> str:
    missing = ", ".join(str(index) for index in range(1, num_processes) if index not in here)
    return (
        f"process {missing} of {num_processes} did not come to {coordinator} within {seconds:g} s. Check that each is "
        "started, with the same --coordinator and a --process-id of its own, and that this port is open to it."
    )
