"""Oracles in NumPy: layers with hand-written gradients, hand-written optimizers, and the loop of the paper.

The loop keeps every past input, weight and gradient in lists indexed by the iteration, and uses nothing of
``fr_jax.algorithms``. Each layer comes with its twin, an ``fr_jax.Stage``, which the library trains.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fr_jax as fr


class Layer(NamedTuple):
    """``forward``: (params, state, x, key) -> (y, new_state, pull); ``pull``: dy -> (gradients, dx)."""

    stage: fr.Stage
    forward: Callable


@functools.cache  # equal layers compile their initialisation once a session
def dense(width: int) -> Layer:
    """Tanh(x W + b)."""

    def init(key, x):
        # Depends on the key, and compiles twenty times faster than jax.random.normal.
        phase = (jax.random.key_data(key) % 1000).astype(x.dtype).sum()
        weights = jnp.cos(phase + jnp.arange(x.shape[-1] * width, dtype=x.dtype)).reshape(x.shape[-1], width)
        return {"W": weights, "b": jnp.zeros(width, x.dtype)}, ()

    def apply(params, state, x, *, key=None, train=True):
        return jnp.tanh(x @ params["W"] + params["b"][None]), state

    def forward(params, state, x, key):
        y = np.tanh(x @ params["W"] + params["b"])

        def pull(dy):
            dz = dy * (1 - y**2)
            return {"W": x.T @ dz, "b": dz.sum(0)}, dz @ params["W"].T

        return y, state, pull

    return Layer(fr.Stage(init, apply), forward)


@functools.cache
def dropout(rate: float) -> Layer:
    """The mask is Bernoulli(1 - rate), drawn from the layer's key."""

    def apply(params, state, x, *, key=None, train=True):
        if not train:
            return x, state
        return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0), state

    def forward(params, state, x, key):
        mask = np.asarray(jax.random.bernoulli(key, 1 - rate, x.shape)) / (1 - rate)
        return x * mask, state, lambda dy: ((), dy * mask)

    return Layer(fr.Stage(lambda key, x: ((), ()), apply), forward)


@functools.cache
def batch_norm(momentum: float = 0.8, epsilon: float = 1e-3) -> Layer:
    """Scale and shift after normalisation over the batch; running statistics of a (biased) exponential kind."""

    def init(key, x):
        ones, zeros = jnp.ones(x.shape[-1], x.dtype), jnp.zeros(x.shape[-1], x.dtype)
        return {"scale": ones, "shift": zeros}, {"mean": zeros, "var": ones}

    def apply(params, state, x, *, key=None, train=True):
        now = {"mean": x.mean(0), "var": x.var(0)} if train else state
        y = (x - now["mean"][None]) / jnp.sqrt(now["var"] + epsilon)[None]
        new = jax.tree.map(lambda old, n: momentum * old + (1 - momentum) * n, state, now) if train else state
        return y * params["scale"][None] + params["shift"][None], new

    def forward(params, state, x, key):
        mean, var = x.mean(0), x.var(0)
        deviation = np.sqrt(var + epsilon)
        z = (x - mean) / deviation

        def pull(dy):
            dz = dy * params["scale"]
            dx = (dz - dz.mean(0) - z * (dz * z).mean(0)) / deviation
            return {"scale": (dy * z).sum(0), "shift": dy.sum(0)}, dx

        new = {
            "mean": momentum * state["mean"] + (1 - momentum) * mean,
            "var": momentum * state["var"] + (1 - momentum) * var,
        }
        return z * params["scale"] + params["shift"], new, pull

    return Layer(fr.Stage(init, apply), forward)


@functools.cache
def activity(strength: float) -> Layer:
    """The identity, with strength / B sum x^2 as a loss of its own; ``pull`` adds the gradient of that."""

    def apply(params, state, x, *, key=None, train=True):
        return x, fr.WithLoss(state, strength * (x**2).sum(-1).mean())

    def forward(params, state, x, key):
        return x, state, lambda dy: ((), dy + 2 * strength * x / len(x))

    return Layer(fr.Stage(lambda key, x: ((), ()), apply), forward)


Module = tuple[Layer, ...]


@functools.cache
def stage(module: Module) -> fr.Stage:
    """A module of one layer is that layer's own stage, a longer one a chain."""
    return module[0].stage if len(module) == 1 else fr.chain(*(layer.stage for layer in module))


def layer_keys(modules: Sequence[Module], start: Any) -> Callable:
    """``(k, s) -> keys``, one per layer of module k = 0, 1, .., for micro-batch s; layers count over all modules."""
    key = start.streams[0].key
    numbers = iter(range(sum(map(len, modules))))
    numbered = [[next(numbers) for _ in module] for module in modules]
    return lambda k, s: [jax.random.fold_in(jax.random.fold_in(key, s), i) for i in numbered[k]]


def forward(module: Module, params: Any, state: Any, x: np.ndarray, keys: Sequence[jax.Array | None]) -> tuple:
    """The forward pass of a module; each layer has a key of its own."""
    if len(module) == 1:
        return module[0].forward(params, state, x, keys[0])
    new_state, pulls = [], []
    for j, layer in enumerate(module):
        x, layer_state, pull = layer.forward(params[j], state[j], x, keys[j])
        new_state.append(layer_state)
        pulls.append(pull)

    def pull(dy):
        grads = []
        for pull in reversed(pulls):
            layer_grads, dy = pull(dy)
            grads.insert(0, layer_grads)
        return tuple(grads), dy

    return x, tuple(new_state), pull


def squared_error(outputs, targets):
    """Mean over the batch, sum over features; for NumPy and JAX."""
    return ((outputs - targets) ** 2).sum(-1).mean()


class Run(NamedTuple):
    """What a naive run saw: w[k][t], state[k][t], h[k][s] the module's input, delta[k][t], grads[k][t], loss[t]."""

    w: list[list[Any]]
    state: list[list[Any]]
    h: list[list[np.ndarray]]
    delta: list[dict[int, np.ndarray]]
    grads: list[list[Any]]
    loss: list[float]


def predicted(past: list, i: int, late: int, strength: float, M: int) -> Any:
    """The weights of micro-batch i, moved on by their last update times the number of updates in the next ``late``.

    A module that is late by that many micro-batches updates after j if (j + 1 - late) mod M = 0.
    """
    n = sum((j + 1 - late) % M == 0 for j in range(i, i + late))
    return jax.tree.map(lambda w, old: w + strength * n * (w - old), past[i], past[max(i - M, 0)])


def features_replay(
    modules: Sequence[Module],
    updates: Sequence[Callable],
    start: Any,
    batches,
    batch_stats,
    back=lambda k, w: w,
    weight_prediction=0.0,
    M=1,
) -> Run:
    """Algorithm 1; modules count from 1, ``start`` is the library's state before the first step.

    Module k replays with ``back(k, w_k^t)``. It plays with predicted weights; ``M`` micro-batches make one update.
    """
    K = len(modules)
    first = jax.tree.map(np.asarray, (start.params, start.model_state))
    keys = layer_keys(modules, start)
    run = Run([[w] for w in first[0]], [[s] for s in first[1]], *([[] for _ in modules] for _ in range(2)), [], [])
    run = run._replace(delta=[{} for _ in modules], grads=[[] for _ in modules])
    for t, batch in enumerate(batches):
        state = [states[-1] for states in run.state]
        x = np.asarray(batch.inputs)
        for k in range(1, K + 1):
            run.h[k - 1].append(x)
            w = predicted(run.w[k - 1], t, K - k, weight_prediction, M)
            x, new_state, _ = forward(modules[k - 1], w, state[k - 1], x, keys(k - 1, t))
            if k == K or batch_stats in ("play", "both"):
                state[k - 1] = new_state
        targets = np.asarray(batch.targets)
        run.loss.append(squared_error(x, targets))
        for k in range(K, 0, -1):
            s, w = t + k - K, run.w[k - 1][t]
            if s < 0:
                run.w[k - 1].append(w)
                run.grads[k - 1].append(None)
                continue
            h, key = run.h[k - 1][s], keys(k - 1, s)
            y, new_state, pull = forward(modules[k - 1], back(k, w), state[k - 1], h, key)
            if k < K and batch_stats in ("replay", "both"):
                state[k - 1] = new_state
            delta = 2 * (y - targets) / len(y) if k == K else run.delta[k - 1][t]
            grads, dx = pull(delta)
            if k > 1:
                run.delta[k - 2][t + 1] = dx
            run.grads[k - 1].append(grads)
            run.w[k - 1].append(updates[k - 1](w, grads))
        for states, new in zip(run.state, state, strict=True):
            states.append(new)
    return run


def ddg(modules: Sequence[Module], updates: Sequence[Callable], start: Any, batches, weight_prediction=0.0, M=1) -> Run:
    """DDG, with every past input, weight and statistic kept: the gradient at w^s of mini-batch s = t+k-K, at t.

    With weight prediction the forward pass, and its gradient, are those at predicted weights; ``M`` micro-batches make
    one update.
    """
    K = len(modules)
    ahead = lambda k, s: predicted(run.w[k - 1], s, K - k, weight_prediction, M)
    first = jax.tree.map(np.asarray, (start.params, start.model_state))
    keys = layer_keys(modules, start)
    run = Run([[w] for w in first[0]], [[s] for s in first[1]], *([[] for _ in modules] for _ in range(2)), [], [])
    run = run._replace(delta=[{} for _ in modules], grads=[[] for _ in modules])
    for t, batch in enumerate(batches):
        x = np.asarray(batch.inputs)
        for k in range(1, K + 1):
            run.h[k - 1].append(x)
            x, new_state, _ = forward(modules[k - 1], ahead(k, t), run.state[k - 1][t], x, keys(k - 1, t))
            run.state[k - 1].append(new_state)
        targets = np.asarray(batch.targets)
        run.loss.append(squared_error(x, targets))
        for k in range(K, 0, -1):
            s = t + k - K
            if s < 0:
                run.w[k - 1].append(run.w[k - 1][t])
                run.grads[k - 1].append(None)
                continue
            h, key = run.h[k - 1][s], keys(k - 1, s)
            y, _, pull = forward(modules[k - 1], ahead(k, s), run.state[k - 1][s], h, key)
            grads, dx = pull(2 * (y - targets) / len(y) if k == K else run.delta[k - 1][t])
            if k > 1:
                run.delta[k - 2][t + 1] = dx
            run.grads[k - 1].append(grads)
            run.w[k - 1].append(updates[k - 1](run.w[k - 1][t], grads))
    return run


def sgd(rate: float) -> Callable:
    """(w, g) -> w."""
    return lambda w, g: jax.tree.map(lambda w, g: w - rate * g, w, g)


def nesterov(rate: float, momentum: float, weight_decay: float) -> Callable:
    """Nesterov's momentum as PyTorch and optax have it, on the gradient with weight decay."""
    velocity: Any = None

    def update(w, g):
        nonlocal velocity
        g = jax.tree.map(lambda g, w: g + weight_decay * w, g, w)
        velocity = g if velocity is None else jax.tree.map(lambda v, g: momentum * v + g, velocity, g)
        return jax.tree.map(lambda w, g, v: w - rate * (g + momentum * v), w, g, velocity)

    return update


def adam(rate: float, b1: float = 0.9, b2: float = 0.999, epsilon: float = 1e-8) -> Callable:
    """Kingma and Ba 2015, Algorithm 1."""
    n, m, v = 0, 0.0, 0.0

    def update(w, g):
        nonlocal n, m, v
        n += 1
        zeros = jax.tree.map(np.zeros_like, g)
        m = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, m if n > 1 else zeros, g)
        v = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g**2, v if n > 1 else zeros, g)
        m_hat = jax.tree.map(lambda m: m / (1 - b1**n), m)
        v_hat = jax.tree.map(lambda v: v / (1 - b2**n), v)
        return jax.tree.map(lambda w, m, v: w - rate * m / (np.sqrt(v) + epsilon), w, m_hat, v_hat)

    return update


def decaying(rate: float) -> Callable:
    """SGD whose step size falls with the module's own count of updates."""
    n = 0

    def update(w, g):
        nonlocal n
        n += 1
        return sgd(rate / n)(w, g)

    return update


# name -> (optax's, a fresh one of ours)
OPTIMIZERS: dict[str, tuple[Callable, Callable]] = {
    "sgd": (lambda: optax.sgd(0.1), lambda: sgd(0.1)),
    "nesterov": (
        lambda: optax.chain(optax.add_decayed_weights(0.01), optax.sgd(0.1, momentum=0.9, nesterov=True)),
        lambda: nesterov(0.1, 0.9, 0.01),
    ),
    "adam": (lambda: optax.adam(0.01), lambda: adam(0.01)),
    "decaying": (lambda: optax.sgd(lambda n: 0.1 / (n + 1)), lambda: decaying(0.1)),
}
