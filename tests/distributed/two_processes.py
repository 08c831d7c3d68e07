"""Run by test_two_processes.py as each of two processes: moves arrays, then meets the other until one is lost."""

import json
import time

import jax
import numpy as np

from fr_jax import distributed, placement
from fr_jax._arrays import from_first, is_readable, place, put, read, to_first


def seen(array):
    """The value if this process holds it."""
    return read(array).tolist() if is_readable(array) else None


def moved():
    first, second = placement(2)
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    x = place(values, first)
    y = put(x, second)
    key = place(jax.random.key(7), second)
    collected = to_first({"x": x, "y": y + 1})
    back = from_first(collected["y"] if collected else None, like=y)
    return {
        "placed": seen(x),
        "put": seen(y),
        "key": seen(jax.random.key_data(key)),
        "to_first": {name: array.tolist() for name, array in collected.items()},
        "from_first": seen(back),
        "read": jax.tree.map(np.ndarray.tolist, distributed.read({"x": x, "y": y, "here": jax.process_index()})),
        "shown": f"{distributed.read(y.sum()):.4f}",
    }


if __name__ == "__main__":
    distributed.initialize(heartbeat_seconds=5)
    print(json.dumps(moved()), flush=True)
    while True:
        distributed.group().exchange(None)
        time.sleep(0.05)
