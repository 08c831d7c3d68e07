import dataclasses
import math
import signal
import time
from typing import Any, NamedTuple

import jax.numpy as jnp
import pytest

from fr_jax.data.pipelines import InputPipeline
from fr_jax.training.interrupt import StopRequest
from fr_jax.training.loop import Intervals, Outcome, Totals, train
from fr_jax.training.metrics_reader import LASTING, Stopwatch, _not_finite
from fr_jax.training.profiler import Profiler
from fr_jax.training.task import ACCURACY, Headline, Task
from fr_jax.types import Algorithm, Info

EARLIER = Totals(100.0, {"test_loss": 1.0, "test_accuracy": 0.9, "best_test_accuracy": 0.95})


class FakeState(NamedTuple):
    step: int
    params: tuple[Any, ...]


class DeltaState(NamedTuple):
    step: int
    params: tuple[Any, ...]
    deltas: tuple[Any, ...]


class FullState(NamedTuple):
    step: int
    params: tuple[Any, ...]
    model_state: tuple[Any, ...]
    opt_state: tuple[Any, ...]


@dataclasses.dataclass
class Number:
    """A loss that tells when it is read."""

    value: float
    name: str
    events: list[str]

    def __float__(self) -> float:
        self.events.append(f"read {self.name}")
        return self.value


class Fake:
    """Algorithm, task, checkpoints and reporter in one: writes down who is called when."""

    def __init__(self, K=2, losses=None, norms=None, bad_weight=None, signals=None):
        self.events: list[str] = []
        self.rows: list[dict[str, float]] = []
        self.saved_states: dict[int, Any] = {}
        self._K, self._losses, self._norms = K, losses or {}, norms or {}
        self._bad_weight, self._signals = bad_weight, signals or {}
        self.metrics: dict[int, dict[str, Any]] = {}
        self.algorithm = Algorithm(init=None, step=self._step, predict=None)
        pipeline = InputPipeline(5, self._train_batch, None)
        score = lambda predict, state: {"loss": 0.5, "accuracy": 2 / 3}
        self.task = Task("made up", "made up", pipeline, None, None, score, ACCURACY, "images", 4, examples=20)

    def state(self, step: int = 0) -> FakeState:
        return FakeState(step, tuple(jnp.full(2, float(k)) for k in range(self._K)))

    def _train_batch(self, step: int) -> int:
        return step

    def _step(self, state: FakeState, batch: int) -> tuple[FakeState, Info]:
        assert batch == state.step
        step = state.step + 1
        self.events.append(f"step {step}")
        if step in self._signals:
            signal.raise_signal(self._signals[step])
        loss = Number(self._losses.get(step, float(step)), str(step), self.events)
        norms = {f"gradient_norm/{k}": jnp.float32(self._norms.get((step, k), 1.0)) for k in range(1, self._K + 1)}
        params = state.params
        if self._bad_weight and self._bad_weight[0] == step:
            k = self._bad_weight[1]
            params = params[: k - 1] + (jnp.array([0.0, jnp.inf]),) + params[k:]
        metrics = {"accuracy": jnp.float32(0.5), **norms, **self.metrics.get(step, {})}
        return FakeState(step, params), Info(loss, None, metrics)

    def save(self, step: int, state: FakeState, metadata: dict[str, Any]) -> None:
        self.events.append(f"save {step}")
        self.saved_states[step] = (state, metadata)

    def row(self, row: dict[str, Any]) -> None:
        self.events.append(f"{'test' if 'test_loss' in row else 'row'} {row['step']}")
        self.rows += [row] if "train_loss" in row else []

    def advanced(self, step: int) -> None:
        self.events.append(f"advanced {step}")

    def train(self, *, start: int = 0, totals: Totals | None = None, hooks: Any = (), **intervals: Any) -> Outcome:
        settings = {"steps": 10, "log_every": 3, "eval_every": 100, "checkpoint_every": 100, "ahead": 3}
        with StopRequest() as stop:
            return train(
                self.algorithm,
                self.task,
                self.state(start),
                Intervals(**(settings | intervals)),
                checkpoints=self,
                stop=stop,
                report=self,
                hooks=hooks,
                totals=totals,
            )

    def steps_of(self, what: str) -> list[int]:
        return [int(event.split()[1]) for event in self.events if event.split()[0] == what]


@pytest.mark.parametrize("ahead", [0, 1, 3, 50])
def test_metrics_are_read_late_and_the_run_ahead_is_bounded(ahead):
    fake = Fake()
    fake.train(ahead=ahead)
    done = read = 0
    for event in fake.events:
        if event.startswith("step"):
            done += 1
            assert done - read <= ahead + 1
        elif event.startswith("read"):
            read += 1
            assert event == f"read {read}"  # in order, each once
            assert done - read == ahead or done == 10  # never the newest step, until the end
    assert (done, read) == (10, 10)


def test_rows_are_means_over_their_steps():
    fake = Fake()
    fake.train(log_every=4, eval_every=6)
    assert [(row["step"], row["train_loss"]) for row in fake.rows] == [(4, 2.5), (6, 5.5), (8, 7.5), (10, 9.5)]
    assert [row["epoch"] for row in fake.rows] == [0.8, 1.2, 1.6, 2.0]
    assert all(row["train_accuracy"] == 0.5 and row["gradient_norm/1"] == 1 for row in fake.rows)
    seconds = [row["seconds"] for row in fake.rows]
    assert seconds == sorted(seconds) and seconds[0] > 0
    assert all(row["images_per_s"] > 0 for row in fake.rows)


def test_rows_that_are_read_at_the_end_keep_the_times_of_their_reads(monkeypatch):
    number = Number.__float__
    monkeypatch.setattr(Number, "__float__", lambda self: time.sleep(0.02) or number(self))
    fake = Fake()
    fake.train(log_every=2, ahead=50)
    assert len(fake.rows) == 5
    assert all(row["images_per_s"] < 2 * 4 / 0.04 for row in fake.rows)  # 2 steps of 4 images, 20 ms each at least


def test_intervals_and_the_last_step():
    fake = Fake()
    outcome = fake.train(eval_every=4, checkpoint_every=3)
    assert fake.steps_of("test") == [4, 8, 10]
    assert fake.steps_of("save") == [3, 6, 9, 10]
    assert all(fake.saved_states[step][0].step == step for step in fake.saved_states)
    assert (outcome.finished, outcome.step, outcome.state.step) == (True, 10, 10)
    assert outcome.totals.scores == {"test_loss": 0.5, "test_accuracy": 2 / 3, "best_test_accuracy": 2 / 3}
    saved = fake.saved_states[10][1]  # evaluated before it is saved
    assert saved["totals"].items() > outcome.totals.scores.items()
    assert Totals.from_metadata(saved).scores == outcome.totals.scores


def test_everything_is_read_before_a_checkpoint():
    fake = Fake()
    fake.train(checkpoint_every=5)
    for step in (5, 10):
        before = fake.events[: fake.events.index(f"save {step}")]
        assert f"read {step}" in before and f"step {step + 1}" not in before


def test_going_on_from_a_step_with_earlier_totals():
    fake = Fake()
    outcome = fake.train(start=6, totals=EARLIER, eval_every=4)
    assert fake.steps_of("step") == [7, 8, 9, 10]
    assert fake.steps_of("test") == [8, 10]
    assert outcome.totals.scores == {"test_loss": 0.5, "test_accuracy": 2 / 3, "best_test_accuracy": 0.95}
    assert all(row["seconds"] > 100 for row in fake.rows) and 100 < outcome.totals.seconds < 160


def test_nothing_left_to_do():
    fake = Fake()
    outcome = fake.train(start=10, totals=EARLIER)
    assert fake.events == [] and outcome.finished and outcome.step_seconds_median is None
    assert outcome.totals.scores == EARLIER.scores


def test_totals_in_checkpoints_of_fr_jax_0_1():
    old = {"totals": {"seconds": 3.0, "test_accuracy": 0.5, "best_test_accuracy": 0.75}, "dataset": "digits"}
    assert Totals.from_metadata(old) == Totals(3.0, {"test_accuracy": 0.5, "best_test_accuracy": 0.75})
    old = {"totals": {"seconds": 3.0, "test_accuracy": None, "best_test_accuracy": None}}
    assert Totals.from_metadata(old) == Totals(3.0, {})


def test_the_best_of_a_number_that_is_better_when_lower():
    bits = Headline("bits_per_byte")
    totals = Totals().evaluated({"loss": 1.0, "bits_per_byte": 2.0}, bits, 1.0)
    totals = totals.evaluated({"loss": 1.0, "bits_per_byte": 3.0}, bits, 2.0)
    scores = {"test_loss": 1.0, "test_bits_per_byte": 3.0, "best_test_bits_per_byte": 2.0}
    assert totals == (2.0, scores, None)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_request_is_honoured_after_its_step(number):
    fake = Fake(signals={5: number})
    outcome = fake.train()
    assert fake.steps_of("step") == [1, 2, 3, 4, 5] == fake.steps_of("read")
    assert fake.steps_of("save") == [5] and fake.steps_of("test") == []
    assert (outcome.finished, outcome.step, outcome.divergence) == (False, 5, None)


def test_a_stop_request_at_a_checkpoint_saves_once():
    fake = Fake(signals={4: signal.SIGTERM})
    fake.train(checkpoint_every=4)
    assert fake.steps_of("save") == [4]


def test_a_stop_request_in_the_last_step_comes_too_late():
    fake = Fake(signals={10: signal.SIGTERM})
    assert fake.train().finished
    assert fake.steps_of("save") == fake.steps_of("test") == [10]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_of_the_last_stage(value):
    fake = Fake(K=3, losses={5: value, 6: math.nan})
    outcome = fake.train(checkpoint_every=2)
    assert outcome.divergence == (5, 3, f"loss = {value}")
    assert not outcome.finished and outcome.step <= 5 + 3 + 1
    assert fake.steps_of("save") == [2, 4]


def test_a_gradient_that_is_not_finite_names_its_stage():
    fake = Fake(K=3, norms={(5, 2): math.inf, (5, 3): math.nan})
    outcome = fake.train(checkpoint_every=100)
    assert outcome.divergence == (5, 2, "gradient norm = inf")
    assert fake.steps_of("save") == [] == fake.steps_of("test")


class Careful(Fake):
    """Its method drops updates that are not finite; ``bad`` are the steps with such a loss."""

    def __init__(self, bad, steps=40, **options):
        super().__init__(losses=dict.fromkeys(bad, math.nan), norms={(s, 2): math.inf for s in bad}, **options)
        for step in range(1, steps + 1):
            self.metrics[step] = {f"skipped/{k}": int(k == 2 and step in bad) for k in (1, 2)}


def test_single_updates_that_were_dropped_are_counted():
    fake = Careful({2, 5, 6, 12})
    outcome = fake.train(steps=12, log_every=3)
    assert outcome.finished and outcome.divergence is None
    losses, counts = [row["train_loss"] for row in fake.rows], [row.get("skipped/2") for row in fake.rows]
    assert losses[::2] == [2.0, 8.0] and counts == [1, 2, None, 1]
    assert math.isnan(losses[1]) and math.isnan(losses[3])  # the newest is not finite
    assert not any("skipped/1" in row for row in fake.rows)
    assert all(math.isfinite(row["gradient_norm/1"]) for row in fake.rows)


def test_no_state_is_saved_while_the_newest_numbers_are_in_doubt_but_the_last():
    fake = Careful({2, 5, 6, 12})
    assert fake.train(steps=12, checkpoint_every=2).finished
    assert fake.steps_of("save") == [4, 8, 10, 12]


@pytest.mark.parametrize(("bad", "steps"), [(range(7, 41), 40), (range(19, 21), 20)])
def test_what_lasts_is_a_divergence_where_updates_are_dropped(bad, steps):
    fake = Careful(set(bad))
    outcome = fake.train(steps=steps, checkpoint_every=6, eval_every=6)
    assert outcome.divergence == (bad[0], 2, "loss = nan") and not outcome.finished
    assert outcome.step <= bad[0] + LASTING + 3
    assert max(fake.steps_of("save")) < bad[0]


def test_what_is_in_flight_may_be_anything_where_updates_are_dropped():
    state = FakeState(1, (jnp.zeros(2), jnp.array([jnp.nan])))
    assert _not_finite(1, state, in_flight=False) == (1, 2, "params/1 = nan")
    flying = DeltaState(1, params=(jnp.zeros(2),), deltas=(jnp.array([jnp.nan]),))
    assert _not_finite(1, flying, in_flight=False) is None
    assert _not_finite(1, flying) == (1, 1, "deltas/0 = nan")


@pytest.mark.parametrize("last", [False, True])
def test_divergence_in_the_steps_before_the_end_is_still_seen(last):
    fake = Fake(losses={10 if last else 8: math.nan})
    outcome = fake.train(ahead=5)
    assert outcome.divergence is not None and not outcome.finished
    assert fake.steps_of("save") == [] == fake.steps_of("test")


def test_divergence_before_a_stop_request_is_not_saved():
    fake = Fake(losses={4: math.nan}, signals={5: signal.SIGTERM})
    outcome = fake.train(ahead=5)
    assert outcome.divergence is not None and fake.steps_of("save") == []


@pytest.mark.parametrize("at_end", [False, True])
def test_weights_that_are_not_finite_are_not_saved(at_end):
    fake = Fake(K=3, bad_weight=(4, 2), signals={4: signal.SIGTERM} if at_end else None)
    outcome = fake.train(checkpoint_every=100 if at_end else 4)
    assert outcome.divergence == (4, 2, "params/1 = inf")
    assert fake.steps_of("save") == [] and not outcome.finished


def test_a_mask_or_a_best_loss_so_far_may_be_infinite():
    states = (jnp.array([-jnp.inf, 1.0]), jnp.zeros(2))
    sound = FullState(1, params=states[1:], model_state=states, opt_state=(jnp.array(jnp.inf),))
    assert _not_finite(1, sound) is None
    found = _not_finite(1, sound._replace(model_state=(states[0], jnp.array([jnp.nan]))))
    assert found == (1, 2, "model_state/1 = nan")
    assert _not_finite(1, sound._replace(params=states[:1])) == (1, 1, "params/0 = -inf")


def test_every_scalar_of_the_metrics_is_in_the_rows():
    """The mean over the steps that have it: a method's under its own name, the task's with a prefix; no vectors."""
    fake = Fake()
    fake.metrics = {
        2: {"recall": jnp.ones(3), "recall/top": jnp.float32(0.25), "synthesizer_error/1": jnp.float32(7.0)},
        3: {"recall/top": 0.75, "synthesizer_error/2": math.inf},
    }
    assert fake.train().divergence is None and len(fake.rows) == 4
    first, second, *_ = fake.rows
    own = {"train_recall/top": 0.5, "synthesizer_error/1": 7.0}
    assert first.items() > own.items() and math.isnan(first["synthesizer_error/2"])
    assert set(first) - set(second) == {*own, "synthesizer_error/2"}
    common = ["train_loss", "train_accuracy", "images_per_s", "gradient_norm/1", "gradient_norm/2"]
    assert list(second) == ["step", "epoch", *common, "seconds", "dataset"]


def test_hooks_see_the_first_state_and_every_issued_step():
    fake, seen = Fake(), []
    one = lambda state, info: seen.append((state.step, info and info.loss.value))
    two = lambda state, info: fake.events.append(f"hook {state.step}")
    outcome = fake.train(start=7, hooks=[one, two], ahead=50)
    assert seen == [(7, None), (8, 8.0), (9, 9.0), (10, 10.0)] and outcome.finished
    assert fake.events[:8] == ["hook 7", "step 8", "hook 8", "step 9", "hook 9", "step 10", "hook 10", "read 8"]


def test_a_hook_that_raises_ends_the_run():
    def hook(state, info):
        if state.step == 2:
            raise RuntimeError("seen enough")

    fake = Fake()
    with pytest.raises(RuntimeError, match="seen enough"):
        fake.train(hooks=[hook])
    assert fake.steps_of("step") == [1, 2]


def test_median_time_of_a_step_leaves_out_evaluation():
    fake = Fake()
    score = fake.task.evaluate
    fake.task = fake.task._replace(evaluate=lambda *arguments: time.sleep(0.2) or score(*arguments))
    outcome = fake.train(eval_every=5, ahead=1)
    assert outcome.step_seconds_median is not None and outcome.step_seconds_median < 0.1
    assert fake.train(steps=2).step_seconds_median is None


def test_saving_does_not_count_in_images_per_second(monkeypatch):
    fake = Fake()
    save = fake.save
    monkeypatch.setattr(fake, "save", lambda *arguments: (time.sleep(0.5), save(*arguments)))
    fake.train(checkpoint_every=5, log_every=5)
    assert fake.rows[1]["images_per_s"] > 5 * 4 / 0.5
    assert fake.rows[1]["seconds"] > 0.5


def test_stopwatch_stands_still_while_paused(monkeypatch):
    clock = iter([100.0, 103.0, 110.0, 112.0])  # start, pause, end of the pause, read
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    watch = Stopwatch(10.0)
    with watch.paused():
        pass
    assert watch.seconds() == 10 + 3 + 2


@pytest.mark.parametrize(("start", "traced"), [(0, range(6, 16)), (25, range(25, 30))])
def test_the_profiler_traces_ten_steps(start, traced, tmp_path, monkeypatch):
    fake = Fake()
    monkeypatch.setattr("jax.profiler.start_trace", lambda folder: fake.events.append(f"start {folder}"))
    monkeypatch.setattr("jax.profiler.stop_trace", lambda: fake.events.append("stop tracing"))
    with Profiler(tmp_path, start, steps=30, warm_up=6) as profiler:
        fake.train(start=start, steps=30, hooks=[profiler])
    first, last = fake.events.index(f"start {tmp_path}"), fake.events.index("stop tracing")
    inside = [event for event in fake.events[first:last] if event.startswith("step")]
    assert inside == [f"step {step + 1}" for step in traced]
