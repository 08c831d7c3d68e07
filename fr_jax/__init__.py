"""fr_jax: training neural networks without backward locking, in JAX.

A network is cut into K stages, each placed on its own device, and trained by a method: an ``Algorithm`` of pure
functions ``init``, ``step`` and ``predict``.

- Stages: ``Stage``, ``WithLoss``, ``from_linen``, ``from_nnx``, ``from_equinox``, ``chain``, ``partition``.
- Where to cut: ``cut``; or step by step ``layer_costs``, ``layer_flops``, ``layer_times``, ``balance`` and
  ``balance_stages``.
- Where to run: ``placement``; ``distributed`` for several processes.
- Methods: ``features_replay``, ``ddg``, ``pipedream_2bw``, ``dni``, ``blockprop``, ``gpipe``, ``backprop``,
  ``direct_feedback_alignment``, ``proximal_backprop``, ``auxiliary_coordinates``, and, for dense networks,
  ``equilibrium_propagation`` and ``admm``; ``staleness`` has remedies for late gradients.
- ``layer_params``: the weights of a state, layer by layer; ``models``: networks as lists of layers.

To import by name: ``fr_jax.data``, ``fr_jax.training`` (loop, tasks, checkpoints), ``fr_jax.plotting``,
``fr_jax.diagnostics`` (timelines, times, memory, sufficient direction) and ``fr_jax.reference`` (NumPy).
"""

from fr_jax import _interrupts, distributed, models  # noqa: F401  # the first before all that takes time
from fr_jax._placement import placement
from fr_jax.algorithms import staleness
from fr_jax.algorithms._layers import layer_params
from fr_jax.algorithms._per_layer import per_layer
from fr_jax.algorithms.admm import admm
from fr_jax.algorithms.auxiliary_coordinates import auxiliary_coordinates
from fr_jax.algorithms.backprop import backprop
from fr_jax.algorithms.blockprop import blockprop
from fr_jax.algorithms.ddg import ddg
from fr_jax.algorithms.direct_feedback_alignment import direct_feedback_alignment
from fr_jax.algorithms.dni import dni
from fr_jax.algorithms.equilibrium_propagation import equilibrium_propagation
from fr_jax.algorithms.features_replay import features_replay
from fr_jax.algorithms.gpipe import gpipe
from fr_jax.algorithms.pipedream_2bw import pipedream_2bw
from fr_jax.algorithms.proximal_backprop import proximal_backprop
from fr_jax.partitioning.balance import balance, balance_stages
from fr_jax.partitioning.costs import layer_costs, layer_flops, layer_times
from fr_jax.partitioning.cut import cut
from fr_jax.stages import chain, from_equinox, from_linen, from_nnx, partition
from fr_jax.types import Algorithm, Batch, Info, Stage, State, WithLoss

__version__ = "0.2.0"

__all__ = [
    "Algorithm",
    "Batch",
    "Info",
    "Stage",
    "State",
    "WithLoss",
    "admm",
    "auxiliary_coordinates",
    "backprop",
    "balance",
    "balance_stages",
    "blockprop",
    "chain",
    "cut",
    "ddg",
    "direct_feedback_alignment",
    "distributed",
    "dni",
    "equilibrium_propagation",
    "features_replay",
    "from_equinox",
    "from_linen",
    "from_nnx",
    "gpipe",
    "layer_costs",
    "layer_flops",
    "layer_params",
    "layer_times",
    "models",
    "partition",
    "per_layer",
    "pipedream_2bw",
    "placement",
    "proximal_backprop",
    "staleness",
]
