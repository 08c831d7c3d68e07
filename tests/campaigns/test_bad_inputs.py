"""A hundred bad inputs: each is refused in the library's own words, before anything is trained or written.

What single settings and functions refuse is tested beside them; here are many of all kinds, in one table each.
"""

import importlib
import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fr_jax as fr
from fr_jax.training.checkpoints import CheckpointError, Checkpoints

pytestmark = pytest.mark.slow

PROGRAMS = {  # words after the name; {f} is a folder with the files of `folder`
    "mnist": """
        --method
        --method nothing
        --method fr fr
        --nothing 1
        --K two
        --K 2.5
        --K 0
        --K -1
        --K 99
        --K 99999999999999999999
        --K nan
        --K 2 --cuts 0
        --K 2 --cuts 9
        --K 3 --cuts 2 2
        --K 3 --cuts 3 1
        --K 3 --cuts 1 two
        --depth 0
        --width 0
        --width -3
        --batch-size 0
        --batch-size 1e3
        --batch-size 999999
        --steps 0
        --steps -5
        --steps 1 --epochs 1
        --epochs 0
        --learning-rate nan
        --learning-rate inf
        --learning-rate -0.1
        --learning-rate fast
        --momentum 2
        --momentum -1
        --weight-decay -1
        --weight-decay nan
        --seed -1
        --seed x
        --seed 99999999999999999999999
        --dtype float8
        --optimizer sdg
        --schedule linear
        --method bp --microbatches 3 --batch-size 128
        --method fr --microbatches 0
        --method gpipe --microbatches -2
        --method fr --pipeline-schedule 1f1b
        --method bp --batch-stats both
        --method bp --weight-prediction 1
        --method fr --weight-prediction -1
        --method fr --replay-weights stale
        --method admm --optimizer adamw
        --method eqprop --K 3
        --method dni --beta 1
        --data-parallel 0
        --data-parallel 99
        --data-parallel 3 --batch-size 128
        --shard-params --data-parallel 1 --method admm
        --devices 0
        --devices 1000
        --eval-every 0
        --log-every 0
        --checkpoint-every -1
        --test-examples 0
        --dataset nothing
        --dataset mnist --data-dir {f}/empty
        --dataset mnist --data-dir {f}/missing
        --dataset mnist --data-dir {f}/file
        --dataset npy
        --dataset npy --data-dir {f}/empty
        --model nothing
        --preset nothing
        --balance nothing
        --workdir {f}/file
        --workdir {f}/file/below
        --resume --overwrite
        --init-from {f}/missing
        --init-from {f}/empty
        --init-from {f}/file
        unexpected
        -x
    """,
    "cifar": "--model resnet20 --K 50\n --dataset cifar10 --data-dir {f}/file\n --dropout-rate 1.5\n --model resnet21",
    "lm": """
        --text {f}/missing
        --text {f}/empty
        --text {f}/file
        --heads 5 --width 64
        --context 0
        --sample-length -1
        --temperature -1
    """,
    "compare": "--methods\n --methods fr nothing\n --seeds x\n --vary nothing 1\n --methods fr fr --workdir {f}/file",
    "speed": "--K 0\n --methods nothing\n --rounds 0\n --output {f}/empty",
    "memory": "--models nothing\n --K 0\n --microbatches x",
    "prediction": "--K 0\n --nothing",
    "scaling": "--K 0\n --nothing",
    "curves": "{f}/missing\n {f}/empty\n {f}/file",
    "balance": "--K 0\n --model nothing",
    "chain_rule": "--depths 0\n --nothing",
    "time_to_loss": "{f}/missing\n --nothing",
}
COMMANDS = [(name, line.strip()) for name, lines in PROGRAMS.items() for line in lines.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("given")
    (path / "empty").mkdir()
    (path / "file").write_bytes(b"")
    return path


@pytest.mark.parametrize(("name", "line"), COMMANDS)
def test_a_program_refuses_in_one_message(name, line, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = sorted(folder.rglob("*"))
    given = line.format(f=folder).split()
    if name in ("mnist", "cifar"):
        given = ["--dataset", "digits", *([] if "--epochs" in line else ["--steps", "1"]), *given]
    module = f"fr_jax.experiments.{name}"
    main = getattr(importlib.import_module(module), "main", None) or importlib.import_module(f"{module}.__main__").main
    try:
        code = main(given)
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert code in (1, 2), (code, out[-500:], err[-500:])
    assert err.strip() and "Traceback" not in out + err and len(err.strip().splitlines()) <= 25, err[-1500:]
    assert sorted(folder.rglob("*")) == before and not [*tmp_path.rglob("*")]


def mse(y: jax.Array, t: jax.Array) -> jax.Array:
    return ((y - t) ** 2).mean()


BATCH = fr.Batch(np.ones((4, 3), np.float32), np.zeros((4, 2), np.float32))
KEY = jax.random.key(0)


def stages() -> list[fr.Stage]:
    return [fr.from_linen(nn.Dense(4)), fr.from_linen(nn.Dense(2))]


def make(method: Callable[..., fr.Algorithm] = fr.features_replay, **how: Any) -> fr.Algorithm:
    return method(
        how.pop("stages", None) or stages(), how.pop("loss", mse), how.pop("optimizer", optax.sgd(0.1)), **how
    )


def init(batch: Any = BATCH, key: Any = KEY, method: Any = fr.features_replay, **how: Any) -> Any:
    return make(method, **how).init(key, batch)


def step(batch: Any, method: Any = fr.features_replay, **how: Any) -> Any:
    algorithm = make(method, **how)
    return algorithm.step(algorithm.init(KEY, BATCH), batch)


def predict(inputs: Any) -> Any:
    algorithm = make()
    return algorithm.predict(algorithm.init(KEY, BATCH), inputs)


def with_state(change: Callable[[Any], Any]) -> Any:
    algorithm = make()
    return algorithm.step(change(algorithm.init(KEY, BATCH)), BATCH)


def with_weights(state: Any, shapes: dict[str, tuple[int, ...]]) -> Any:
    """A user's own weights in place of those of the first stage."""
    return state._replace(params=({name: jnp.ones(shape) for name, shape in shapes.items()}, *state.params[1:]))


def batch(inputs: Any = BATCH.inputs, targets: Any = BATCH.targets) -> fr.Batch:
    return fr.Batch(inputs, targets)


two_layers = [nn.Dense(4), nn.Dense(2)]
CALLS: dict[str, Callable[[], Any]] = {
    "no stages": lambda: fr.backprop([], mse, optax.sgd(0.1)),
    "a module as a stage": lambda: fr.backprop(two_layers, mse, optax.sgd(0.1)),
    "a number as a stage": lambda: fr.backprop([1], mse, optax.sgd(0.1)),
    "a string as optimizer": lambda: make(optimizer="sgd"),
    "a rate as optimizer": lambda: make(optimizer=0.1),
    "no optimizer": lambda: make(optimizer=None),
    "three optimizers for two stages": lambda: make(optimizer=[optax.sgd(0.1)] * 3),
    "MultiSteps": lambda: make(optimizer=optax.MultiSteps(optax.sgd(0.1), 2)),
    "microbatches 0": lambda: make(microbatches=0),
    "microbatches 1.5": lambda: make(microbatches=1.5),
    "microbatches True": lambda: make(microbatches=True),
    "microbatches that do not divide": lambda: init(microbatches=3),
    "gpipe's microbatches -1": lambda: make(fr.gpipe, microbatches=-1),
    "global_clip -1": lambda: make(global_clip=-1),
    "global_clip nan": lambda: make(global_clip=float("nan")),
    "global_clip of text": lambda: make(global_clip="1"),
    "batch_stats of no kind": lambda: make(batch_stats="all"),
    "replay_weights of no kind": lambda: make(replay_weights="old"),
    "a schedule of no kind": lambda: make(fr.gpipe, microbatches=2, schedule="1b1f"),
    "weight_prediction nan": lambda: make(weight_prediction=float("nan")),
    "proximal_step 0": lambda: make(fr.proximal_backprop, proximal_step=0),
    "cg_steps 0": lambda: make(fr.proximal_backprop, cg_steps=0),
    "no loss": lambda: step(BATCH, loss=None),
    "a loss that is a vector": lambda: step(BATCH, loss=lambda y, t: (y - t)[:, 0]),
    "a loss that is text": lambda: step(BATCH, loss=lambda y, t: "mse"),
    "a loss of integers": lambda: step(BATCH, loss=lambda y, t: jnp.int32(1)),
    "placement of one": lambda: make(placement=fr.placement(1)),
    "placement of text": lambda: make(placement=["cpu", "cpu"]),
    "placement on 0": lambda: fr.placement(0),
    "placement on more devices than there are": lambda: fr.placement(2, data_parallel=1000),
    "a tuple as batch": lambda: init((BATCH.inputs, BATCH.targets)),
    "None as batch": lambda: init(None),
    "lists as batch": lambda: init(batch([[1.0]], [[1.0]])),
    "text as inputs": lambda: init(batch(np.array([["a"] * 3] * 4))),
    "objects as inputs": lambda: init(batch(np.array([[None] * 3] * 4))),
    "no examples": lambda: init(batch(np.ones((0, 3), np.float32), np.ones((0, 2), np.float32))),
    "one example less in targets": lambda: init(batch(targets=np.ones((3, 2), np.float32))),
    "a scalar as inputs": lambda: init(batch(np.float32(1))),
    "targets that do not fit the loss": lambda: step(batch(targets=np.ones((4, 5), np.float32))),
    "a number as key": lambda: init(key=0),
    "None as key": lambda: init(key=None),
    "an array of keys": lambda: init(key=jax.random.split(KEY)),
    "text as key": lambda: init(key="0"),
    "step: another size": lambda: step(batch(np.ones((5, 3), np.float32), np.ones((5, 2), np.float32))),
    "step: another width": lambda: step(batch(np.ones((4, 7), np.float32))),
    "step: another dtype": lambda: step(batch(np.ones((4, 3), np.int32))),
    "step: None": lambda: step(None),
    "step: nothing as targets": lambda: step(batch(targets=None)),
    "step: a state of K = 1": lambda: with_state(
        lambda s: make(stages=stages()[:1], loss=lambda y, t: y.mean()).init(KEY, BATCH)
    ),
    "step: a state of another method": lambda: with_state(lambda s: init(method=fr.backprop)),
    "step: a dictionary as state": lambda: with_state(lambda s: s._asdict()),
    "step: None as state": lambda: with_state(lambda s: None),
    "step: weights of text": lambda: with_state(lambda s: s._replace(params=("a", "b"))),
    "step: weights of one stage": lambda: with_state(lambda s: s._replace(params=s.params[:1])),
    "step: a width that does not fit": lambda: with_state(lambda s: with_weights(s, {"kernel": (3, 5), "bias": (5,)})),
    "step: a width that does not fit the rest": lambda: with_state(lambda s: with_weights(s, {"kernel": (3, 4)})),
    "predict: a width that does not fit": lambda: make().predict(
        with_weights(init(), {"kernel": (3, 5), "bias": (5,)}), BATCH.inputs
    ),
    "predict: None": lambda: predict(None),
    "predict: text": lambda: predict("x"),
    "predict: a scalar": lambda: predict(np.float32(1)),
    "predict: another width": lambda: predict(np.ones((4, 7), np.float32)),
    "partition: cuts beyond the end": lambda: fr.partition([fr.from_linen(nn.Dense(2))], (3,)),
    "partition: cuts that fall": lambda: fr.partition([*stages(), *stages()], (3, 1)),
    "partition: a cut of text": lambda: fr.partition(stages(), ("1",)),
    "partition: no layers": lambda: fr.partition([], ()),
    "chain: nothing": lambda: fr.chain([]),
    "from_linen: a class": lambda: fr.from_linen(nn.Dense),
    "from_linen: a function": lambda: fr.from_linen(lambda x: x),
    "balance: more stages than layers": lambda: fr.balance([1.0, 2.0], 3),
    "balance: negative costs": lambda: fr.balance([1.0, -2.0], 2),
    "balance: nan": lambda: fr.balance([1.0, float("nan")], 2),
    "balance: K = 0": lambda: fr.balance([1.0], 0),
    "keep=0": lambda: Checkpoints("nowhere", keep=0),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_api_refuses_in_its_own_words(call):
    """The error is raised by the library, not by JAX, Flax or Python beneath it."""
    with pytest.raises((ValueError, TypeError, CheckpointError)) as refused:
        call()
    where = traceback.extract_tb(refused.value.__traceback__)[-1]
    assert Path(fr.__file__).parent in Path(where.filename).parents, (where.filename, str(refused.value)[:300])
    assert re.search(r"[.)]$", str(refused.value).strip()), str(refused.value)[-300:]


def test_there_are_a_hundred():
    assert len(COMMANDS) + len(CALLS) >= 100
