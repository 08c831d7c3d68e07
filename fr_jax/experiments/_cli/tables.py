"""Tables of text, and the numbers in them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

__all__ = ["markdown_table", "mean_and_deviation", "text_table"]

Cells = Sequence[object]


def text_table(head: Cells, rows: Iterable[Cells], *, left: int = 1) -> str:
    """Columns as wide as their longest cell, two spaces apart; the first ``left`` ones are aligned left.

    Example:
      >>> print(text_table(("method", "s"), [("bp", "0.5"), ("ddg", "12.25")]))
      method      s
      bp        0.5
      ddg     12.25
    """
    lines = [[str(cell) for cell in line] for line in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    align = [str.ljust] * left + [str.rjust] * (len(widths) - left)
    aligned = ([pad(cell, width) for pad, cell, width in zip(align, line, widths, strict=True)] for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in aligned)


def markdown_table(head: Cells, rows: Iterable[Cells]) -> str:
    """A table in Markdown whose source is readable too.

    Example:
      >>> print(markdown_table(("method", "s"), [("bp", "0.5")]))
      | method | s   |
      | ------ | --- |
      | bp     | 0.5 |
    """
    lines = [[str(cell) for cell in line] for line in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def mean_and_deviation(values: Iterable[float | None], diverged: Iterable[bool], digits: int) -> str:
    """Mean and standard deviation over the runs that have a value and did not diverge.

    Example:
      >>> mean_and_deviation([1.0, 2.0, 9.0], [False, False, True], 2)
      '1.50 ± 0.71'
    """
    there = [value for value, lost in zip(values, diverged, strict=True) if value is not None and not lost]
    deviation = f" ± {statistics.stdev(there):.{digits}f}" if len(there) > 1 else ""
    return f"{statistics.fmean(there):.{digits}f}{deviation}" if there else "-"
