"""Training around an ``Algorithm`` and a ``Task``: the loop, its checkpoints, its metrics and its folder.

The parts, each imported from its own file:

- ``loop``: :func:`~fr_jax.training.loop.train`, with ``Intervals``, ``Hook``, ``Totals`` and ``Outcome``;
- ``task``: ``Task`` and ``Headline``; ``classification`` makes one from an image set, ``evaluation`` sums over a test
  set;
- ``checkpoints``: ``Checkpoints``; ``metrics_log``: ``MetricsLog`` and ``read_rows``; ``run_folder``: ``RunFolder``;
- ``interrupt``: ``StopRequest``; ``profiler``: a hook that traces ten steps.

``metrics_reader`` and files with a leading underscore are parts of these.
"""
