"""The processes of a run as a group whose members tell each other small things.

It goes over the key-value store of ``jax.distributed`` and never touches a device.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax

__all__ = ["Group", "GroupError", "joined"]

T = TypeVar("T")

LOOK_MILLISECONDS = 1000


class GroupError(RuntimeError):
    """The processes cannot work together, or another of them failed.

    Attributes:
      exit_code: what this process should end with.
      said: whether the process that failed has said why.
    """

    def __init__(self, message: str, exit_code: int = 1, *, said: bool = False) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.said = said


class Group:
    """The processes of a run; one of size 1 for an ordinary process.

    Attributes:
      index: which process this is, from 0.
      size: how many there are.
    """

    def __init__(self, index: int = 0, size: int = 1) -> None:
        self.index, self.size = index, size
        self._meetings = 0

    def exchange(self, value: T) -> list[T]:
        """Every process's ``value`` (JSON), in order of the processes. All must call it, in the same order.

        A process of the group waits for the slowest; one that dies ends the others (:func:`initialize`).

        Raises:
          GroupError: another process has failed, and said so by :meth:`fail`.
        """
        if self.size == 1:
            return [value]
        meeting, self._meetings = self._meetings, self._meetings + 1
        text = json.dumps(value)
        try:
            _client().key_value_set(f"fr_jax/{meeting}/{self.index}", text)
        except jax.errors.JaxRuntimeError as error:
            raise _unreachable(error) from error
        texts = [text if index == self.index else self._get(f"fr_jax/{meeting}/{index}") for index in range(self.size)]
        if meeting:  # all are here, so all have left the meeting before
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                _client().key_value_delete(f"fr_jax/{meeting - 1}/{self.index}")
        return [json.loads(text) for text in texts]

    def from_first(self, make: Callable[[], T]) -> T:
        """What ``make`` returns in process 0 (JSON), in every process; the others do not call it.

        Where ``make`` asks JAX for something, let all processes call ``jax.devices()`` before: their backends wait for
        each other when they start.
        """
        return self.exchange(make() if self.index == 0 else None)[0]  # type: ignore[return-value]

    def first_goes_first(self, make: Callable[[], T]) -> T:
        """``make`` in every process, in process 0 before the others: they find what it has fetched or cached."""
        made = make() if self.index == 0 else None
        self.exchange(None)
        return made if self.index == 0 else make()  # type: ignore[return-value]

    def check_same(self, what: str, value: Any) -> None:
        """Compares ``value`` (JSON) with that of process 0.

        Raises:
          GroupError: in every process, where one differs.
        """
        values = self.exchange(value)
        for index, other in enumerate(values):
            if other != values[0]:
                raise GroupError(
                    f"process {index} has another {what} than process 0: {_difference(other, values[0])}. "
                    "Start all processes with the same command and the same data.",
                    2,
                    said=self.index != 0,
                )

    def fail(self, exit_code: int) -> bool:
        """Tells the others that this process gives up, so that they do too.

        Returns:
          False where another process has told so before: what all of them would say is said once.
        """
        if self.size > 1:
            try:
                _client().key_value_set("fr_jax/failed", json.dumps([self.index, exit_code]))
            except Exception as error:
                return "ALREADY_EXISTS" not in str(error)
        return True

    def _get(self, key: str) -> str:
        """Waits for ``key`` in slices, to see in between whether somebody gave up."""
        while True:
            try:
                return _client().blocking_key_value_get(key, LOOK_MILLISECONDS)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise _unreachable(error) from error
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                index, exit_code = json.loads(_client().key_value_try_get("fr_jax/failed"))
                raise GroupError(f"process {index} failed; see what it said.", exit_code, said=True)


def joined() -> Any:
    """The state of ``jax.distributed``.

    Its key-value store has no public name (jax 0.11; orbax goes the same way), and ``jax.process_count()`` would
    start the backend, after which nobody can ask for CPU devices any more.
    """
    from jax._src import distributed

    return distributed.global_state


def _client() -> Any:
    return joined().client


def _unreachable(error: Exception) -> GroupError:
    return GroupError(f"process 0 can no longer be reached ({str(error).splitlines()[0]}).")


def _difference(other: Any, first: Any) -> str:
    if isinstance(other, dict) and isinstance(first, dict):
        names = [name for name in {**first, **other} if first.get(name) != other.get(name)]
        return ", ".join(f"{name} is {other.get(name)!r}, not {first.get(name)!r}" for name in names[:4])
    return f"{other!r}, not {first!r}"
