"""The processes of a run as a group that exchanges small values, without touching a device."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TypeVar

import jax

__all__ = ["LOST_ADVICE", "Group", "GroupError", "client", "distributed_state", "say"]

T = TypeVar("T")

POLL_MILLISECONDS = 1000
REMIND_SECONDS = 60.0  # after so long, and again, a process says what it waits for


class GroupError(RuntimeError):
    """The processes cannot work together, or another process failed.

    This process should end with ``exit_code``; ``reported`` tells whether another one prints the reason.
    """

    def __init__(self, message: str, exit_code: int = 1, *, reported: bool = False) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.reported = reported


class Group:
    """The ``size`` processes of a run, of which this is number ``index``; an ordinary process is a group of size 1.

    Attributes:
      patience: seconds after which a process that is alive but does not go on ends the run.
    """

    def __init__(self, index: int = 0, size: int = 1) -> None:
        self.index, self.size = index, size
        self.patience = math.inf
        self._exchanges = self._signs = 0
        self._is_exchanging, self._is_patient = False, False

    def exchange(self, value: T) -> list[T]:
        """The ``value`` (JSON) of every process, in order. All must call it, in the same order.

        It waits for the slowest process; a process that dies ends the others (see :func:`initialize`). After a minute,
        and every minute, it prints which processes have not come.

        Raises:
          GroupError: another process called :meth:`fail`, or has not come within ``patience``.
        """
        if self.size == 1:
            return [value]
        self._is_exchanging = True
        try:
            return self._exchange(value)
        finally:
            self._is_exchanging = False
            self.sign()

    def _exchange(self, value: Any) -> list[Any]:
        number, self._exchanges = self._exchanges, self._exchanges + 1
        text = json.dumps(value)
        try:
            client().key_value_set(_key(number, self.index), text)
        except jax.errors.JaxRuntimeError as error:
            raise _unreachable(error) from error
        begun = time.monotonic()
        texts = [text if index == self.index else self._get(number, index, begun) for index in range(self.size)]
        if number:  # all processes have begun this exchange, so all have read the one before
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                client().key_value_delete(_key(number - 1, self.index))
        return [json.loads(text) for text in texts]

    def from_first(self, make: Callable[[], T]) -> T:
        """The result of ``make`` in process 0 (JSON), in every process; the others do not call it.

        If ``make`` uses JAX, let all call ``jax.devices()`` before: their backends wait for each other when they start.
        The others wait for as long as it takes.
        """
        with self._patiently():
            return self.exchange(make() if self.index == 0 else None)[0]  # type: ignore[return-value]

    def first_goes_first(self, make: Callable[[], T]) -> T:
        """Calls ``make`` in process 0, then in the others, which find what it has downloaded or cached."""
        with self._patiently():
            made = make() if self.index == 0 else None
            self.exchange(None)
        return made if self.index == 0 else make()  # type: ignore[return-value]

    def check_same(self, what: str, value: Any) -> None:
        """Compares ``value`` (JSON) with that of process 0.

        Raises:
          GroupError: in every process, if one differs.
        """
        values = self.exchange(value)
        for index, other in enumerate(values):
            if other != values[0]:
                problem = f"process {index} has another {what} than process 0: {_difference(other, values[0])}. "
                advice = "Start all processes with the same command and the same data."
                raise GroupError(problem + advice, 2, reported=self.index != 0)

    def fail(self, exit_code: int) -> bool:
        """Tells the others that this process gives up, so that they stop too; False if another one did so before."""
        if self.size > 1:
            try:
                client().key_value_set("fr_jax/failed", json.dumps([self.index, exit_code]))
            except Exception as error:
                return "ALREADY_EXISTS" not in str(error)
        return True

    def sign(self) -> None:
        """A sign that this process goes on, for :meth:`watched`."""
        self._signs += 1

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Watches the calling thread: where it gives no :meth:`sign` for a minute, a line says where it is.

        So a process says that it is stuck, and so do those that wait for it inside JAX, where they come to no exchange.
        After ``patience`` the process is ended (exit code 1), and the others with it.
        """
        if self.size == 1:
            yield
            return
        over = threading.Event()
        arguments = threading.get_ident(), over
        threading.Thread(target=self._watch, args=arguments, name="fr_jax watch", daemon=True).start()
        try:
            yield
        finally:
            over.set()

    def _watch(self, thread: int, over: threading.Event) -> None:
        seen, since, said = self._signs, time.monotonic(), 0
        while not over.wait(POLL_MILLISECONDS / 1000):
            # An exchange says itself what it waits for; what process 0 does alone takes its time.
            if self._signs != seen or self._is_exchanging or self._is_patient:
                seen, since, said = self._signs, time.monotonic(), 0
            seconds = time.monotonic() - since
            if seconds >= (said + 1) * REMIND_SECONDS:
                said += 1
                where = _place(sys._current_frames().get(thread))
                say(f"process {self.index} has been in {where} for {_time(seconds)}: busy, stuck, or waiting.")
            if seconds > self.patience:
                say(f"process {self.index} did not go on for {_time(seconds)}, and is ended. {ADVICE}")
                self.fail(1)
                os._exit(1)  # the thread that is stuck cannot raise

    @contextlib.contextmanager
    def _patiently(self) -> Iterator[None]:
        self._is_patient = True
        try:
            yield
        finally:
            self._is_patient = False

    def _get(self, number: int, index: int, begun: float) -> str:
        """Waits for what process ``index`` brings to exchange ``number``, and checks in between if one gave up."""
        said = int((time.monotonic() - begun) / REMIND_SECONDS)
        while True:
            try:
                return client().blocking_key_value_get(_key(number, index), POLL_MILLISECONDS)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise _unreachable(error) from error
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                failed, exit_code = json.loads(client().key_value_try_get("fr_jax/failed"))
                raise GroupError(f"process {failed} failed; see its output.", exit_code, reported=True)
            seconds = time.monotonic() - begun
            if seconds > self.patience and not self._is_patient:
                raise GroupError(f"{self._missing(number)} within {_time(seconds)}. {ADVICE}")
            if seconds >= (said + 1) * REMIND_SECONDS:
                said += 1
                say(f"process {self.index} waits: after {_time(seconds)} {self._missing(number)}.")

    def _missing(self, number: int) -> str:
        """Which processes have not come to an exchange, and which one that is."""

        def has_come(index: int) -> bool:
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                return bool(client().key_value_try_get(_key(number, index)))
            return False

        missing = ", ".join(str(index) for index in range(self.size) if not has_come(index))
        where = _place(sys._getframe())
        return f"process {missing}, alive but busy or stuck, has not come to meeting {number}, in {where}"


ADVICE = (
    "See where it is (py-spy dump --pid PID), or give it more time: a process is waited for ten times as long as "
    "--heartbeat says."
)

LOST_ADVICE = (
    "Check that machine and the network, then start all processes again; a training program continues with --resume "
    "from its newest checkpoint."
)


def _key(number: int, index: int) -> str:
    return f"fr_jax/{number}/{index}"


def _place(frame: FrameType | None) -> str:
    """Where a thread is, outside of this file: the function, its file and the line."""
    while frame is not None and frame.f_code.co_filename == __file__:
        frame = frame.f_back
    if frame is None:
        return "an unknown place"
    code = frame.f_code
    file = os.sep.join(code.co_filename.split(os.sep)[-2:])
    return f"{code.co_qualname} ({file}, line {frame.f_lineno})"


def _time(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 60 else f"{seconds:.0f} s"


def say(text: str) -> None:
    """Prints a line of the library on stderr."""
    print(f"fr_jax: {text}", file=sys.stderr, flush=True)


def distributed_state() -> Any:
    """The state of ``jax.distributed``."""
    # Its key-value store has no public name (jax 0.11; orbax uses it in the same way), and jax.process_count() would
    # start the backend, after which the number of CPU devices can no longer be set.
    from jax._src import distributed

    return distributed.global_state


def client() -> Any:
    """The key-value store that the processes share."""
    return distributed_state().client


def _unreachable(error: Exception) -> GroupError:
    return GroupError(f"process 0 can no longer be reached ({str(error).splitlines()[0]}). {LOST_ADVICE}")


def _difference(other: Any, first: Any) -> str:
    if isinstance(other, dict) and isinstance(first, dict):
        names = [name for name in {**first, **other} if first.get(name) != other.get(name)]
        return ", ".join(f"{name} is {other.get(name)!r}, not {first.get(name)!r}" for name in names[:4])
    return f"{other!r}, not {first!r}"
