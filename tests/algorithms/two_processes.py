"""Run by test_processes.py, once a process: python two_processes.py [PROCESS_ID COORDINATOR TRANSFER_PORT]."""

import json
import sys

import jax

if sys.argv[1:]:
    process_id, coordinator, port = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_cross_host_transfer_socket_address", f"127.0.0.1:{port}")
    jax.config.update("jax_cross_host_transport_addresses", ",".join(["127.0.0.1:0"] * 4))
    jax.distributed.initialize(coordinator, 2, process_id)
else:
    jax.config.update("jax_num_cpu_devices", 2)

import numpy as np
import optax

import fr_jax as fr
from fr_jax.placement import place


def loss_fn(outputs, targets):
    return optax.softmax_cross_entropy_with_integer_labels(outputs, targets).mean()


placement = fr.placement(4)
rng = np.random.default_rng(0)
batches = []
for _ in range(8):
    inputs = rng.standard_normal((16, 20)).astype(np.float32)
    targets = rng.integers(0, 10, 16).astype(np.int32)
    batches.append(fr.Batch(place(inputs, placement[0]), place(targets, placement[-1])))


def run(method):
    """What this process can see of the end of a run, bit by bit."""
    stages = fr.partition(fr.models.mlp(depth=4, width=16, dropout_rate=0.2), (1, 2, 3))
    algorithm = method(stages, loss_fn, optax.adam(0.01), placement=placement, donate=True)
    state = algorithm.init(jax.random.key(0), batches[0])
    for batch in batches:
        state, info = algorithm.step(state, batch)
    seen = {"loss": info.loss} | {f"params {k}": params for k, params in enumerate(state.params)}
    return {
        name: [np.asarray(leaf).tobytes().hex() for leaf in jax.tree.leaves(part)]
        for name, part in seen.items()
        if jax.tree.leaves(part)[0].is_fully_addressable
    }


print(json.dumps({"fr": run(fr.features_replay), "bp": run(fr.backprop)}))
