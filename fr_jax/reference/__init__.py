"""The reference: training as the lecture and the papers write it down, in NumPy, slow and literal.

Nothing here uses JAX or the rest of the library. The tests compare the library with it, and a notebook explains it.
"""

from fr_jax.reference import backpropagation, chain_rule, counting, decoupled, network, sgd, stages

__all__ = ["backpropagation", "chain_rule", "counting", "decoupled", "network", "sgd", "stages"]
