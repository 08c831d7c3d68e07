"""A line before JAX ends this process because it no longer hears of another one: JAX's own names neither it nor a cure.

JAX (0.10.2) aborts with a C++ stack; a callback of Python's in its place ends with ``std::bad_cast``.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import threading
import time

import jax

from fr_jax.distributed import _coordination

__all__ = ["tell_of_silence"]

ROOM = "fr_jax/alive/"
LEFT = "left"  # the last sign of a process, for which nobody waits
PATIENCE, POLL = 0.4, 0.125  # of a heartbeat; JAX can lose patience after 0.8


def tell_of_silence(index: int, size: int, heartbeat_seconds: float) -> None:
    """Prints, from now to the exit of process ``index``, which others it has not heard of for 0.4 of a heartbeat.

    All processes call it. Each leaves signs of life at process 0; this one looks for those of all, the others for 0's.
    """
    over = threading.Event()
    thread = threading.Thread(
        target=_listen, args=(index, size, heartbeat_seconds, over), name="fr_jax liveness", daemon=True
    )
    thread.start()

    @atexit.register  # before JAX leaves the group, as it was registered later
    def stop() -> None:
        over.set()
        thread.join(heartbeat_seconds)  # a thread inside JAX must not outlive the interpreter


def _listen(index: int, size: int, heartbeat: float, over: threading.Event) -> None:
    heard = dict.fromkeys(range(1, size) if index == 0 else (0,), time.monotonic())
    known: dict[int, str] = {}
    silent: set[int] = set()
    for count in itertools.count():
        if index == 0:
            signs = _signs()
        else:
            signs = {0: str(count)} if _answers(POLL * heartbeat) else {}
        for member in heard:
            now = time.monotonic()
            if member in signs and (signs[member] != known.get(member) or signs[member] == LEFT):
                heard[member] = now
                if member in silent:
                    silent.remove(member)
                    _coordination.say(f"process {index} hears of process {member} again.")
            elif member not in silent and now - heard[member] > PATIENCE * heartbeat:
                silent.add(member)
                _coordination.say(
                    f"process {index} has not heard of process {member} for {now - heard[member]:.0f} s. After about "
                    f"{heartbeat:.0f} s JAX ends this process (exit code 134). {_coordination.LOST_ADVICE}"
                )
        known |= signs
        is_over = over.is_set()
        if index == 0 or 0 in signs:
            _leave_sign(index, LEFT if is_over else str(count))
        if is_over:
            return
        over.wait(POLL * heartbeat)


def _leave_sign(index: int, sign: str) -> None:
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # the others will miss it
        _coordination.client().key_value_set(f"{ROOM}{index}", sign, allow_overwrite=True)


def _signs() -> dict[int, str]:
    """The newest sign of each process, in process 0: nothing is sent."""
    found = _coordination.client().key_value_dir_get(ROOM)
    return {int(key.rsplit("/", 1)[1]): value for key, value in found}


def _answers(seconds: float) -> bool:
    """Whether process 0 can be reached; waits for it for so long."""
    try:
        _coordination.client().blocking_key_value_get(f"{ROOM}0", max(1, int(seconds * 1000)))
    except jax.errors.JaxRuntimeError:
        return False
    return True
