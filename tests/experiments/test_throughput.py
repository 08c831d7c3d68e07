import functools
import json
import os
import time

import pytest

import fr_jax as fr
from fr_jax.experiments._bench.pytorch_networks import NETWORKS
from fr_jax.experiments._bench.turns import Turn
from fr_jax.experiments.throughput import __main__ as throughput
from fr_jax.experiments.throughput import pytorch_peer
from fr_jax.experiments.throughput.pytorch_peer import Peer, PeerError

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
        (["--models", "mlp", "mlp"], "--models mlp mlp: give one or more distinct values"),
        (["--dtypes"], "--dtypes none: give one or more distinct values"),
        (["--rounds", "0"], "--rounds 0 is out of range"),
        (["--methods", "gpipe", "--microbatches", "3"], "cannot be split into the 3 equal parts of gpipe"),
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


def test_peers_in_their_own_processes():
    """In one test, since each takes seconds to start."""
    take_turn = functools.partial(Turn, host=2.0, host_cpu=3.0, busy=4.0)
    good = Peer("PyTorch", tuple, ({"torch": "2"}, take_turn))  # tuple(pair) is the pair
    broken = Peer("PyTorch", json.loads, "no JSON")
    dead = Peer("PyTorch", os._exit, 3)
    slow = Peer("PyTorch", time.sleep, 100)
    assert good._connection.poll(60)
    assert good.ready(-5.0).about == {"torch": "2"}  # ready before the deadline, asked after it
    assert [good.take_turn(steps)[1] for steps in (5, 7)] == [Turn(5, 2.0, 3.0, 4.0), Turn(7, 2.0, 3.0, 4.0)]
    with pytest.raises(PeerError, match=r"PyTorch failed: .*JSONDecodeError: Expecting value"):
        broken.ready(60)
    for wait in (lambda: dead.ready(60), lambda: dead.take_turn(1)):
        with pytest.raises(PeerError, match="PyTorch has ended with code 3"):
            wait()
    with pytest.raises(PeerError, match="was not ready in time"):
        slow.ready(0.1)
    for one in (good, broken, dead, slow):
        one.end()
        assert not one.process.is_alive()


@pytest.mark.slow
def test_beside_pytorch(tmp_path):
    pytest.importorskip("torch")
    output = tmp_path / "throughput.json"
    arguments = "--models resnet8 --dtypes float32 bfloat16 --K 2 --batch-size 4 --rounds 2 --steps 2".split()  # noqa: SIM905
    assert throughput.main([*arguments, "--methods", "fr", "--pytorch", "eager", "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert result["failures"] == {} and result["pytorch"]["device"] == "cpu"
    assert [row["contestant"] for row in result["results"]][2::3] == ["PyTorch, eager"] * 2
