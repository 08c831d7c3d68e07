"""Training from iterators of the user's own, and its resume."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fr_jax as fr
from fr_jax.data import DataError, iterator_pipeline
from fr_jax.training.checkpoints import Checkpoints
from fr_jax.training.interrupt import StopRequest
from fr_jax.training.loop import Intervals, Totals, train
from fr_jax.training.task import Headline, Task

LOSS = lambda y, z: jnp.mean((y - z) ** 2)
LENGTH = 3  # mini-batches of a pass over the data


def example(i: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(i)
    return rng.standard_normal((4, 3)).astype(np.float32), rng.standard_normal((4, 2)).astype(np.float32)


class Plain:
    """A generator's manners: it cannot say where it is."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.at += 1
        return example(self.at)


class WithState(Plain):
    def state(self):
        return {"at": self.at}

    def set_state(self, state):
        self.at = state["at"]


class LikeGrain(Plain):
    def get_state(self) -> bytes:
        return str(self.at).encode()

    def set_state(self, state: bytes) -> None:
        self.at = int(state)


class LikeTorchdata:
    """The iterable has the state, and begins anew when it ends."""

    def __init__(self) -> None:
        self.at = self.passes = 0

    def __iter__(self):
        while self.at < LENGTH:
            self.at += 1
            yield fr.Batch(*example(10 * self.passes + self.at))
        self.at, self.passes = 0, self.passes + 1

    def state_dict(self):
        return {"at": self.at, "passes": self.passes}

    def load_state_dict(self, state):
        self.at, self.passes = state["at"], state["passes"]


def run(data, folder, steps, resumed=False):
    """Trains to ``steps`` and saves every two; the weights."""
    pipeline = iterator_pipeline(data, steps_per_epoch=LENGTH)
    evaluate = lambda predict, state: {"loss": 0.0, "error": 0.0}
    task = Task("own", "own", pipeline, LOSS, lambda *_: {}, evaluate, Headline("error"), "examples", 4, None)
    method = fr.features_replay([fr.from_linen(nn.Dense(3)), fr.from_linen(nn.Dense(2))], LOSS, optax.adam(0.1))
    state, totals = method.init(jax.random.key(0), pipeline.train_batch(0)), None
    with Checkpoints(folder) as checkpoints, StopRequest() as stop:
        if resumed:
            found = checkpoints.restore(state)
            state, totals = found.state, Totals.from_metadata(found.metadata)
        intervals = Intervals(steps=steps, log_every=2, eval_every=steps, checkpoint_every=2, ahead=3)
        outcome = train(method, task, state, intervals, checkpoints=checkpoints, stop=stop, totals=totals)
    return jax.device_get(outcome.state.params)


@pytest.mark.parametrize("data", [WithState, LikeGrain, LikeTorchdata])
def test_a_run_goes_on_where_its_data_were(data, tmp_path):
    whole = run(data(), tmp_path / "whole", 8)
    run(data(), tmp_path / "parts", 4)
    parts = run(data(), tmp_path / "parts", 8, resumed=True)
    jax.tree.map(np.testing.assert_array_equal, whole, parts)


def test_an_iterator_without_position_is_not_resumed(tmp_path):
    run(Plain(), tmp_path, 4)
    with pytest.raises(DataError, match="mini-batch 4 was asked of an iterator that gives mini-batch 1 next"):
        run(Plain(), tmp_path, 8, resumed=True)


def test_what_the_iterator_gives():
    pipeline = iterator_pipeline([example(1), fr.Batch(*example(2))], steps_per_epoch=2)
    assert pipeline.position is None
    for step in (0, 0, 1, 2, 3):  # the newest again, and a second pass
        np.testing.assert_array_equal(pipeline.train_batch(step).inputs, example(1 + step % 2)[0])
    with pytest.raises(DataError, match="mini-batch 0 was asked of an iterator that gives mini-batch 4 next"):
        pipeline.train_batch(0)
    once = iterator_pipeline(iter([example(1)]), steps_per_epoch=1)
    once.train_batch(0)
    with pytest.raises(DataError, match="ended before mini-batch 1"):
        once.train_batch(1)
    with pytest.raises(DataError, match="the iterator gave dict; a mini-batch is an "):
        iterator_pipeline([{"image": 1}], steps_per_epoch=1).train_batch(0)


def test_a_state_that_cannot_be_saved():
    class Strange(WithState):
        def state(self):
            return object()

    with pytest.raises(DataError, match=r"state\(\) of the iterator gave object, which is neither bytes nor what JSON"):
        iterator_pipeline(Strange(), steps_per_epoch=1).position()
