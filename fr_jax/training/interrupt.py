"""Ctrl-C and SIGTERM as a request that the training loop honours after its step."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

__all__ = ["StopRequest"]


class StopRequest:
    """While active, the first SIGINT or SIGTERM is only noted; a second SIGINT interrupts at once.

    Attributes:
      signal: the number of the signal received, or None.

    Example:
      >>> import signal
      >>> with StopRequest() as stop:
      ...     signal.raise_signal(signal.SIGTERM)
      ...     stop.exit_code
      143
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signal: int | None = None
        self._caught = False  # by this process; in a run of several, ``signal`` may be that of another
        self._before: dict[int, object] = {}

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells count: 130 for Ctrl-C, 143 for SIGTERM; 0 without a signal."""
        return 0 if self.signal is None else 128 + self.signal

    def __enter__(self) -> StopRequest:
        # Python allows handlers in the main thread only; elsewhere (a notebook's worker) there is nothing to catch.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *unused: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._caught, self.signal = True, number
        # Not print(): a handler may interrupt another print.
        os.write(
            2, b"\nStopping after this step; Ctrl-C again stops at once and loses the work since the checkpoint.\n"
        )
