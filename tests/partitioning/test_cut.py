import itertools

import jax
import jax.numpy as jnp
import pytest

import fr_jax as fr
from fr_jax.partitioning.costs import layer_flops, stage_cost
from fr_jax.partitioning.cut import WORK

LAYERS = [layer for width in (64, 8, 32, 16) for layer in fr.models.mlp(depth=1, width=width, num_classes=width)]
EXAMPLE = jax.ShapeDtypeStruct((4, 16), jnp.float32)


@pytest.fixture(scope="module")
def costs():
    return layer_flops(LAYERS, EXAMPLE)


@pytest.mark.parametrize("method", WORK)
@pytest.mark.parametrize("K", [1, 2, 3, 4])
def test_no_other_cut_has_a_faster_slowest_stage(costs, monkeypatch, method, K):
    monkeypatch.setattr("fr_jax.partitioning.cut.layer_flops", lambda layers, example_inputs: costs)

    def slowest(cuts):
        bounds = (0, *cuts, len(LAYERS))
        return max(stage_cost(costs, WORK[method](k, K), bounds[k], bounds[k + 1]) for k in range(K))

    stages = fr.cut(LAYERS, K, EXAMPLE, method=method)
    assert [layer for stage in stages for layer in stage.layers] == LAYERS
    lengths = [len(stage.layers) for stage in stages]
    found = slowest(tuple(itertools.accumulate(lengths))[:-1])
    assert found == min(map(slowest, itertools.combinations(range(1, len(LAYERS)), K - 1)))


def test_measured_times_cut_too():
    assert len(fr.cut(LAYERS, 2, EXAMPLE, measure="time")) == 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"K": 5}, "K = 5 stages were asked of 4 layers; K can be 1 to 4"),
        ({"method": "pipedream"}, "method = 'pipedream' is unknown; it can be 'fr', 'bp'"),
        ({"measure": "watts"}, "measure = 'watts' is unknown; it can be 'flops' or 'time'"),
    ],
)
def test_what_cannot_be_cut_is_refused(given, said):
    options = {"K": 2, **given}
    with pytest.raises(ValueError, match=said):
        fr.cut(LAYERS, options.pop("K"), EXAMPLE, **options)
