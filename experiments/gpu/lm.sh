#!/usr/bin/env bash
# For one GPU, at most nine minutes: does features replay of a language model pay where all stages share a device?
#   1. GPT of 128 M parameters (--preset gpt2), bfloat16: tokens/s, and the training loss after equal time, of
#      back-propagation and of features replay and DDG with K = 8, M = 8 and predicted weights, all stages on the GPU;
#      compilation not counted.
#   2. Seconds and host seconds of a step without prediction, and of the same step jitted as a whole, which the host
#      issues at once.
# From the repository's root, with fr_jax installed:   bash experiments/gpu/lm.sh [FOLDER]
# SMALL=1 runs the same on a CPU in minutes, to test this script.
set -euo pipefail
out=${1:-lm-gpu}
[[ ! -e $out ]] || { echo "lm.sh: $out exists; give another folder" >&2; exit 2; }
mkdir -p "$out"
if [[ ${SMALL:-0} == 1 ]]; then
  model="--preset lm --depth 8 --width 32 --context 32 --batch-size 8 --test-examples 16 --sample-bytes 0 --warmup 5"
  each=20 most=400 all=1800  # seconds of training of each run, with its compilation, and of everything
else
  model="--preset gpt2 --dataset python --test-examples 64 --sample-bytes 0"
  each=60 most=140 all=540
fi

for run in "bp --K 1 --microbatches 1" "fr --K 8 --microbatches 8" "ddg --K 8 --microbatches 8"; do
  method=${run%% *}
  # --steps is more than fits: SIGTERM, so long after the first row, ends the run, which keeps its rows.
  timeout -k 20 "$most" python -m fr_jax.experiments.lm --method $run $model --devices 1 --steps 100000 \
    --schedule constant --log-every 5 --eval-every 100000 --checkpoint-every 100000 --workdir "$out/$method" \
    >"$out/$method.log" 2>&1 &
  until [[ -s $out/$method/metrics.jsonl ]] || ! kill -0 $! 2>/dev/null; do sleep 1; done
  for ((second = 0; second < each; second++)); do kill -0 $! 2>/dev/null && sleep 1; done
  kill -TERM $! 2>/dev/null || true
  wait $! || [[ $? == 143 || $? == 124 ]] || { tail -5 "$out/$method.log"; exit 1; }
  rm -rf "$out/$method/checkpoints"
done

OUT=$out timeout -k 5 $((all - SECONDS)) python - <<'PY' || { echo "lm.sh: ended with $? (124: the time was over)" >&2; exit 1; }
"""The table of part 1, then part 2."""
import json, os, pathlib, time

import jax, jax.numpy as jnp, numpy as np, optax
import fr_jax as fr

out, small = pathlib.Path(os.environ["OUT"]), os.environ.get("SMALL") == "1"
rows = {m: [json.loads(line) for line in (out / m / "metrics.jsonl").open()] for m in ("bp", "fr", "ddg")}
rows = {m: [row for row in own if "train_loss" in row] for m, own in rows.items()}
if short := [m for m, own in rows.items() if len(own) < 2]:
    raise SystemExit(f"lm.sh: {', '.join(short)} had no time to train in; see its log in {out}, and give each run more seconds.")
since = lambda own, row: row["seconds"] - own[0]["seconds"]  # the first row has the compilation
equal = min(since(own, own[-1]) for own in rows.values())
print(f"{'':28}{'tokens/s':>12}{f'loss after {equal:.0f} s':>20}{'updates':>10}")
for m, own in rows.items():
    there = [row for row in own if since(own, row) <= equal]
    speed = np.median([row["tokens_per_s"] for row in own[len(own) // 2 :]])
    loss = np.mean([row["train_loss"] for row in there[-4:]])
    print(f"{m:28}{speed:12,.0f}{loss:20.4f}{there[-1]['step']:10,}")


def cross_entropy(logits, targets):
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets).mean()


def timed(step, state, batch, steps):
    """Median seconds of a step, and those in which the host issues it from rest."""
    for _ in range(3):
        state, info = step(state, batch)
    jax.block_until_ready(state)
    whole, host = [], []
    for _ in range(5):
        start = time.perf_counter()
        state, info = step(state, batch)
        host.append(time.perf_counter() - start)
        for _ in range(steps - 1):
            state, info = step(state, batch)
        jax.block_until_ready(state)
        whole.append((time.perf_counter() - start) / steps)
    return np.median(whole), np.median(host), float(info.loss)


def cases():
    rng, dtype = np.random.default_rng(0), jnp.bfloat16
    depth, width, context, size = (8, 32, 32, 8) if small else (8, 512, 256, 32)
    text = rng.integers(0, 256, (size, context + 1)).astype(np.int32)
    gpt = fr.models.gpt(depth=depth, width=width, context=context, dtype=dtype)
    yield f"gpt, width {width}", gpt, fr.Batch(text[:, :-1], text[:, 1:]), 8, 8
    images = rng.standard_normal((8 if small else 128, 32, 32, 3)).astype(np.float32)
    labels = rng.integers(0, 10, len(images)).astype(np.int32)
    resnet = fr.models.MODELS["resnet8" if small else "resnet18"](dtype=dtype)
    yield "resnet8" if small else "resnet18", resnet, fr.Batch(images, labels), 4, 1


print(f"\n{'one device, ms':40}{'step':>10}{'host':>10}{'jitted':>10}{'host':>10}{'compile s':>12}")
for name, layers, batch, K, M in cases():
    batch, place = jax.device_put(batch, jax.devices()[0]), fr.placement(K, jax.devices()[:1])
    optimizer = optax.sgd(0.01, momentum=0.9)
    for title, make, stages, own in (
        ("back-propagation", fr.backprop, fr.partition(layers, ()), {"placement": place[:1]}),
        (f"features replay, K = {K}, M = {M}", fr.features_replay, None, {"placement": place, "microbatches": M}),
        (f"DDG, K = {K}, M = {M}", fr.ddg, None, {"placement": place, "microbatches": M}),
    ):
        method = {"features replay": "fr", "DDG": "ddg"}.get(title.split(",")[0], "fr")
        stages = stages or fr.cut(layers, K, batch.inputs, method=method)
        algorithm = make(stages, cross_entropy, optimizer, **own)
        state = algorithm.init(jax.random.key(0), batch)
        for _ in range(2 * K):  # from then on every step issues the same calls
            state, _ = algorithm.step(state, batch)
        number = state.step
        steady = lambda state, batch: algorithm.step(state._replace(step=number), batch)
        start = time.perf_counter()
        jitted = jax.jit(steady).lower(state, batch).compile()
        seconds = time.perf_counter() - start
        state = state._replace(step=number)
        one = timed(algorithm.step, state, batch, 10)
        two = timed(lambda state, batch: jitted(state._replace(step=number), batch), state, batch, 10)
        cells = (*(1000 * x for x in one[:2]), *(1000 * x for x in two[:2]))
        print(f"{f'{name}: {title}':40}" + "".join(f"{x:10.2f}" for x in cells) + f"{seconds:12.1f}", flush=True)
        assert np.isclose(one[2], two[2], rtol=0.05), "the jitted step has another loss"
PY
