"""Values of one setting for single methods, in programs that run several: ``--microbatches 8 bp=1 fr=4 fr=8``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fr_jax.experiments._fields import SettingsError
from fr_jax.experiments._methods import METHODS, VARIANTS

__all__ = ["MICROBATCHES_HELP", "numbers_of_microbatches"]

MICROBATCHES_HELP = (
    "Numbers of micro-batches, each of which is run: M for all methods that have them, METHOD=M for one, such as "
    "--microbatches 8 bp=1 fr=4 fr=8. Default: each method's own, 1 but for gpipe and 2bw."
)


def _has_microbatches(method: str) -> bool:
    method, _ = VARIANTS.get(method, (method, {}))
    return method in METHODS and "microbatches" in METHODS[method].defaults


def numbers_of_microbatches(
    words: Sequence[str] | None, methods: Sequence[str], has_some: Callable[[str], bool] = _has_microbatches
) -> dict[str, tuple[int, ...]]:
    """The numbers of micro-batches to run, by method; a method that is not in it has its default.

    Args:
      words: ``M``, for every method that has micro-batches and no number of its own, or ``METHOD=M``.
      methods: those that are run.
      has_some: whether a method has micro-batches; by default its card says so.

    Raises:
      SettingsError: a word is malformed, given twice, or for a method that is not run or has no micro-batches.

    Example:
      >>> numbers_of_microbatches(("8", "bp=1", "fr=4", "fr=8"), ("bp", "fr", "ddg", "dni"))
      {'bp': (1,), 'fr': (4, 8), 'ddg': (8,)}
    """
    given = " ".join(words or ())
    having = [method for method in methods if has_some(method)]
    found: dict[str, list[int]] = {}
    for word in words or ():
        method, equals, number = word.rpartition("=")
        if not number.isdecimal() or int(number) < 1 or (equals and not method):
            raise SettingsError(
                f"--microbatches {given}: {word} is malformed; write M or METHOD=M, such as 8 or fr=8, M at least 1."
            )
        if method and method not in having:
            why = "has no micro-batches" if method in methods else "is not among --methods"
            raise SettingsError(f"--microbatches {given}: {method} {why}. Drop {word}.")
        found.setdefault(method, []).append(int(number))
    if found and not having:
        raise SettingsError(f"--microbatches {given}: none of {', '.join(methods)} has micro-batches. Drop the flag.")
    for numbers in found.values():
        if len(set(numbers)) < len(numbers):
            raise SettingsError(f"--microbatches {given} names a number twice; give different ones.")
    of_all = found.get("", [])
    return {method: tuple(found.get(method, of_all)) for method in having if method in found or of_all}
