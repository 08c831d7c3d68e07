"""Trains from a Grain loader, or from torch's DataLoader, with checkpoints: kill it, and start it again.

python experiments/doors/own_data.py FOLDER grain|torch [--steps 300] [--seconds-per-step 0.02]
"""

import argparse
import hashlib
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fr_jax as fr
from fr_jax.data import iterator_pipeline
from fr_jax.training.checkpoints import Checkpoints
from fr_jax.training.interrupt import StopRequest
from fr_jax.training.loop import Intervals, Totals, train
from fr_jax.training.task import Headline, Task


class Examples:
    """1,000 pairs; the targets are a fixed function of the inputs."""

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        x = np.random.default_rng(i).standard_normal(8).astype(np.float32)
        return x, np.sin(x.sum(keepdims=True))


def loader(kind: str):
    """Shuffled mini-batches of 32, epoch after epoch."""
    if kind == "grain":
        import grain

        return iter(grain.MapDataset.source(Examples()).seed(0).shuffle().repeat().batch(32).to_iter_dataset())
    import torch

    stack = lambda examples: tuple(np.stack(part) for part in zip(*examples, strict=True))
    options = {"batch_size": 32, "shuffle": True, "collate_fn": stack, "drop_last": True}
    options["generator"] = torch.Generator().manual_seed(0)
    return torch.utils.data.DataLoader(Examples(), **options)


def main(folder: Path, kind: str, steps: int, pause: float) -> None:
    """Trains from the newest checkpoint in the folder, if there is one, and prints a digest of the weights."""
    pipeline = iterator_pipeline(loader(kind), steps_per_epoch=31)
    loss = lambda y, z: jnp.mean((y - z) ** 2)
    evaluate = lambda predict, state: {"loss": 0.0, "error": 0.0}
    task = Task("own", kind, pipeline, loss, lambda *_: {}, evaluate, Headline("error"), "examples", 32, None)
    method = fr.features_replay(fr.models.mlp(num_classes=1, depth=3, width=64), loss, optax.adam(1e-3))
    state, totals = method.init(jax.random.key(0), pipeline.train_batch(0)), None
    with Checkpoints(folder) as checkpoints, StopRequest() as stop:
        if (found := checkpoints.restore(state)) is not None:
            state, totals = found.state, Totals.from_metadata(found.metadata)
            print(f"resuming after step {state.step}", flush=True)
        intervals = Intervals(steps=steps, log_every=10, eval_every=steps, checkpoint_every=25, ahead=4)
        slow = lambda state, info: time.sleep(pause)
        outcome = train(method, task, state, intervals, checkpoints=checkpoints, stop=stop, totals=totals, hooks=[slow])
    weights = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(outcome.state.params))
    print(f"{kind}: step {outcome.step}, weights {hashlib.sha256(weights).hexdigest()[:16]}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("kind", choices=("grain", "torch"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seconds-per-step", type=float, default=0.02)
    given = parser.parse_args()
    main(given.folder, given.kind, given.steps, given.seconds_per_step)
