"""How many updates late the gradients of a stage are."""

from __future__ import annotations

from fr_jax.algorithms._validation import check_count

__all__ = ["delay", "mean_delay"]


def delay(K: int, microbatches: int = 1) -> tuple[int, ...]:
    """How many updates late the gradients of each stage are at most: ceil((K-k)/M) for k = 1..K.

    A gradient of stage k arrives K-k micro-batches after its forward pass, and the stage makes one update for every M
    of them. Count micro-batches from m = 0 within their mini-batch: the gradient of m is ceil((K-k-m)/M) updates late.
    That is floor((K-k)/M) or ceil((K-k)/M), and (K-k)/M on average over the mini-batch (:func:`mean_delay`).

    Args:
      K: number of stages.
      microbatches: M, the micro-batches for one update; also the m of :func:`accumulate`.

    Returns:
      K whole numbers, first stage first; the last is 0.

    Raises:
      ValueError: K or ``microbatches`` is not a positive whole number.

    Example:
      >>> from fr_jax.algorithms import staleness
      >>> staleness.delay(K=4), staleness.delay(K=4, microbatches=2), staleness.delay(K=4, microbatches=8)
      ((3, 2, 1, 0), (2, 1, 1, 0), (1, 1, 1, 0))
    """
    check_count("K", K)
    check_count("microbatches", microbatches)
    return tuple(-(k // microbatches) for k in range(1 - int(K), 1))


def mean_delay(K: int, microbatches: int = 1) -> tuple[float, ...]:
    """How many updates late the gradients of each stage are on average: (K-k)/M for k = 1..K (:func:`delay`).

    Args:
      K: number of stages.
      microbatches: M, as for :func:`delay`.

    Returns:
      K numbers, first stage first; the last is 0.

    Raises:
      ValueError: as :func:`delay`.

    Example:
      >>> from fr_jax.algorithms import staleness
      >>> staleness.mean_delay(K=4, microbatches=2)
      (1.5, 1.0, 0.5, 0.0)
    """
    check_count("K", K)
    check_count("microbatches", microbatches)
    return tuple(k / int(microbatches) for k in reversed(range(int(K))))
