"""Stages: wrap a module of Flax or Equinox, chain layers into a stage, cut a list of layers into K stages."""

from fr_jax.stages.chains import chain, check_stages, dies_with_function, numbered, partition, traced_once
from fr_jax.stages.equinox import from_equinox
from fr_jax.stages.linen import from_linen
from fr_jax.stages.nnx import from_nnx

__all__ = [
    "chain",
    "check_stages",
    "dies_with_function",
    "from_equinox",
    "from_linen",
    "from_nnx",
    "numbered",
    "partition",
    "traced_once",
]
