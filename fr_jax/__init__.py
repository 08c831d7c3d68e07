"""fr_jax: training neural networks without backward locking, in JAX.

A network is cut into K stages (``partition``), each placed on its own device (``placement``), and trained by a method
(``features_replay``, ``ddg``, ``dni``, ``blockprop``, ``gpipe``, ``backprop``): an ``Algorithm`` of pure functions
``init``, ``step`` and ``predict``.
"""

from fr_jax import distributed, models
from fr_jax._placement import placement
from fr_jax.algorithms import staleness
from fr_jax.algorithms._layers import layer_params
from fr_jax.algorithms.backprop import backprop
from fr_jax.algorithms.blockprop import blockprop
from fr_jax.algorithms.ddg import ddg
from fr_jax.algorithms.dni import dni
from fr_jax.algorithms.features_replay import features_replay
from fr_jax.algorithms.gpipe import gpipe
from fr_jax.partitioning.balance import balance, balance_stages
from fr_jax.partitioning.costs import layer_costs, layer_flops, layer_times
from fr_jax.partitioning.cut import cut
from fr_jax.stages import chain, from_linen, partition
from fr_jax.types import Algorithm, Batch, Info, Stage, State

__version__ = "0.1.0"

__all__ = [
    "Algorithm",
    "Batch",
    "Info",
    "Stage",
    "State",
    "backprop",
    "balance",
    "balance_stages",
    "blockprop",
    "chain",
    "cut",
    "ddg",
    "distributed",
    "dni",
    "features_replay",
    "from_linen",
    "gpipe",
    "layer_costs",
    "layer_flops",
    "layer_params",
    "layer_times",
    "models",
    "partition",
    "placement",
    "staleness",
]
