"""One update per mini-batch of M micro-batches: every method against naive loops that are fed them one by one."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fr_jax as fr
from fr_jax.algorithms import _delayed as delayed

STEPS = 5
B = 12
close = {"rtol": 1e-10, "atol": 1e-12}


def accumulating(update, M):
    """``(w, g) -> w``: an update by the mean of every M gradients."""
    seen = []

    def collect(w, g):
        seen.append(g)
        if len(seen) < M:
            return w
        mean = jax.tree.map(lambda *leaves: sum(leaves) / M, *seen)
        seen.clear()
        return update(w, mean)

    return collect


def split(batches, M):
    return [jax.tree.map(lambda x, m=m: x[m::M], batch) for batch in batches for m in range(M)]


def modules_of(naive, K, plain=True):
    if plain:
        return [(naive.dense(3 + k % 3),) for k in range(K - 1)] + [(naive.dense(2),)]
    inner = (naive.dense(4), naive.dropout(0.3), naive.batch_norm())
    return [inner] * (K - 1) + [(naive.batch_norm(), naive.dropout(0.2), naive.dense(2))]


def assert_same(states, infos, naive_run, M):
    """Weights, statistics, mean gradients and losses after every whole mini-batch."""
    for t, (state, info) in enumerate(zip(states[1:], infos, strict=True), start=1):
        chex.assert_trees_all_close(state.params, tuple(w[t * M] for w in naive_run.w), **close)
        chex.assert_trees_all_close(state.model_state, tuple(s[t * M] for s in naive_run.state), **close)
        np.testing.assert_allclose(info.loss, np.mean(naive_run.loss[(t - 1) * M : t * M]), **close)
        assert jax.tree.structure(state._replace(step=0)) == jax.tree.structure(states[0])
    for k, grads in enumerate(naive_run.grads):
        first = next(i for i, g in enumerate(grads) if g is not None)
        for n, start in enumerate(range(first, len(grads) - M + 1, M)):
            mean = jax.tree.map(lambda *leaves: sum(leaves) / M, *grads[start : start + M])
            reported = [info.grads[k] for info in infos if info.grads[k] is not None]
            chex.assert_trees_all_close(reported[n], mean, **close)


LOOPS = {
    "fr": (fr.features_replay, lambda naive, *args: naive.features_replay(*args, "play")),
    "fr-both": (
        functools.partial(fr.features_replay, batch_stats="both"),
        lambda naive, *args: naive.features_replay(*args, "both"),
    ),
    "fr-stashed": (
        functools.partial(fr.features_replay, replay_weights="stashed"),
        lambda naive, *args: naive.ddg(*args),
    ),
    "ddg": (fr.ddg, lambda naive, *args: naive.ddg(*args)),
}


def follow(naive, make_batches, run, method, K, M, optimizer, *, plain=True, **options):
    make, loop = LOOPS[method]
    ours, theirs = naive.OPTIMIZERS[optimizer]
    modules = modules_of(naive, K, plain)
    algorithm = make(
        [naive.stage(module) for module in modules],
        naive.squared_error,
        ours(),
        microbatches=M,
        return_grads=True,
        **options,
    )
    batches = make_batches(STEPS, B)
    states, infos = run(algorithm, batches)
    updates = [accumulating(theirs(), M) for _ in modules]
    assert_same(states, infos, loop(naive, modules, updates, states[0], split(batches, M)), M)


QUICK = [
    ("fr", 5, 3, "adam"),
    ("fr", 4, 2, "nesterov"),
    ("fr", 2, 4, "sgd"),
    ("fr", 1, 3, "adam"),
    ("ddg", 5, 2, "adam"),
    ("ddg", 3, 4, "nesterov"),
    ("fr-stashed", 5, 2, "nesterov"),
    ("fr-stashed", 4, 3, "adam"),
    ("fr-stashed", 3, 1, "sgd"),
]
ALL = [
    (method, K, M, optimizer)
    for method in ("fr", "fr-stashed", "ddg")
    for K in range(1, 6)
    for M in range(1, 5)
    for optimizer in ("sgd", "nesterov", "adam")
    if (method, K, M, optimizer) not in QUICK
]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("method", "K", "M", "optimizer"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL)],
)
def test_trajectory_is_that_of_an_accumulating_optimizer(naive, make_batches, run, method, K, M, optimizer):
    follow(naive, make_batches, run, method, K, M, optimizer)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("method", LOOPS)
def test_masks_and_statistics_are_those_of_the_micro_batches(naive, make_batches, run, method):
    devices = jax.devices()[:3] if method != "fr-both" else jax.devices()[:1]
    follow(naive, make_batches, run, method, 3, 2, "nesterov", plain=False, placement=fr.placement(3, devices))


def two_buffered(naive, modules, updates, start, batches, M):
    """Yields w^{t+1} and the loss of mini-batch t: the gradient at w^{t-1} moves w^t."""
    w = jax.tree.map(np.asarray, list(start.params))
    previous = w if len(modules) > 1 else None
    keys, w_state = naive.layer_keys(modules, start), list(start.model_state)
    for t, batch in enumerate(batches):
        at, parts = w if previous is None else previous, []
        for m in range(M):
            h, targets, pulls, grads = np.asarray(batch.inputs)[m::M], np.asarray(batch.targets)[m::M], [], []
            for k, module in enumerate(modules):
                h, _, pull = naive.forward(module, at[k], w_state[k], h, keys(k, t * M + m))
                pulls.append(pull)
            delta = 2 * (h - targets) / len(h)
            for pull in reversed(pulls):
                g, delta = pull(delta)
                grads.insert(0, g)
            parts.append((tuple(grads), naive.squared_error(h, targets)))
        grads, loss = jax.tree.map(lambda *leaves: sum(leaves) / M, *parts)
        previous = w if previous is not None else None
        w = [update(*pair) for update, pair in zip(updates, zip(w, grads, strict=True), strict=True)]
        yield w, loss


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("K", "M", "optimizer"),
    [
        (3, 4, "adam"),
        (4, 4, "nesterov"),
        (1, 1, "adam"),
        *(
            pytest.param(K, M, name, marks=pytest.mark.slow)
            for K in range(1, 6)
            for M in (K, K + 1, 6)
            if M < 5 or M == 6
            for name in ("sgd", "nesterov", "adam")
            if (K, M, name) not in ((3, 4, "adam"), (4, 4, "nesterov"), (1, 1, "adam"))
        ),
    ],
)
def test_2bw_is_one_mini_batch_late_everywhere(naive, make_batches, run, K, M, optimizer):
    modules = [*modules_of(naive, K)[:-1], (naive.dropout(0.3), naive.dense(2))]
    ours, theirs = naive.OPTIMIZERS[optimizer]
    stages = [naive.stage(module) for module in modules]
    placement = fr.placement(K, jax.devices()[: min(K, 2)])
    algorithm = fr.pipedream_2bw(stages, naive.squared_error, ours(), microbatches=M, placement=placement)
    batches = make_batches(STEPS, B)
    states, infos = run(algorithm, batches)
    w = [list(states[0].params)]
    for (now, loss), info in zip(
        two_buffered(naive, modules, [theirs() for _ in modules], states[0], batches, M), infos, strict=True
    ):
        w.append(now)
        np.testing.assert_allclose(info.loss, loss, **close)
    for t, state in enumerate(states[1:], start=1):
        # Stages below the last make the update of this mini-batch in the next step.
        expected = (*w[t - 1][:-1], w[t][-1])
        chex.assert_trees_all_close(state.params, tuple(expected), **close)
        assert jax.tree.structure(state._replace(step=0)) == jax.tree.structure(states[0])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("devices", [1, 3])
@pytest.mark.parametrize("other", ["1f1b", "bp"])
def test_the_synchronous_methods_have_the_same_numbers(naive, make_batches, run, other, devices):
    stages = [naive.stage(module) for module in modules_of(naive, 3, plain=False)]
    shared = {"microbatches": 4, "placement": fr.placement(3, jax.devices()[:devices]), "return_grads": True}
    make = fr.backprop if other == "bp" else functools.partial(fr.gpipe, schedule="1f1b")
    batches = make_batches(3, B)
    expected = run(fr.gpipe(stages, naive.squared_error, optax.adam(0.01), **shared), batches)
    found = run(make(stages, naive.squared_error, optax.adam(0.01), **shared), batches)
    strip = lambda states: [tuple(state._replace(streams=())) for state in states]
    if other == "1f1b":
        chex.assert_trees_all_equal(strip(found[0]), strip(expected[0]))
    chex.assert_trees_all_close(strip(found[0]), strip(expected[0]), **close)
    chex.assert_trees_all_close(found[1], expected[1], **close)


# A loss of which a part of the examples counts: (sum of errors, their number).


def masked(outputs, targets):
    weight = targets["mask"]
    return (weight * ((outputs - targets["y"]) ** 2).sum(-1)).sum(), weight.sum()


def mean_of_masked(outputs, targets):
    total, weight = masked(outputs, targets)
    return total / weight


MASKED = {
    "bp": fr.backprop,
    "gpipe": fr.gpipe,
    "1f1b": functools.partial(fr.gpipe, schedule="1f1b"),
    "fr": fr.features_replay,
    "fr-stashed": functools.partial(fr.features_replay, replay_weights="stashed"),
    "ddg": fr.ddg,
    "2bw": fr.pipedream_2bw,
}


def masked_batches(make_batches, steps):
    rng = np.random.default_rng(0)
    masks = [jnp.asarray(rng.uniform(0, 1, B) * (np.arange(B) % 4 != 1)) for _ in range(steps)]  # micro-batch 1 of 4: 0
    batches = make_batches(steps, B)
    return [
        fr.Batch(batch.inputs, {"y": batch.targets, "mask": mask}) for batch, mask in zip(batches, masks, strict=True)
    ]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("method", MASKED)
def test_a_loss_of_total_and_weight_is_exact_under_micro_batches(naive, make_batches, run, method):
    """The gradient of a delayed method at a step size of 0 is back-propagation's of the whole mini-batch."""
    K, M = 3, 4
    stages = [naive.stage(module) for module in modules_of(naive, K)]
    spy = lambda outputs, targets: {"error": masked(outputs, targets), "mean": outputs.mean()}
    batches = masked_batches(make_batches, 3)
    algorithm = MASKED[method](stages, masked, optax.sgd(0.0), microbatches=M, return_grads=True, metrics_fn=spy)
    plain = fr.backprop(stages, mean_of_masked, optax.sgd(0.0), return_grads=True, metrics_fn=spy)
    _, infos = run(algorithm, batches)
    _, expected = run(plain, batches)
    for t, (info, whole) in enumerate(zip(infos, expected, strict=True)):
        np.testing.assert_allclose(info.loss, whole.loss, **close)
        np.testing.assert_allclose(info.metrics["error"], whole.loss, **close)
        np.testing.assert_allclose(info.metrics["mean"], whole.metrics["mean"], **close)
        for k in range(K):
            late = 0 if k == K - 1 or method in ("bp", "gpipe", "1f1b") else 1
            if t < late:
                assert info.grads[k] is None
            else:
                chex.assert_trees_all_close(info.grads[k], expected[t - late].grads[k], **close)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("method", ["fr", "ddg", "dni", "blockprop"])
def test_without_micro_batches_the_loss_is_the_quotient(naive, make_batches, run, method):
    own = {"dni": (fr.models.synthesizer(hidden=4), optax.sgd(0.1))}.get(method, ())
    make = {"fr": fr.features_replay, "ddg": fr.ddg, "dni": fr.dni, "blockprop": fr.blockprop}[method]
    stages, batches = [naive.dense(4).stage, naive.dense(2).stage], masked_batches(make_batches, 3)
    pair, scalar = (make(stages, loss, optax.adam(0.1), *own) for loss in (masked, mean_of_masked))
    (a, a_infos), (b, b_infos) = run(pair, batches), run(scalar, batches)
    chex.assert_trees_all_close(a[-1].params, b[-1].params, **close)
    np.testing.assert_allclose([info.loss for info in a_infos], [info.loss for info in b_infos], **close)


@pytest.mark.parametrize("M", [1, 2])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_totals_of_low_precision_have_exact_weights(naive, dtype, M):
    """Such a type cannot hold the number of tokens: float16 ends at 65,504."""
    terms = lambda y, t: (((y - t) ** 2).mean().astype(dtype), jnp.int32(65_537))
    algorithm = fr.backprop(
        [naive.dense(2).stage], terms, optax.sgd(0.1), microbatches=M, metrics_fn=lambda y, t: {"same": terms(y, t)}
    )
    batch = fr.Batch(jnp.zeros((4, 3)), jnp.full((4, 2), 128.0))
    _, info = algorithm.step(algorithm.init(jax.random.key(0), batch), batch)
    np.testing.assert_allclose([info.loss, info.metrics["same"]], 16_384.0 / 65_537, rtol=1e-3)
    assert info.loss.dtype == jnp.float32


def test_a_weight_may_be_a_python_number(naive, make_batches, run):
    """``losses.sum(), losses.size`` is how it is written."""
    stages, batches = [naive.dense(4).stage, naive.dense(2).stage], make_batches(3, B)
    total = lambda y, t: (((y - t) ** 2).sum(), y.shape[0])
    pair, scalar = (
        run(fr.ddg(stages, loss, optax.sgd(0.1), microbatches=2), batches) for loss in (total, naive.squared_error)
    )
    chex.assert_trees_all_close(pair[0][-1].params, scalar[0][-1].params, rtol=1e-5)
    np.testing.assert_allclose([i.loss for i in pair[1]], [i.loss for i in scalar[1]], rtol=1e-5)


def test_a_mini_batch_of_padding_changes_nothing(naive, make_batches, run):
    (batch,) = masked_batches(make_batches, 1)
    padding = batch._replace(targets=batch.targets | {"mask": jnp.zeros(B)})
    stages = [naive.dense(4).stage, naive.dense(2).stage]
    states, infos = run(fr.features_replay(stages, masked, optax.sgd(0.1), microbatches=2), [padding] * 3)
    chex.assert_trees_all_equal(states[0].params, states[-1].params)
    assert [float(info.loss) for info in infos] == [0.0] * 3


@pytest.mark.parametrize(
    "loss", [lambda y, t: (y.mean(), y.mean(), y.mean()), lambda y, t: (y.mean(), [3]), lambda y, t: (y, y.mean())]
)
def test_another_loss_is_refused(naive, make_batches, loss):
    algorithm = fr.features_replay([naive.dense(2).stage], loss, optax.sgd(0.1))
    (batch,) = make_batches(1)
    with pytest.raises(ValueError, match=r"loss_fn returned a tuple of .* or a pair \(total, weight\)"):
        algorithm.step(algorithm.init(jax.random.key(0), batch), batch)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("M", [1, 2, 3, 8])
def test_prediction_looks_ahead_by_the_updates_still_to_come(M):
    """Counted: how often stage k updates between the play of a micro-batch and its replay."""
    for d in range(6):
        updates = [(i + 1 - d) % M == 0 and i + 1 > d for i in range(12 * M + 12)]  # after sub-iteration i
        for i in range(4 * M + d, 6 * M + d):
            assert delayed.horizon(i, d, M) == sum(updates[i : i + d])


PREDICTED = [("fr", 4, 3, "adam"), ("ddg", 5, 2, "nesterov"), ("fr-stashed", 3, 4, "adam")]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("method", "K", "M", "optimizer"),
    [
        *PREDICTED,
        *(
            pytest.param(method, K, M, optimizer, marks=pytest.mark.slow)
            for method in ("fr", "ddg", "fr-stashed")
            for K in range(2, 6)
            for M in range(1, 5)
            for optimizer in ("sgd", "nesterov", "adam")
            if (method, K, M, optimizer) not in PREDICTED
        ),
    ],
)
def test_predicted_weights_are_those_of_the_loop(naive, make_batches, run, method, K, M, optimizer):
    modules, (ours, theirs), a = modules_of(naive, K), naive.OPTIMIZERS[optimizer], 0.7
    stages = [naive.stage(module) for module in modules]
    options = {"microbatches": M, "weight_prediction": a, "return_grads": True}
    algorithm = LOOPS[method][0](stages, naive.squared_error, ours(), **options)
    batches = make_batches(STEPS, B)
    states, infos = run(algorithm, batches)
    arguments = modules, [accumulating(theirs(), M) for _ in modules], states[0], split(batches, M)
    if method == "fr":
        expected = naive.features_replay(*arguments, "play", weight_prediction=a, M=M)
    else:
        expected = naive.ddg(*arguments, weight_prediction=a, M=M)
    assert_same(states, infos, expected, M)


class Trend:
    """An update that keeps a running mean d of what it adds to the weights, and goes back by n of them."""

    def __init__(self, update, g):
        self.update, self.g, self.d = update, g, None

    def __call__(self, w, grads):
        new = self.update(w, grads)
        d = jax.tree.map(np.zeros_like, w) if self.d is None else self.d
        self.d = jax.tree.map(lambda d, a, b: self.g * d + (1 - self.g) * (b - a), d, w, new)
        return new

    def back(self, w, n):
        return w if self.d is None else jax.tree.map(lambda w, d: w - n * d, w, self.d)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("K", "optimizer"), [(4, "nesterov"), (3, "adam")])
def test_correction_replays_with_the_weights_of_the_play(naive, make_batches, run, K, optimizer):
    D, modules, (ours, theirs) = 0.3, modules_of(naive, K), naive.OPTIMIZERS[optimizer]
    algorithm = fr.features_replay(
        [naive.stage(module) for module in modules], naive.squared_error, ours(), discrepancy_decay=D, return_grads=True
    )
    batches = make_batches(3 * K)
    states, infos = run(algorithm, batches)
    updates = [Trend(theirs(), D ** (1 / (K - k))) if k < K else theirs() for k in range(1, K + 1)]
    back = lambda k, w: updates[k - 1].back(w, K - k) if k < K else w
    expected = naive.features_replay(modules, updates, states[0], batches, "play", back)
    assert_same(states, infos, expected, 1)


@pytest.mark.usefixtures("x64")
def test_a_correction_of_nothing_is_the_plain_method(naive, make_batches, run):
    stages, batches = [naive.dense(3).stage, naive.dense(2).stage], make_batches(4, B)
    for options in ({"discrepancy_decay": 1.0}, {"weight_prediction": 0.0, "prediction_momentum": 0.5}):
        plain = fr.features_replay(stages, naive.squared_error, optax.adam(0.1), microbatches=2)
        other = fr.features_replay(stages, naive.squared_error, optax.adam(0.1), microbatches=2, **options)
        strip = lambda states: [state._replace(streams=()) for state in states]
        chex.assert_trees_all_equal(strip(run(plain, batches)[0]), strip(run(other, batches)[0]))


@pytest.mark.parametrize("predicted", [False, True])
@pytest.mark.parametrize(("d", "M"), [(d, M) for d in range(1, 8) for M in (1, 2, 3, 4, 8, 16)])
def test_a_stash_holds_each_version_in_flight_once(d, M, predicted):
    """Against a loop that remembers with every micro-batch what it was played with."""
    versions = delayed.Versions(d, M, predicted)
    updates = lambda i: sum((j + 1 - d) % M == 0 for j in range(d, i))
    played = lambda i: (updates(i), delayed.horizon(i, d, M) if predicted else 0)
    stash = versions.nothing_stashed(None)
    for i in range(6 * M + 2 * d):
        in_flight = {played(s) for s in range(i - d, i)} - {played(i)}
        if i >= 2 * d:
            assert versions.replayed(stash, played(i), i) == played(i - d)
        if i >= 2 * d and i % M == 0:
            assert set(stash.entries) == in_flight and len(in_flight) == len(stash.entries)
        if i % M == 0 and not predicted:
            assert len(stash.entries) == -(-2 * d // M) + (-d // M) <= -(-d // M)
        stash = versions.rotate(stash, played(i), i)


@pytest.mark.parametrize("make", [fr.features_replay, fr.ddg, fr.backprop])
def test_batches_that_cannot_be_split_are_refused(naive, make_batches, make):
    algorithm = make([naive.dense(2).stage], naive.squared_error, optax.sgd(0.1), microbatches=4)
    (bad,), (good,) = make_batches(1, 6), make_batches(1, 8)
    with pytest.raises(ValueError, match=r"a batch of 6 examples cannot be split into microbatches = 4"):
        algorithm.init(jax.random.key(0), bad)
    with pytest.raises(ValueError, match=r"microbatches = 4|was given inputs"):
        algorithm.step(algorithm.init(jax.random.key(0), good), bad)
    with pytest.raises(ValueError, match="microbatches = 0 was given"):
        make([naive.dense(2).stage], naive.squared_error, optax.sgd(0.1), microbatches=0)


@pytest.mark.parametrize("options", [{}, {"microbatches": 2}])
def test_targets_of_another_size_are_refused(naive, make_batches, options):
    """They might be broadcast to the outputs."""
    algorithm = fr.backprop([naive.dense(2).stage], naive.squared_error, optax.sgd(0.1), **options)
    (batch,) = make_batches(1, 8)
    state = algorithm.init(jax.random.key(0), batch)
    few = batch._replace(targets=batch.targets[: options.get("microbatches", 1)])
    with pytest.raises(ValueError, match="must have the same number of examples"):
        algorithm.step(state, few)


def test_2bw_needs_a_micro_batch_per_stage(naive):
    with pytest.raises(ValueError, match="microbatches = 2 was given for K = 3 stages"):
        fr.pipedream_2bw([naive.dense(2).stage] * 3, naive.squared_error, optax.sgd(0.1), microbatches=2)


def test_unknown_words_are_refused(naive):
    stages, common = [naive.dense(2).stage], (naive.squared_error, optax.sgd(0.1))
    with pytest.raises(ValueError, match="'old' is unknown; it can be 'current' or 'stashed'"):
        fr.features_replay(stages, *common, replay_weights="old")
    with pytest.raises(ValueError, match="'zb' is unknown; it can be 'gpipe' or '1f1b'"):
        fr.gpipe(stages, *common, microbatches=1, schedule="zb")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"weight_prediction": 1.0, "discrepancy_decay": 0.5}, "Use one of them"),
        ({"replay_weights": "stashed", "discrepancy_decay": 0.5}, "nothing to correct"),
        ({"discrepancy_decay": 2}, "discrepancy_decay = 2 was given; it must be a number, 0 to 1"),
        ({"prediction_momentum": -1}, "prediction_momentum = -1 was given; it must be a number, 0 to 1"),
    ],
)
def test_remedies_that_do_not_go_together_are_refused(naive, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        fr.features_replay([naive.dense(2).stage] * 2, naive.squared_error, optax.sgd(0.1), **options)
