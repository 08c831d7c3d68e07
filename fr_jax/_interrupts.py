"""Ctrl-C while a program of this package still imports what it needs: one line instead of a traceback.

``python -m fr_jax.NAME`` imports the package before anything of the program runs, and the imports take seconds. Nothing
happens where a user's own program imports it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType

__all__ = ["started"]

STOPPED = 130


def _stop(number: int, frame: FrameType | None) -> None:
    os.write(2, b"fr_jax: stopped while it was starting; nothing was done.\n")
    os._exit(STOPPED)  # an exception would come out of the middle of an import, or be lost there


def _is_program() -> bool:
    """Whether Python is about to run a module of this package: it has not found its file yet."""
    words = sys.orig_argv
    return sys.argv[:1] == ["-m"] and any(
        flag == "-m" and name.split(".")[0] == "fr_jax" for flag, name in zip(words, words[1:], strict=False)
    )


def started() -> None:
    """From now on Ctrl-C is a ``KeyboardInterrupt`` again, which the program handles."""
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# A shell may have it ignored, and only the main thread may handle it.
if (
    _is_program()
    and threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, _stop)
