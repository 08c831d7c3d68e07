"""The devices of a program: the flag of XLA that the programs set if their user has not, and how many CPU devices."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
from typing import Any

import jax

from fr_jax.distributed import group
from fr_jax.experiments._fields import SettingsError

__all__ = ["request_devices", "set_xla_flags", "take_devices"]

FUSIONS = "xla_cpu_experimental_ynn_fusion_type"
TRIED = ("0.10.", "0.11.", "0.12.")  # XLA ends a program that gives it a flag, or a value, that it does not know


def set_xla_flags() -> None:
    """Keeps the convolutions of XLA's CPU backend out of the library YNNPACK.

    Gradients of a convolution's weights took there 1.5 to 7 times as long as in XLA's other implementation
    (``experiments/speed``), and a step of ResNet-20 up to twice as long. Set only for versions with which that was
    tried, and only if the flag is not in ``XLA_FLAGS`` already; it has no effect once JAX has been asked for its
    devices. For XLA's own choice set ``XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type=+individual_convolution``.

    Example:
      >>> import os
      >>> from fr_jax.experiments._cli.devices import set_xla_flags
      >>> set_xla_flags()
      >>> "xla_cpu_experimental_ynn_fusion_type" in os.environ["XLA_FLAGS"]
      True
    """
    given = os.environ.get("XLA_FLAGS", "")
    if FUSIONS not in given and importlib.metadata.version("jaxlib").startswith(TRIED):
        os.environ["XLA_FLAGS"] = f"{given} --{FUSIONS}=-individual_convolution".lstrip()


def request_devices(wanted: int) -> None:
    """Asks JAX for that many CPU devices, if nothing has been asked of JAX yet; harmless where there are GPUs."""
    set_xla_flags()
    config: Any = jax.config
    with contextlib.suppress(RuntimeError, ValueError):  # the backend is up already: use what there is
        if config.jax_num_cpu_devices < wanted:
            config.update("jax_num_cpu_devices", wanted)


def take_devices(K: int, *, each: bool = False, instead: str = "") -> None:
    """Starts JAX with K devices, or with those of a group's processes; these meet here and must all call it.

    Args:
      K: how many at least, where JAX makes them: on the CPU.
      each: K stages must have a device each; otherwise they may share what there is.
      instead: what else to do if there are fewer, as it stands in a list.

    Raises:
      SettingsError: there are fewer, and ``each`` stage must have one.
    """
    set_xla_flags()
    if group().size == 1:
        request_devices(K)
    there = len(jax.devices())
    if each and there < K:
        kind = jax.devices()[0].platform
        more = "call it before anything else is asked of JAX, which then makes as many"
        if kind != "cpu":
            more = "set JAX_PLATFORMS=cpu, where the program makes as many as it needs"
        if group().size > 1:
            more = f"start {K} processes"
        raise SettingsError(
            f"--K {K} stages need a device each, and JAX sees {there} ({kind}). Use at most --K {there}, "
            f"{instead}or {more}."
        )
