"""Calls into orbax by one process alone, that neither print nor leave work behind when they fail."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import pathlib
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

from fr_jax import distributed

_DRAIN_SECONDS = 30


class _DrainingLoop(asyncio.SelectorEventLoop):
    """An event loop that finishes what was begun before it closes.

    When one array fails, orbax closes its loop while tensorstore still works on the others: they would go on writing
    into a folder that is being removed, and print a traceback each.
    """

    def close(self) -> None:
        if not self.is_closed() and (pending := asyncio.all_tasks(self)):
            self.run_until_complete(asyncio.wait(pending, timeout=_DRAIN_SECONDS))
        super().close()

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Nothing: one failure is raised in the caller, and asyncio would print each further one."""


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Silences orbax's log, and the tracebacks of its threads: what they raise is raised again in the caller.

    After a KeyboardInterrupt both stay silent: the threads work on until the process ends, and fail then.
    """
    logger, hook, new_event_loop = logging.getLogger("absl"), threading.excepthook, asyncio.new_event_loop
    level = logger.level

    def excepthook(args: threading.ExceptHookArgs) -> None:
        if not type(args.thread).__module__.startswith("orbax"):
            hook(args)

    logger.setLevel(logging.CRITICAL)
    threading.excepthook = excepthook
    asyncio.new_event_loop = _DrainingLoop
    interrupted = False
    try:
        yield
    except KeyboardInterrupt:
        interrupted = True
        raise
    except Exception as error:
        _wait_for_threads()
        _forget_coroutines(error)
        raise
    finally:
        if not interrupted:
            logger.setLevel(level)
            threading.excepthook = hook
        asyncio.new_event_loop = new_event_loop


def _wait_for_threads() -> None:
    """Those of orbax still write after one of them, or its caller, has failed."""
    deadline = time.monotonic() + _DRAIN_SECONDS
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("orbax") and thread is not threading.current_thread():
            # Its own join raises what the thread has raised.
            threading.Thread.join(thread, timeout=max(0.0, deadline - time.monotonic()))


def _forget_coroutines(error: BaseException) -> None:
    """Those that orbax (0.12.8) made before it failed, and does not await, would end in a warning of Python's."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        traceback.clear_frames(error.__traceback__)


def orbax_manager(directory: pathlib.Path, **options: Any) -> Any:
    """Of process 0 alone, in a run of several: or orbax waits for the others, who do not come."""
    import orbax.checkpoint as ocp

    if distributed.group().size > 1:
        alone = ocp.options.MultiprocessingOptions(active_processes={0}, barrier_sync_key_prefix="0")
        options |= {"multiprocessing_options": alone, "create": False}
    options |= {"enable_async_checkpointing": False, "lightweight_initialize": True}
    return ocp.CheckpointManager(directory, options=ocp.CheckpointManagerOptions(**options))


def one_line(error: BaseException) -> str:
    """What orbax or the system said, shortened."""
    text = " ".join(str(error).split())
    short = text if len(text) <= 240 else f"{text[:80]} ... {text[-150:]}"  # tensorstore's reason comes last
    return f"{type(error).__name__}: {short}"
