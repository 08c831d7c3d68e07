import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fr_jax as fr
from fr_jax.experiments._bench.pytorch_networks import copy_weights, gpt, network

torch = pytest.importorskip("torch")


def check_same(layers, module, x, torch_x, **tolerance):
    """The same number of weights and, with copied weights, the same outputs in training."""
    h, params = jnp.asarray(x), []
    for i, layer in enumerate(layers):
        layer_params, state = layer.init(jax.random.key(i), h)
        h, _ = layer.apply(layer_params, state, h, train=True)
        params.append(layer_params)
    copy_weights(params, module)
    assert sum(p.numel() for p in module.parameters()) == sum(p.size for p in jax.tree.leaves(params))
    with torch.no_grad():
        outputs = module.train()(torch_x)
    np.testing.assert_allclose(outputs.numpy(), h, **tolerance)


@pytest.mark.parametrize("name", ["resnet8", "resnet18"])
def test_residual_networks(name):
    x = np.random.default_rng(0).standard_normal((4, 32, 32, 3)).astype(np.float32)
    torch_x = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    check_same(fr.models.MODELS[name](), network(name), x, torch_x, rtol=2e-3, atol=2e-4)


def test_gpt():
    x = np.random.default_rng(0).integers(0, 256, (2, 24)).astype(np.int32)
    layers = fr.models.gpt(depth=2, width=32, heads=4, context=24)
    check_same(layers, gpt(depth=2, width=32, heads=4), x, torch.from_numpy(x).long(), rtol=0, atol=1e-4)
