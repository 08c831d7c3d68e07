"""The flag of XLA that the programs set where their user has not."""

from __future__ import annotations

import importlib.metadata
import os

__all__ = ["set_xla_flags"]

FUSIONS = "xla_cpu_experimental_ynn_fusion_type"
TRIED = ("0.10.", "0.11.", "0.12.")  # XLA ends a program that gives it a flag, or a value, that it does not know


def set_xla_flags() -> None:
    """Keeps the convolutions of XLA's CPU backend out of the library YNNPACK.

    Gradients of a convolution's weights took there 1.5 to 7 times as long as in XLA's other implementation
    (``experiments/speed``), and a step of ResNet-20 up to twice as long. Only for versions with which that was tried,
    only where the flag is not in ``XLA_FLAGS`` already, and in vain once JAX has been asked for its devices. To have
    XLA's own choice set ``XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type=+individual_convolution``.

    Example:
      >>> import os
      >>> from fr_jax.experiments._cli.xla_flags import set_xla_flags
      >>> set_xla_flags()
      >>> "xla_cpu_experimental_ynn_fusion_type" in os.environ["XLA_FLAGS"]
      True
    """
    given = os.environ.get("XLA_FLAGS", "")
    if FUSIONS not in given and importlib.metadata.version("jaxlib").startswith(TRIED):
        os.environ["XLA_FLAGS"] = f"{given} --{FUSIONS}=-individual_convolution".lstrip()
