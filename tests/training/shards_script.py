"""Run by test_shards.py as each of two processes: saves or restores a state that is spread over both."""

import json
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from fr_jax import distributed, placement
from fr_jax._arrays import place
from fr_jax._placement import replicated
from fr_jax.training.checkpoints import Checkpoints


def state_of(n: int) -> dict:
    _, second = placement(2)
    (both,) = placement(1, data_parallel=2)
    return {
        "a": place(n + np.arange(32, dtype=np.float32).reshape(8, 4), both),
        "b": place(np.float32(n) * np.arange(6, dtype=np.float32), second),
        "key": place(jax.random.key(n), replicated(both)),
        "n": n,
    }


def equal(state: dict, n: int) -> bool:
    """Whether this process's parts of the state are those of ``n``."""
    data = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    shards = lambda tree: [s.data for name in ("a", "b", "key") for s in data(tree[name]).addressable_shards]
    pairs = zip(shards(state), shards(state_of(n)), strict=True)
    return state["n"] == n and all(np.array_equal(x, y) for x, y in pairs)


def main(folder: Path, what: str, *how: str) -> dict:
    private = "private" in how and distributed.group().index > 0
    directory = Path(tempfile.mkdtemp()) if private else folder
    with Checkpoints(directory, keep=2) as checkpoints:
        if what == "save":
            for n in (4, 5) if "again" in how else (1, 2, 3):
                checkpoints.save(n, state_of(n), {"n": n})
            here = folder.glob(f"parts-3-*/{distributed.group().index}/*")
            return {"wrote": sorted(str(path.relative_to(folder)) for path in here if path.is_file())}
        restored = checkpoints.restore(state_of(0))
        return {"step": restored.step, "equal": equal(restored.state, restored.metadata["n"])}


if __name__ == "__main__":
    distributed.initialize(heartbeat_seconds=20)
    print(json.dumps(main(Path(sys.argv[1]), *sys.argv[2:])), flush=True)
