"""The methods whose memory is compared, and back-propagation that recomputes, which is compared with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Sharding

import fr_jax as fr
from fr_jax._arrays import put
from fr_jax.algorithms import _functions as steps
from fr_jax.algorithms._training import make_train
from fr_jax.experiments._methods import METHODS, Method, TrainingSet
from fr_jax.stages import numbered
from fr_jax.types import Algorithm, Batch, Info, LossFn, Stage

EXAMPLES, CLASSES = 50_000, 10  # as CIFAR-10 has; only caches and conditioned synthesizers depend on them

__all__ = ["CONTESTANTS", "Contestant", "checkpointed", "recomputing"]


def recomputing(
    stages: Sequence[Stage],
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    placement: Sequence[Sharding],
    donate: bool = False,
) -> Algorithm:
    """Back-propagation that keeps only the inputs of K stages, and runs each again before its backward pass.

    That is gradient checkpointing (Chen et al. 2016, arXiv:1604.06174) with one jitted function per stage, as features
    replay has them; no compiler can undo it. Activations: O(L/K + K).

    Args:
      stages: the K stages.
      loss_fn: ``(outputs, targets) -> scalar``, the mean over the batch.
      optimizer: one optax transformation for all stages.
      placement: one sharding per stage.
      donate: reuse the buffers of the old state; it is then invalid after ``step``.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import fr_jax as fr
      >>> from fr_jax.experiments.memory.methods import recomputing
      >>> stages = fr.partition(fr.models.mlp(depth=2, width=8), (1,))
      >>> fit = recomputing(stages, lambda y, t: jnp.mean(y), optax.sgd(0.1), placement=fr.placement(2))
      >>> batch = fr.Batch(jnp.ones((4, 3)), jnp.ones(4))
      >>> fit.step(fit.init(jax.random.key(0), batch), batch)[0].step
      1
    """
    K = len(stages)
    plain = fr.backprop(stages, loss_fn, optimizer, placement=placement)
    stages = numbered(stages)
    common: dict[str, Any] = {"return_grads": False, "donate": donate}
    plays = [steps.make_play(stages[k], placement[k], update_stats=True, donate=donate) for k in range(K - 1)]
    replays = [
        # The play has moved the running statistics already; the replay belongs to the same step.
        steps.make_replay(
            stages[k], optimizer, placement[k], staleness=0, input_gradient=k > 0, update_stats=False, **common
        )
        for k in range(K - 1)
    ]
    last = make_train(stages[-1:], loss_fn, [optimizer], placement[-1], metrics_fn=None, input_gradient=K > 1, **common)

    def step(state: Any, batch: Batch) -> tuple[Any, Info]:
        params, model_state, opt_state = list(state.params), list(state.model_state), list(state.opt_state)
        streams, kept = list(state.streams), []
        h = put(batch.inputs, placement[0])
        for k in range(K - 1):
            kept.append(h)
            h, model_state[k], count = plays[k](params[k], model_state[k], streams[k], h)
            h, streams[k] = put(h, placement[k + 1]), streams[k]._replace(count=count)
        targets = put(batch.targets, placement[-1])
        top = last(params[-1:], model_state[-1:], opt_state[-1:], streams[-1:], h, targets)
        params[-1:], model_state[-1:], opt_state[-1:] = top.params, top.model_state, top.opt_state
        streams[-1], delta, loss = streams[-1]._replace(count=top.counts[0]), top.delta, top.loss
        h = top = None  # nothing here keeps alive what has been used
        for k in reversed(range(K - 1)):
            params[k], _, opt_state[k], delta, _, _ = replays[k](
                params[k], model_state[k], opt_state[k], streams[k], kept.pop(), put(delta, placement[k])
            )
        fields = map(tuple, (params, model_state, opt_state, streams))
        new = dict(zip(("params", "model_state", "opt_state", "streams"), fields, strict=True))
        return state._replace(step=state.step + 1, **new), Info(loss, None, {})

    return Algorithm(init=plain.init, step=step, predict=plain.predict)


def checkpointed(stage: Stage) -> Stage:
    """The stage under ``jax.checkpoint``: nothing is kept for the backward pass but its input."""

    def apply(params: Any, state: Any, x: Any, /, *, key: Any = None, train: bool = True) -> Any:
        run = lambda params, state, x, key: stage.apply(params, state, x, key=key, train=train)
        return jax.checkpoint(run)(params, state, x, key)

    return Stage(stage.init, apply)


class Contestant(NamedTuple):
    """A method to compare.

    Attributes:
      title: its name for people.
      make: ``(stages, loss_fn, optimizer, *, placement, donate, microbatches) -> Algorithm``, with its
        own ``microbatches`` for None.
      form: its closed form in ``fr_jax.diagnostics.memory.activations``.
      one_device: whether all stages share a device.
      has_microbatches: whether their number can be given.
      microbatches: ``given or None -> M``, the number that it runs with.
      recomputes: whether it is no plain back-propagation even with K = 1 and M = 1.
    """

    title: str
    make: Callable[..., Algorithm]
    form: str
    one_device: bool = True
    has_microbatches: bool = False
    microbatches: Callable[[int | None], int] = lambda given: 1
    recomputes: bool = False


def _over_devices(card: Method, form: str = "", variant: str = "") -> Contestant:
    title, settings = card.variants[variant] if variant else (card.title, {})
    has_some = "microbatches" in card.defaults

    def own(microbatches: int | None) -> dict[str, Any]:
        given = microbatches is not None and has_some
        return card.defaults | {**settings} | ({"microbatches": microbatches} if given else {})

    def make(
        stages: Sequence[Stage], loss_fn: Any, optimizer: Any, *, microbatches: int | None, **common: Any
    ) -> Algorithm:
        return card.make(own(microbatches), stages, loss_fn, optimizer, TrainingSet(EXAMPLES, CLASSES), **common)

    M = lambda microbatches: own(microbatches).get("microbatches", 1)
    title, form = f"{title}, K devices", form or card.memory
    return Contestant(title, make, form, one_device=False, has_microbatches=has_some, microbatches=M)


def _unsplit(method: Callable[..., Algorithm]) -> Callable[..., Algorithm]:
    return lambda *arguments, microbatches, **common: method(*arguments, **common)


def _checkpoint(stages: Sequence[Stage], *arguments: Any, **common: Any) -> Algorithm:
    return fr.backprop([checkpointed(stage) for stage in stages], *arguments, **common)


CONTESTANTS = {
    **{name: _over_devices(card) for name, card in METHODS.items() if not card.whole},
    "fr-stashed": _over_devices(METHODS["fr"], variant="fr-stashed"),
    "1f1b": _over_devices(METHODS["gpipe"], "1f1b", variant="1f1b"),
    "checkpoint": Contestant("jax.checkpoint, one device", _unsplit(_checkpoint), "checkpoint", recomputes=True),
    "recompute": Contestant("recomputing back-propagation, one device", _unsplit(recomputing), "recompute"),
    "fr-one-device": Contestant("features replay, one device", _unsplit(fr.features_replay), "fr-one-device"),
}
