"""The processes of a run as a group that exchanges small values, without touching a device."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax

__all__ = ["Group", "GroupError", "distributed_state"]

T = TypeVar("T")

POLL_MILLISECONDS = 1000


class GroupError(RuntimeError):
    """The processes cannot work together, or another process failed.

    This process should end with ``exit_code``; ``reported`` tells whether another one prints the reason.
    """

    def __init__(self, message: str, exit_code: int = 1, *, reported: bool = False) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.reported = reported


class Group:
    """The ``size`` processes of a run, of which this is number ``index``; an ordinary process is a group of size 1."""

    def __init__(self, index: int = 0, size: int = 1) -> None:
        self.index, self.size = index, size
        self._exchanges = 0

    def exchange(self, value: T) -> list[T]:
        """The ``value`` (JSON) of every process, in order. All must call it, in the same order.

        It waits for the slowest process; a process that dies ends the others (see :func:`initialize`).

        Raises:
          GroupError: another process called :meth:`fail`.
        """
        if self.size == 1:
            return [value]
        number, self._exchanges = self._exchanges, self._exchanges + 1
        text = json.dumps(value)
        try:
            _client().key_value_set(f"fr_jax/{number}/{self.index}", text)
        except jax.errors.JaxRuntimeError as error:
            raise _unreachable(error) from error
        texts = [text if index == self.index else self._get(f"fr_jax/{number}/{index}") for index in range(self.size)]
        if number:  # all processes have begun this exchange, so all have read the one before
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                _client().key_value_delete(f"fr_jax/{number - 1}/{self.index}")
        return [json.loads(text) for text in texts]

    def from_first(self, make: Callable[[], T]) -> T:
        """The result of ``make`` in process 0 (JSON), in every process; the others do not call it.

        If ``make`` uses JAX, let all call ``jax.devices()`` before: their backends wait for each other when they start.
        """
        return self.exchange(make() if self.index == 0 else None)[0]  # type: ignore[return-value]

    def first_goes_first(self, make: Callable[[], T]) -> T:
        """Calls ``make`` in process 0, then in the others, which find what it has downloaded or cached."""
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
                _client().key_value_set("fr_jax/failed", json.dumps([self.index, exit_code]))
            except Exception as error:
                return "ALREADY_EXISTS" not in str(error)
        return True

    def _get(self, key: str) -> str:
        """Waits for ``key``, and checks in between whether a process gave up."""
        while True:
            try:
                return _client().blocking_key_value_get(key, POLL_MILLISECONDS)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise _unreachable(error) from error
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                index, exit_code = json.loads(_client().key_value_try_get("fr_jax/failed"))
                raise GroupError(f"process {index} failed; see its output.", exit_code, reported=True)


def distributed_state() -> Any:
    """The state of ``jax.distributed``."""
    # Its key-value store has no public name (jax 0.11; orbax uses it in the same way), and jax.process_count() would
    # start the backend, after which the number of CPU devices can no longer be set.
    from jax._src import distributed

    return distributed.global_state


def _client() -> Any:
    return distributed_state().client


def _unreachable(error: Exception) -> GroupError:
    return GroupError(f"process 0 can no longer be reached ({str(error).splitlines()[0]}).")


def _difference(other: Any, first: Any) -> str:
    if isinstance(other, dict) and isinstance(first, dict):
        names = [name for name in {**first, **other} if first.get(name) != other.get(name)]
        return ", ".join(f"{name} is {other.get(name)!r}, not {first.get(name)!r}" for name in names[:4])
    return f"{other!r}, not {first!r}"
