"""The reference: training as the lecture and the papers write it down, in NumPy, slow and literal.

Nothing here uses JAX or the rest of the library. The tests compare the library with it, and a notebook explains it.

- ``network``: the lecture's ReLU network, its forward pass and its loss.
- ``chain_rule``: the derivative by every weight, each computed on its own, in O((E+V)²).
- ``backpropagation``: the same derivatives in matrix form, in O(E+V).
- ``counting``: the counter of multiplications that both use.
- ``sgd``: mini-batch stochastic gradient descent.
- ``decoupled``: back-propagation, features replay and DDG over K stages, as loops that store everything.
- ``stages``: ReLU stages, a loss and an update for these loops.
"""

from fr_jax.reference import backpropagation, chain_rule, counting, decoupled, network, sgd, stages

__all__ = ["backpropagation", "chain_rule", "counting", "decoupled", "network", "sgd", "stages"]
