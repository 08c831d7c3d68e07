"""``--init-from``: weights, statistics and optimizer state from a run of any K and method, layer by layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import fr_jax as fr
from fr_jax import distributed
from fr_jax._arrays import place, put
from fr_jax._placement import replicated
from fr_jax.algorithms._layers import DifferentStatesError, carry_over
from fr_jax.experiments._cli.settings import Resolved, TrainSettings, own_of_model
from fr_jax.experiments._fields import SettingsError, flag
from fr_jax.experiments._run.session import Session, make_algorithm, make_layers
from fr_jax.experiments._run.tasks import Data, resolve_for
from fr_jax.training.checkpoints import Checkpoints, Restored
from fr_jax.training.run_folder import RunFolder

__all__ = ["start_from"]

_CARRIED = ("params", "model_state", "opt_state")


def start_from(path: Path, session: Session, state: Any, data: Data) -> tuple[Any, str]:
    """The first state of a run that goes on from another's newest sound checkpoint, and a line that says what it has.

    ``state`` is the fresh state of this ``session``: what is in flight between stages, and what belongs to a method
    alone (synthesizers, gluing variables), stays as it is there. The step is that of the other run.

    Raises:
      SettingsError: the folder holds no run or no checkpoint, its network is another, or it has done all the steps.
      CheckpointError: all checkpoints are damaged.
    """
    here = session.settings
    config = distributed.group().from_first(lambda: RunFolder(path).saved_config())
    if config is None:
        raise SettingsError(f"--init-from {path} holds no run: a run's folder has config.json. Give such a folder.")
    other = resolve_for(_settings(config), data)
    networks = [(s.model, own_of_model(s), config["dataset"] if s is other else data.name) for s in (other, here)]
    if networks[0] != networks[1]:
        there = " ".join([other.model, *(f"{flag(name)} {value}" for name, value in networks[0][1].items())])
        raise SettingsError(
            f"--init-from {path} is a run of --model {there} on {config['dataset']}; this run has another network or "
            "data set. Use these, or the folder of another run."
        )
    restored = _restore(path, _template(other, config["resolved_cuts"], session, data))
    if restored is None:
        raise SettingsError(f"--init-from {path} has no checkpoint yet. Wait for the first, or give another folder.")
    if restored.step >= here.steps:
        raise SettingsError(
            f"--init-from {path} has done {restored.step:,} steps, and this run is to end after {here.steps:,}. Ask "
            "for more with --steps or --epochs."
        )
    what = "weights, statistics and optimizer state"
    try:
        state = carry_over(restored.state, state)
    except DifferentStatesError:  # the networks are the same, so that the optimizers differ
        what = "weights and statistics (another optimizer)"
        key, batch = jax.random.key(here.seed), session.task.pipeline.train_batch(0)
        state = session.algorithm.init(key, batch, *fr.layer_params(restored.state))
    line = f"Going on from step {restored.step:,} of {path} (K = {other.K}): {what}; what is in flight starts empty."
    return state._replace(step=restored.step), line


def _settings(config: Mapping[str, Any]) -> TrainSettings:
    """The settings in a ``config.json``, without those of its machine."""
    names = {field.name for field in dataclasses.fields(TrainSettings)} & set(config)
    values: dict[str, Any] = {
        name: tuple(config[name]) if isinstance(config[name], list) else config[name] for name in names
    }
    values |= {"workdir": None, "data_dir": None, "text": None, "preset": None, "init_from": None, "devices": None}
    values |= {"resume": False, "overwrite": False, "data_parallel": 1, "tensorboard": False}
    return TrainSettings(**values)


def _template(other: Resolved, cuts: Sequence[int], session: Session, data: Data) -> Any:
    """A state of the other run, all of it on this process's first device."""
    # This run may have fewer devices than the other had; each layer is moved to its stage afterwards.
    placement = fr.placement(other.K, jax.local_devices()[:1])
    algorithm = make_algorithm(other, fr.partition(make_layers(other, data), cuts), placement, session.task)
    batch = session.task.pipeline.train_batch(0)
    like = lambda x: np.zeros((other.batch_size, *x.shape[1:]), x.dtype)
    return algorithm.init(jax.random.key(0), put(jax.tree.map(like, batch), placement[0]))


def _restore(path: Path, template: Any) -> Restored | None:
    """The newest sound checkpoint of the run in ``path``: what is carried over, where the template's arrays are."""
    # Process 0 alone reads the folder, but each process needs all layers to take those of its stages from.
    firsts = {device.process_index: device for device in reversed(jax.devices())}
    [placement] = fr.placement(1, [*firsts.values()], data_parallel=len(firsts))
    shared = {name: place(getattr(template, name), replicated(placement)) for name in _CARRIED}
    with Checkpoints(RunFolder(path).checkpoints) as checkpoints:
        restored = checkpoints.restore(template._replace(**shared), only=_CARRIED)
    if restored is None:
        return None
    read = {name: getattr(restored.state, name) for name in _CARRIED}
    mine = jax.tree.map(lambda array: array.addressable_data(0), read)
    return restored._replace(state=restored.state._replace(**mine))
