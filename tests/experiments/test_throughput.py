import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fr_jax as fr
from fr_jax.experiments._bench.turns import Turn
from fr_jax.experiments.throughput import __main__ as throughput
from fr_jax.experiments.throughput import pytorch_peer
from fr_jax.experiments.throughput.pytorch_network import NETWORKS, copy_weights, network

SMALL = "--models mlp --dtypes float32 --K 2 --batch-size 8 --rounds 3 --steps 2".split()  # noqa: SIM905


def test_methods_on_one_device_beside_a_plain_step(tmp_path, capsys):
    output = tmp_path / "new" / "throughput.json"
    given = [*SMALL, "--methods", "bp", "fr", "ddg", "--pytorch", "none", "--output", str(output)]
    assert throughput.main(given) == 0
    result = json.loads(output.read_text())
    assert output.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    names = [throughput.PLAIN, "back-propagation", "features replay, K = 2 on it", "DDG, K = 2 on it"]
    rows = result["results"]
    assert [row["contestant"] for row in rows] == names
    for row in rows:
        assert len(row["rounds"]) == 3 and 0 < row["seconds_min"] <= row["seconds_median"] <= row["seconds_max"]
        assert row["images_per_s"] == pytest.approx(8 / row["seconds_median"])
        assert row["times_plain"] == pytest.approx(rows[0]["seconds_median"] / row["seconds_median"])
    # Features replay does module 1's forward pass twice: between a sixth and a third more than back-propagation.
    work = [row["operations"] for row in rows]
    assert work[:2] == [1, 1] and 7 / 6 < work[2] < 4 / 3 and work[3] == 1
    printed = capsys.readouterr().out
    assert "mlp, float32, features replay, K = 2 on it" in printed and "images/s" in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--models", "resnet21"], "--models resnet21 is unknown"),
        (["--dtypes", "float16"], "--dtypes float16 is unknown"),
        (["--methods", "sgd"], "--methods sgd is unknown"),
        (["--pytorch", "fast"], "--pytorch fast is unknown"),
        (["--models", "mlp", "mlp"], "--models mlp mlp: give one or more, each once"),
        (["--dtypes"], "--dtypes : give one or more, each once"),
        (["--rounds", "0"], "--rounds 0 is out of range"),
        (["--methods", "gpipe", "--microbatches", "3"], "cannot be split into --microbatches 3 equal parts"),
        ([*SMALL, "--pytorch", "none", "--K", "7"], "K = 7 stages were asked of"),
    ],
)
def test_bad_arguments_are_one_message(arguments, said, capsys):
    assert throughput.main(arguments) == 2
    assert said in capsys.readouterr().err


def test_says_what_to_do_without_pytorch(monkeypatch, capsys):
    monkeypatch.setattr(pytorch_peer.importlib.util, "find_spec", lambda name: None)
    assert throughput.main(SMALL) == 2
    assert "pip install 'fr_jax[pytorch]'), or leave it out with --pytorch none" in capsys.readouterr().err


def test_knows_which_networks_are_written_in_pytorch(monkeypatch, capsys):
    monkeypatch.setattr(pytorch_peer.importlib.util, "find_spec", lambda name: True)
    assert throughput.main(SMALL) == 2
    assert "--models mlp is not written in PyTorch here; these are: resnet8" in capsys.readouterr().err
    assert set(NETWORKS) <= set(fr.models.MODELS)


def peer(program: str) -> pytorch_peer.Peer:
    return pytorch_peer.start_peer("PyTorch", ["-c", program])


def test_a_peer_takes_turns_in_its_own_process():
    program = (
        "import json, sys\n"
        "print('a library says hello')\n"
        "print(json.dumps({'ready': {'torch': '2'}}), flush=True)\n"
        "for line in sys.stdin:\n"
        "    print(json.dumps(dict(seconds=int(line), host=2.0, host_cpu=3.0, busy=4.0)), flush=True)\n"
    )
    one = peer(program).ready(60)
    assert one.about == {"torch": "2"}
    assert [one.take_turn(steps)[1] for steps in (5, 7)] == [Turn(5, 2.0, 3.0, 4.0), Turn(7, 2.0, 3.0, 4.0)]
    one.end()
    assert one.process.poll() is not None


def test_a_peer_that_dies_is_an_error_with_its_last_words():
    one = peer("import sys; print('out of memory'); sys.exit(3)")
    with pytest.raises(pytorch_peer.PeerError, match="PyTorch has ended with code 3: out of memory"):
        one.ready(60)
    with pytest.raises(pytorch_peer.PeerError, match="has ended with code 3"):
        one.take_turn(1)
    one.end()


def test_a_peer_that_takes_too_long_is_given_up():
    one = peer("import time; time.sleep(100)")
    with pytest.raises(pytorch_peer.PeerError, match="was not ready in time"):
        one.ready(0.5)
    one.end()


def test_a_peer_that_was_ready_before_the_deadline_is_not_late():
    one = peer("print('{\"ready\": {}}', flush=True); input()")
    while one.lines.empty():
        time.sleep(0.01)
    assert one.ready(-5.0).about == {}
    one.end()


@pytest.mark.parametrize("name", ["resnet8", "resnet18"])
def test_the_network_in_pytorch_is_the_same(name):
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).standard_normal((4, 32, 32, 3)).astype(np.float32)
    h, params = jnp.asarray(x), []
    for i, layer in enumerate(fr.models.MODELS[name]()):
        layer_params, state = layer.init(jax.random.key(i), h)
        h, _ = layer.apply(layer_params, state, h, train=True)
        params.append(layer_params)
    module = network(name)
    copy_weights(params, module)
    assert sum(p.numel() for p in module.parameters()) == sum(p.size for p in jax.tree.leaves(params))
    with torch.no_grad():
        outputs = module.train()(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))
    np.testing.assert_allclose(outputs.numpy(), h, rtol=2e-3, atol=2e-4)


@pytest.mark.slow
def test_beside_pytorch(tmp_path):
    pytest.importorskip("torch")
    output = tmp_path / "throughput.json"
    arguments = "--models resnet8 --dtypes float32 bfloat16 --K 2 --batch-size 4 --rounds 2 --steps 2".split()  # noqa: SIM905
    assert throughput.main([*arguments, "--methods", "fr", "--pytorch", "eager", "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert result["failures"] == {} and result["pytorch"]["device"] == "cpu"
    assert [row["contestant"] for row in result["results"]][2::3] == ["PyTorch, eager"] * 2
