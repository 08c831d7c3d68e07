import numpy as np
import pytest

from fr_jax.reference import network


@pytest.fixture
def make_problem():
    """``(widths, examples=5, seed=0) -> (params, x, y)``, random, with b and targets that are not zero."""

    def make(widths, examples=5, seed=0):
        rng = np.random.default_rng(seed)
        params = network.init(rng, widths)._replace(b=0.3)
        return params, rng.standard_normal((examples, widths[0])), rng.standard_normal(examples)

    return make
