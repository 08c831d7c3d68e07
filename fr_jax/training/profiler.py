"""A hook that traces some steps with ``jax.profiler``, once everything is compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

__all__ = ["Profiler"]

PROFILED_STEPS = 10


class Profiler:
    """Traces ten steps; a context manager, which ends a trace that the run did not reach the end of.

    Args:
      folder: where the trace goes.
      first_step: steps done when training starts.
      steps: the whole run.
      warm_up: steps to leave out first, if the run is long enough.
    """

    def __init__(self, folder: Path, first_step: int, steps: int, warm_up: int) -> None:
        self._folder = folder
        self._start = first_step + max(min(warm_up, steps - first_step - PROFILED_STEPS), 0)
        self._tracing = False

    def __enter__(self) -> Profiler:
        return self

    def __call__(self, state: Any, info: Any) -> None:
        if state.step == self._start:
            jax.profiler.start_trace(self._folder)
            self._tracing = True
        elif state.step == self._start + PROFILED_STEPS:
            self.__exit__()

    def __exit__(self, *unused: object) -> None:
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False
