"""The loop with barriers: its numbers are those of features replay, and it does wait."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fr_jax as fr
from fr_jax.algorithms._validation import check_setup
from fr_jax.diagnostics.profiling import lockstep


class Noisy(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(5)(x))
        return nn.Dropout(0.3, deterministic=not train)(x)


def squared_error(y, z):
    return jnp.mean((y - z) ** 2)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("K", [1, 3])
def test_numbers_are_those_of_features_replay(K):
    stages = [*(fr.from_linen(Noisy()) for _ in range(K - 1)), fr.from_linen(nn.Dense(2))]
    rng = np.random.default_rng(3)
    batches = [fr.Batch(rng.normal(size=(6, 4)), rng.normal(size=(6, 2))) for _ in range(K + 2)]
    setting = stages, squared_error, optax.sgd(0.1, momentum=0.9)
    waiting, free = (make(*setting, placement=fr.placement(K)) for make in (lockstep.lockstep, fr.features_replay))
    state, expected = (method.init(jax.random.key(1), batches[0]) for method in (waiting, free))
    for batch in batches:
        state, info = waiting.step(state, batch)
        expected, info_expected = free.step(expected, batch)
        np.testing.assert_allclose(info.loss, info_expected.loss, rtol=1e-12)
        unkeyed = [one._replace(streams=[stream.count for stream in one.streams]) for one in (state, expected)]
        chex.assert_trees_all_close(*unkeyed, rtol=1e-11, atol=1e-13)
    assert state.step == len(batches)


def test_every_phase_is_waited_for(monkeypatch):
    """All K plays are done before anything goes backward, and all of it before the step returns."""
    stages = fr.partition(fr.models.mlp(depth=2, width=8), (1,))
    setup = check_setup(stages, lambda y, z: jnp.mean(y), optax.sgd(0.1), fr.placement(2), donate=True)
    batch, log = fr.Batch(np.ones((4, 20), np.float32), np.zeros(4, np.int32)), []

    def logged(run, name):
        return lambda *arguments: log.append(name) or run(*arguments)

    parts = lockstep.make_parts(setup)
    parts = lockstep.LockstepParts(
        plays=(logged(parts.plays[0], "play"),),
        replays=(logged(parts.replays[0], "replay"),),
        forward=logged(parts.forward, "forward"),
        backward=logged(parts.backward, "backward"),
        shared=parts.shared._replace(updates=tuple(logged(update, "update") for update in parts.shared.updates)),
    )
    monkeypatch.setattr(lockstep, "barrier", logged(lockstep.barrier, "barrier"))
    state = lockstep.init(setup, parts, jax.random.key(0), batch, None, None)
    for _ in range(2):
        log.clear()
        state, _ = lockstep.step(setup, parts, state, batch)
    assert log == ["play", "forward", "barrier", "backward", "update", "replay", "barrier"]
