"""Run by test_processes.py with the names of methods, in its own process and as two processes."""

import functools
import json
import sys

import jax
import numpy as np
import optax

import fr_jax as fr
from fr_jax import distributed
from fr_jax._arrays import place


def loss_fn(outputs, targets):
    losses = optax.softmax_cross_entropy_with_integer_labels(outputs, targets)
    weights = 1.0 + targets % 2
    return (weights * losses).sum(), weights.sum()


def make_batches(placement):
    rng = np.random.default_rng(0)
    for _ in range(8):
        inputs = rng.standard_normal((16, 20)).astype(np.float32)
        targets = rng.integers(0, 10, 16).astype(np.int32)
        index = rng.permutation(24)[:16].astype(np.int32)
        yield fr.Batch(place(inputs, placement[0]), place(targets, placement[-1]), place(index, placement[0]))


def penalised(method):
    """The method for stages with losses of their own."""

    def apply(params, state, h, /, *, key=None, train=True):
        return h, fr.WithLoss(state, 0.01 * (h**2).mean())

    activity = fr.Stage(lambda key, h: ((), ()), apply)
    return lambda stages, *args, **options: method([fr.chain(*s.layers, activity) for s in stages], *args, **options)


METHODS = {
    "fr": fr.features_replay,
    "bp": fr.backprop,
    "ddg": fr.ddg,
    "dfa": fr.direct_feedback_alignment,
    "proxprop": fr.proximal_backprop,
    "mac": functools.partial(fr.auxiliary_coordinates, cache_size=24, z_steps=2, penalty_patience=2),
    "dni": lambda *args, **options: fr.dni(*args, fr.models.synthesizer(), optax.adam(0.01), **options),
    "blockprop": functools.partial(fr.blockprop, cache_size=24, h_every=2, h_learning_rate=0.1),
    "gpipe": functools.partial(fr.gpipe, microbatches=2),
    "1f1b": functools.partial(fr.gpipe, microbatches=2, schedule="1f1b"),
    "fr-M": functools.partial(fr.features_replay, microbatches=2, weight_prediction=1.0),
    "fr-corrected": functools.partial(fr.features_replay, microbatches=2, discrepancy_decay=0.5),
    "fr-stashed": functools.partial(fr.features_replay, microbatches=2, replay_weights="stashed"),
    "ddg-M": functools.partial(fr.ddg, microbatches=2),
    "bp-M": functools.partial(fr.backprop, microbatches=2),
    "2bw": functools.partial(fr.pipedream_2bw, microbatches=4),
    "bp-clipped": functools.partial(fr.backprop, global_clip=0.1, skip_nonfinite=True),
    "fr-clipped": functools.partial(fr.features_replay, global_clip=0.1, skip_nonfinite=True),
    "fr-penalised": penalised(functools.partial(fr.features_replay, microbatches=2)),
}


def run(method):
    """What this process can see of the end of a run, bit by bit."""
    placement = fr.placement(4)
    stages = fr.partition(fr.models.mlp(depth=4, width=16, dropout_rate=0.2), (1, 2, 3))
    algorithm = method(stages, loss_fn, optax.sgd(0.1, momentum=0.9), placement=placement, donate=True)
    batches = list(make_batches(placement))
    state = algorithm.init(jax.random.key(0), batches[0])
    for batch in batches:
        state, info = algorithm.step(state, batch)
    seen = {"loss": info.loss} | {f"params {k}": params for k, params in enumerate(state.params)}
    return {
        name: [np.asarray(leaf).tobytes().hex() for leaf in jax.tree.leaves(part)]
        for name, part in seen.items()
        if jax.tree.leaves(part)[0].is_fully_addressable
    }


if __name__ == "__main__":
    distributed.initialize()
    print(json.dumps({name: run(METHODS[name]) for name in sys.argv[1:]}))
