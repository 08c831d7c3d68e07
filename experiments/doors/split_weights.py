"""Memory of a device and seconds of a step with and without split weights: a GPT whose weights dominate, 2 x 4 devices.

taskset -c 0 python experiments/doors/split_weights.py
"""

import statistics
import time

import jax
import jax.numpy as jnp
import optax

import fr_jax as fr
from fr_jax.training.classification import cross_entropy

METHODS = {"back-propagation": fr.backprop, "features replay": fr.features_replay, "DDG": fr.ddg}
K, D, WINDOWS, CONTEXT, ROUNDS, STEPS = 2, 4, 8, 32, 5, 2


def held(tree) -> float:
    """MB of the device that holds most."""
    devices: dict[int, int] = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            devices[shard.device.id] = devices.get(shard.device.id, 0) + shard.data.nbytes
    return max(devices.values()) / 1e6


def main() -> None:
    """Prints a line for each method, with copied and with split weights."""
    jax.config.update("jax_num_cpu_devices", K * D)
    layers = fr.models.gpt(depth=8, width=512, heads=8, context=CONTEXT)
    text = jax.random.randint(jax.random.key(0), (WINDOWS, CONTEXT + 1), 0, 256)
    batch = fr.Batch(text[:, :-1], text[:, 1:])
    stages = fr.cut(layers, K, jax.ShapeDtypeStruct((WINDOWS, CONTEXT), jnp.int32), method="fr")
    entries = {}
    for name, make in METHODS.items():
        for split in (False, True):
            placement = fr.placement(K, data_parallel=D, shard_params=split)
            method = make(stages, cross_entropy, optax.adamw(1e-3), placement=placement, donate=True)
            state = method.init(jax.random.key(0), batch)
            for _ in range(K + 1):
                state, info = method.step(state, batch)
            megabytes = held((state.params, state.opt_state))
            print(f"{name}, split {split}: {megabytes:.1f} MB, loss {info.loss:.6f}", flush=True)
            entries[name, split] = [method, state, []]
    for _ in range(ROUNDS):
        for entry in entries.values():
            method, state, seconds = entry
            begin = time.perf_counter()
            for _ in range(STEPS):
                state, info = method.step(state, batch)
            jax.block_until_ready((state.params, info.loss))
            seconds.append((time.perf_counter() - begin) / STEPS)
            entry[1] = state
    for (name, split), (*_, seconds) in entries.items():
        print(f"{name}, split {split}: {statistics.median(seconds):.3f} s, {min(seconds):.3f} to {max(seconds):.3f}")


if __name__ == "__main__":
    main()
