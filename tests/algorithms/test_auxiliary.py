"""Losses of the stages' own, in the objective: back-propagation by hand, and the naive loops."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fr_jax as fr

KEY = jax.random.key(0)
close = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture
def modules(naive):
    """K = 3: one loss inside a chain, one as the last layer of a stage, one in a stage that is not a chain."""
    return [
        (naive.dense(4), naive.activity(0.3), naive.dense(5)),
        (naive.dense(4), naive.dropout(0.2), naive.activity(0.7)),
        (naive.activity(0.2),),
        (naive.activity(0.1), naive.dense(2)),
    ]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("method", "M"),
    [
        (fr.features_replay, 3),
        (fr.ddg, 1),
        pytest.param(fr.features_replay, 1, marks=pytest.mark.slow),
        pytest.param(fr.ddg, 3, marks=pytest.mark.slow),
    ],
)
def test_each_replay_has_the_gradient_of_its_own_loss(naive, modules, make_batches, run, method, M):
    batches, stages = make_batches(5), [naive.stage(module) for module in modules]
    states, infos = run(method(stages, naive.squared_error, optax.sgd(0.1), microbatches=M), batches)
    parts = [jax.tree.map(lambda x, m=m: x[m::M], batch) for batch in batches for m in range(M)]
    if method is fr.ddg:
        loop = functools.partial(naive.ddg, M=M)
    else:
        loop = functools.partial(naive.features_replay, batch_stats="play", M=M)
    expected = loop(modules, [accumulated(naive.sgd(0.1), M) for _ in modules], states[0], parts)
    for t, (state, info) in enumerate(zip(states[1:], infos, strict=True), start=1):
        chex.assert_trees_all_close(state.params, tuple(w[t * M] for w in expected.w), **close)
        np.testing.assert_allclose(info.loss, np.mean(expected.loss[(t - 1) * M : t * M]), **close)
        assert jax.tree.structure(state._replace(step=0)) == jax.tree.structure(states[0])


def accumulated(update, M):
    seen = []

    def collect(w, g):
        seen.append(g)
        if len(seen) % M:
            return w
        return update(w, jax.tree.map(lambda *leaves: sum(leaves) / M, *seen[-M:]))

    return collect


def masked(outputs, targets):
    """(total, weight): rows with a positive first target count."""
    weight = (targets[:, 0] > 0).astype(outputs.dtype)
    return (weight * ((outputs - targets) ** 2).sum(-1)).sum(), weight.sum()


def by_hand(stages, loss_fn, state, batch, M):
    """Objective of one mini-batch, its parts, and gradient: micro-batches in a loop, all stages in one function."""

    def objective(params):
        parts = []
        for m in range(M):
            h, own, key = batch.inputs[m::M], 0.0, jax.random.fold_in(KEY, m)
            for p, s, stage in zip(params, state.model_state, stages, strict=True):
                h, new = stage.apply(p, s, h, key=key)
                own += new.loss
            loss = loss_fn(h, batch.targets[m::M])
            total, weight = loss if isinstance(loss, tuple) else (loss, 1.0)
            parts.append((total, weight, own))
        totals, weights, owns = (jnp.stack([jnp.asarray(x, float) for x in part]) for part in zip(*parts, strict=True))
        loss, auxiliary = totals.sum() / weights.sum(), (owns * weights).sum() / weights.sum()
        return loss + auxiliary, (loss, auxiliary)

    (_, reported), grads = jax.jit(jax.value_and_grad(objective, has_aux=True))(state.params)
    return grads, reported


METHODS = {  # and devices, and how many of them a stage has
    "bp": (fr.backprop, 1, 1),
    "bp, three devices": (fr.backprop, 3, 1),
    "gpipe, data parallel": (fr.gpipe, 6, 2),
    "fr": (fr.features_replay, 1, 1),
    "ddg": (fr.ddg, 1, 1),
    "2bw": (fr.pipedream_2bw, 1, 1),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("method", "loss", "M"),
    [
        ("bp", "masked", 1),
        ("bp, three devices", "mean", 1),
        ("gpipe, data parallel", "masked", 2),
        ("fr", "masked", 2),
        pytest.param("bp", "mean", 1, marks=pytest.mark.slow),
        pytest.param("bp", "masked", 2, marks=pytest.mark.slow),
        pytest.param("bp, three devices", "masked", 1, marks=pytest.mark.slow),
        pytest.param("gpipe, data parallel", "mean", 2, marks=pytest.mark.slow),
        pytest.param("ddg", "masked", 2, marks=pytest.mark.slow),
        pytest.param("2bw", "masked", 4, marks=pytest.mark.slow),
    ],
)
def test_gradient_of_the_sum_of_losses(naive, make_batches, method, loss, M):
    """At a learning rate of 0, where late gradients are those of back-propagation for an earlier mini-batch."""
    loss_fn = masked if loss == "masked" else naive.squared_error
    stages = [
        fr.chain(naive.dense(4).stage, naive.activity(0.3).stage),
        fr.chain(naive.activity(0.7).stage, naive.dense(3).stage),
        fr.chain(naive.dense(2).stage, naive.activity(0.2).stage),
    ]
    make, devices, data_parallel = METHODS[method]
    placement = fr.placement(3, jax.devices()[:devices], data_parallel)
    algorithm = make(stages, loss_fn, optax.sgd(0.0), microbatches=M, return_grads=True, placement=placement)
    batches = make_batches(4, examples=16)
    state = algorithm.init(KEY, batches[0])
    expected, seen = [], [[] for _ in stages]
    for batch in batches:
        there = jax.device_put(state._replace(step=(), streams=()), jax.devices()[0])
        grads, (value, auxiliary) = by_hand(stages, loss_fn, there, batch, M)
        expected.append(grads)
        state, info = algorithm.step(state, batch)
        np.testing.assert_allclose(info.loss, value, **close)
        np.testing.assert_allclose(info.metrics["auxiliary_loss"], auxiliary, **close)
        for of_stage, g in zip(seen, info.grads, strict=True):
            of_stage.extend([] if g is None else [g])
    for k, of_stage in enumerate(seen):
        assert len(of_stage) >= 2
        for one, grads in zip(of_stage, expected, strict=False):
            chex.assert_trees_all_close(one, grads[k], **close)


class Gated(nn.Module):
    """Two experts and a router, whose imbalance is sown; the experts' weights are penalised in a submodule."""

    @nn.compact
    def __call__(self, x, train=False):
        share = nn.softmax(nn.Dense(2, name="router")(x))
        self.sow("losses", "balance", 0.5 * jnp.sum(share.mean(0) ** 2))
        experts = jnp.stack([Penalised(4, name=f"expert{i}")(x) for i in range(2)], axis=-1)
        y = jnp.einsum("bfe,be->bf", experts, share)
        return nn.BatchNorm(use_running_average=not train)(y)


class Penalised(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(self.width)(x)
        self.sow("losses", "activity", 0.01 * (y**2).mean(0))
        return y


def test_what_a_flax_module_sows(compilations):
    modules, rng = [Gated(), Penalised(4)], np.random.default_rng(0)
    batches = [fr.Batch(*(rng.standard_normal((8, 4)).astype(np.float32) for _ in range(2))) for _ in range(4)]
    error = lambda y, z: jnp.mean((y - z) ** 2)
    stages = [fr.from_linen(module) for module in modules]
    algorithm = fr.features_replay(stages, error, optax.sgd(0.0))
    state = algorithm.init(KEY, batches[0])
    assert [set(stage) for stage in state.model_state] == [{"batch_stats"}, set()]

    def objective(params, batch):
        h, own = batch.inputs, []
        for module, p, s in zip(modules, params, fr.layer_params(state)[1], strict=True):
            h, moved = module.apply({"params": p, **s}, h, mutable=["losses", *s], **({"train": True} if s else {}))
            own += [leaf.sum() for leaf in jax.tree.leaves(moved.get("losses", ()))]
        assert len(own) == 4
        return error(h, batch.targets) + sum(own), (error(h, batch.targets), sum(own))

    objective = jax.jit(objective)
    for t, batch in enumerate(batches):
        _, (loss, own) = objective(fr.layer_params(state)[0], batch)
        compilations.clear()
        state, info = algorithm.step(state, batch)
        np.testing.assert_allclose((info.loss, info.metrics["auxiliary_loss"]), (loss, own), rtol=1e-5)
        assert t < 2 or not compilations
    assert algorithm.predict(state, batches[0].inputs).shape == (8, 4)


def dni(stages, loss_fn, optimizer):
    return fr.dni(stages, loss_fn, optimizer, fr.from_linen(nn.Dense(4)), optax.sgd(0.1))


@pytest.mark.parametrize("method", [dni, fr.blockprop, fr.direct_feedback_alignment])
def test_methods_that_do_not_send_the_gradient_down_refuse(naive, make_batches, method):
    stages = [naive.dense(4).stage, fr.chain(naive.dense(4).stage, naive.activity(0.1).stage)]
    algorithm = method(stages, naive.squared_error, optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"this layer has a loss of its own .* Use backprop") as raised:
        algorithm.init(KEY, make_batches(1)[0])
    assert "layer 2 (from 0) of the network, in stage 2" in raised.value.__notes__[0]


def test_a_loss_that_is_no_number_is_refused(naive, make_batches):
    stage = fr.Stage(lambda key, x: ((), ()), lambda p, s, x, *, key=None, train=True: (x, fr.WithLoss(s, x**2)))
    for stages in ([fr.chain(stage, naive.dense(2).stage)], [stage, naive.dense(2).stage]):
        algorithm = fr.backprop(stages, naive.squared_error, optax.sgd(0.1))
        with pytest.raises(ValueError, match=r"returns float32 of shape \(6, 3\) as its own loss; it must be one"):
            algorithm.init(KEY, make_batches(1)[0])
