"""Seconds and host memory of a checkpoint of 2 GB by two processes: through process 0, and by parts.

python -m fr_jax.launch --processes 2 --no-pin -- experiments/doors/checkpoint_2gb.py FOLDER gathered|parts
"""

import resource
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

import fr_jax as fr
from fr_jax import distributed
from fr_jax._placement import jit
from fr_jax.training.checkpoints import Checkpoints


def peak() -> float:
    """GB of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main(folder: str, how: str) -> None:
    """Saves and restores, and prints what that took."""
    make = lambda k: {f"w{i}": jnp.full((1024, 31250), float(i + 8 * k)) for i in range(8)}  # 8 x 128 MB
    state = {str(k): jit(lambda k=k: make(k), out_shardings=place)() for k, place in enumerate(fr.placement(2))}
    jax.block_until_ready(state)
    before = peak()
    with Checkpoints(Path(folder) / how) as checkpoints:
        if how == "gathered":
            checkpoints._seen = False  # as if not all processes saw the folder
        begin = time.perf_counter()
        checkpoints.save(1, state, {})
        saved, during = time.perf_counter() - begin, peak()
        begin = time.perf_counter()
        checkpoints.restore(state)
        restored = time.perf_counter() - begin
    print(
        f"{how}: process {distributed.group().index}: state {before:.2f} GB, peak when saving {during:.2f}, "
        f"restoring {peak():.2f}; save {saved:.1f} s, restore {restored:.1f} s",
        flush=True,
    )


if __name__ == "__main__":
    distributed.initialize()
    main(*sys.argv[1:])
