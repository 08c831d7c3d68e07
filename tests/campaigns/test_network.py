"""Runs of two processes in two network namespaces, while the network between them fails.

Each fault once in the slow tests, with two cuts at random moments; more of these by
``FR_JAX_CUTS=40 pytest -n 0 -m slow -s tests/campaigns/test_network.py``. ``FR_JAX_SEED`` draws other moments.

The namespaces meet in this process, which carries every packet from one to the other, or does not: then neither
kernel knows that the link is cut, as if a cable far away was. So it needs root, ``ip`` and ``/dev/net/tun``, but no
kernel with ``tc netem``.
"""

import collections
import contextlib
import fcntl
import functools
import json
import os
import random
import re
import select
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CUTS, SEED = int(os.environ.get("FR_JAX_CUTS", "2")), int(os.environ.get("FR_JAX_SEED", "0"))
HEARTBEAT, JOIN = 5, 30
"""Seconds: of ``--heartbeat``, and in which the processes must find each other."""
STEPS, INTERVAL = 240, 40
LIMIT = 600
"""Seconds after which a run counts as one that hangs."""
PORT = 8476
HOSTS = "10.199.0.1", "10.199.0.2"
# As python -m fr_jax.experiments.mnist, which waits five minutes for a process that does not come.
SOONER = "import sys; from fr_jax import distributed; from fr_jax.experiments import mnist; "
SOONER += f"distributed.initialize.__kwdefaults__['join_seconds'] = {JOIN}; sys.exit(mnist.main())"
PROGRAM = ["-c", SOONER, "--dataset", "digits", "--depth", "4", "--width", "16", "--batch-size", "16"]
PROGRAM += ["--steps", STEPS, "--checkpoint-every", INTERVAL, "--eval-every", 100, "--log-every", 2]
PROGRAM += ["--heartbeat", HEARTBEAT]
RUNS = {
    "features replay": ["--method", "fr", "--K", "2", "--microbatches", "2", "--optimizer", "adamw"],
    "one stage in both": ["--method", "bp", "--K", "1", "--data-parallel", "2", "--shard-params"],
}


class Link:
    """Two network namespaces, and the packets between them.

    Attributes:
      is_cut: nothing passes.
      loss: the share of the packets that is lost.
      delay: seconds that each packet takes.
      rate: bytes per second, each way.
    """

    def __init__(self) -> None:
        self.is_cut, self.loss, self.delay, self.rate = False, 0.0, 0.0, float("inf")
        self.carried = self.lost = 0
        self.names = [f"frjax-{os.getpid()}-{i}" for i in range(2)]
        self._random, self._over = random.Random(SEED), threading.Event()
        self._ends = [os.open("/dev/net/tun", os.O_RDWR) for _ in range(2)]
        for name, end, host in zip(self.names, self._ends, HOSTS, strict=True):
            IFF_TUN, IFF_NO_PI, TUNSETIFF = 0x0001, 0x1000, 0x400454CA
            device = name.replace("-", "")
            fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH22x", device.encode(), IFF_TUN | IFF_NO_PI))
            ip("netns", "add", name)
            ip("link", "set", device, "netns", name)
            ip("-n", name, "link", "set", device, "name", "cable")
            ip("-n", name, "addr", "add", f"{host}/24", "dev", "cable")
            for one in ("lo", "cable"):
                ip("-n", name, "link", "set", one, "up")
        pairs = (self._ends, self._ends[::-1])
        self._threads = [threading.Thread(target=self._carry, args=pair, daemon=True) for pair in pairs]
        for thread in self._threads:
            thread.start()

    def _carry(self, source: int, sink: int) -> None:
        waiting: collections.deque[tuple[float, bytes]] = collections.deque()
        is_free = 0.0  # when the last packet of those that wait has passed the narrowest place
        while not self._over.is_set():
            seconds = min(max(waiting[0][0] - time.monotonic(), 0), 0.1) if waiting else 0.1
            if select.select([source], [], [], seconds)[0]:
                packet, now = os.read(source, 65536), time.monotonic()
                if self.is_cut or self._random.random() < self.loss:
                    self.lost += 1
                    continue
                is_free = max(is_free, now) + len(packet) / self.rate
                waiting.append((is_free + self.delay, packet))
            while waiting and waiting[0][0] <= time.monotonic():
                with contextlib.suppress(OSError):  # the other end is down
                    os.write(sink, waiting.popleft()[1])
                self.carried += 1

    def set_down(self, index: int) -> None:
        """Ends the interface of one process, whose kernel then knows it."""
        ip("-n", self.names[index], "link", "set", "cable", "down")

    def restore(self) -> None:
        self.is_cut, self.loss, self.delay, self.rate = False, 0.0, 0.0, float("inf")
        for name in self.names:
            ip("-n", name, "link", "set", "cable", "up")

    def close(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()
        for name, end in zip(self.names, self._ends, strict=True):
            os.close(end)
            ip("netns", "del", name)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def link() -> Iterator[Link]:
    if os.geteuid():
        pytest.skip("network namespaces need root")
    if shutil.which("ip") is None:
        pytest.skip("network namespaces need `ip` (apt-get install iproute2)")
    try:
        made = Link()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', error)}")
    yield made
    made.close()


class Pair:
    """Two processes of a program, each in its namespace; both see the folder of the run."""

    def __init__(self, link: Link, run: str, folder: Path, env: dict[str, str], *more: str) -> None:
        self.folder, self.begun = folder, time.monotonic()
        self.logs = [folder.with_name(f"{folder.name}-{i}.log") for i in range(2)]
        self.processes = []
        for i, (name, log) in enumerate(zip(link.names, self.logs, strict=True)):
            group = ["--coordinator", f"{HOSTS[0]}:{PORT}", "--num-processes", 2, "--process-id", i]
            words = [*PROGRAM, *RUNS[run], *group, *(["--workdir", folder] if i == 0 else []), *more]
            command = ["ip", "netns", "exec", name, sys.executable, *map(str, words)]
            with open(log, "w") as out:
                self.processes.append(subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT))

    def wait_for(self, happens: Callable[[], bool]) -> None:
        while not happens() and None in [one.poll() for one in self.processes]:
            assert time.monotonic() - self.begun < LIMIT, self.said()
            time.sleep(0.02)

    def ends(self, begun: float | None = None) -> tuple[list[int], list[float]]:
        """The exit codes, and after how many seconds from ``begun``, or from now, each ended."""
        begun = time.monotonic() if begun is None else begun
        seconds = [0.0, 0.0]
        while None in [one.poll() for one in self.processes]:
            now = time.monotonic() - begun
            seconds = [now if one.poll() is None else s for one, s in zip(self.processes, seconds, strict=True)]
            if now > LIMIT:
                self.kill()
                pytest.fail(f"hangs: {self.said()}")
            time.sleep(0.05)
        return [one.returncode for one in self.processes], [round(s, 1) for s in seconds]

    def kill(self) -> None:
        for one in self.processes:
            one.kill()
            one.wait()

    def said(self) -> list[str]:
        return [log.read_text(errors="replace") for log in self.logs]


def last_row(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def starts(pair: Pair) -> bool:
    return "processes; one that dies" in pair.said()[0]


def trains(pair: Pair) -> bool:
    return last_row(pair.folder) > INTERVAL + 5


def saves(pair: Pair) -> bool:
    """The second checkpoint is being written, which takes a few hundredths of a second or more."""
    folder = pair.folder / "checkpoints"
    return folder.is_dir() and any(str(2 * INTERVAL) in one.name for one in folder.iterdir())


def draws(pair: Pair) -> bool:
    """The training is over; process 1 waits for process 0."""
    return last_row(pair.folder) == STEPS


def cut(link: Link) -> None:
    link.is_cut = True


def down_at_0(link: Link) -> None:
    link.set_down(0)


def down_at_1(link: Link) -> None:
    link.set_down(1)


BAD: list[tuple[str, dict[str, float]]] = [
    ("features replay", {"delay": 0.02}),
    ("features replay", {"rate": 1e5}),
    ("features replay", {"loss": 0.05}),
    ("one stage in both", {"delay": 0.002}),  # its collectives cross the link many times in a step
    ("one stage in both", {"rate": 1e6}),
    ("one stage in both", {"loss": 0.005}),
]


def one_fault(
    link: Link,
    place: Path,
    env: dict[str, str],
    checksums: Callable[[Path], dict[str, Any]],
    name: str,
    run: str,
    when: Callable[[Pair], bool],
    what: Callable[[Link], None],
    seconds: float = float("inf"),
) -> dict[str, Any]:
    """What a run comes to, of which something happens to the network; if it ends, it is resumed on a whole one."""
    folder, whole = place / f"{run} {name}", place / f"{run} whole"
    if not whole.exists():
        pair = Pair(link, run, whole, env)
        assert pair.ends()[0] == [0, 0], pair.said()
    pair = Pair(link, run, folder, env)
    try:
        pair.wait_for(lambda: when(pair))
        row, begun = last_row(folder), time.monotonic()
        what(link)
        if seconds < float("inf"):
            time.sleep(seconds)
            link.restore()
        codes, lasted = pair.ends(begun)
    finally:
        pair.kill()
        link.restore()
    said = pair.said()
    resumed, after, finished = codes != [0, 0], None, codes == [0, 0]
    if resumed:
        again = ["--resume"] if (folder / "config.json").exists() else []
        second = Pair(link, run, folder, env, *again)
        ended, _ = second.ends()
        out = second.said()[0]
        finished = "is finished" in out
        assert ended == [0, 0], second.said()
        step = re.search(r"after step ([\d,]+)", out)
        after = int(step[1]) if step else STEPS if finished else 0
    return {
        "run": run,
        "when": when.__name__,
        "what": what.__name__,
        "for": seconds,
        "row": row,
        "codes": codes,
        "seconds": lasted,
        "lines": [next((line for line in reversed(text.splitlines()) if "fr_jax: " in line), "") for text in said],
        "raw": ["Traceback" in text for text in said],
        "resumed": resumed,
        "resumed_after": after,
        "finished": finished,
        "identical": checksums(folder) == checksums(whole),
    }


def check(row: dict[str, Any]) -> None:
    print(json.dumps(row), flush=True)
    if path := os.environ.get("FR_JAX_CUTS_LOG"):
        with open(path, "a") as file:
            file.write(json.dumps(row) + "\n")
    assert row["identical"], row
    assert not any(row["raw"]), row
    assert all(code == 0 or line for code, line in zip(row["codes"], row["lines"], strict=True)), row
    if row["resumed"]:
        assert row["resumed_after"] >= row["row"] - INTERVAL, row
        assert row["codes"][0] or row["finished"], row


@pytest.fixture
def fault(link, place, program_env, checksums) -> Callable[..., dict[str, Any]]:
    return functools.partial(one_fault, link, place, program_env, checksums)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("network")


@pytest.mark.slow
@pytest.mark.timeout(3 * LIMIT)
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(("when", "what"), [(trains, cut), (saves, cut), (trains, down_at_0), (trains, down_at_1)])
def test_cut_for_ever(fault, run, when, what):
    """Both processes end by themselves, soon, and say why."""
    row = fault(f"{when.__name__} {what.__name__}", run, when, what)
    check(row)
    assert max(row["seconds"]) < 2 * HEARTBEAT + 10, row  # more than the heartbeat on a loaded machine


@pytest.mark.slow
@pytest.mark.timeout(3 * LIMIT)
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("seconds", [0.5, 2, 4, 8])
def test_cut_and_restored(fault, run, seconds):
    """It goes on, or ends with a line."""
    check(fault(f"cut for {seconds}", run, trains, cut, seconds))


@pytest.mark.slow
@pytest.mark.timeout(3 * LIMIT)
@pytest.mark.parametrize(("run", "bad"), BAD)
def test_a_bad_link(fault, run, bad):
    """The same bits, only later."""

    def what(link: Link) -> None:
        vars(link).update(bad)

    what.__name__ = " ".join(f"{name} {value:g}" for name, value in bad.items())
    row = fault(what.__name__, run, starts, what)
    check(row)
    assert not row["resumed"], row


@pytest.mark.slow
@pytest.mark.timeout(3 * LIMIT)
def test_cut_before_the_start(link, place, program_env):
    cut(link)
    try:
        codes, seconds = (pair := Pair(link, "features replay", place / "early", program_env)).ends()
    finally:
        link.restore()
    zero, one = pair.said()
    assert codes == [2, 2] and max(seconds) < JOIN + 60, (codes, seconds)
    assert "process 1 of 2 did not come to 10.199.0.1:8476 within 30 s" in zero
    assert "no process 0 admitted it at 10.199.0.1:8476 within 30 s (timed out)" in one
    assert "Traceback" not in zero + one and not (place / "early").exists()


@pytest.mark.slow
@pytest.mark.timeout(3 * LIMIT)
@pytest.mark.parametrize("when", [starts, draws])
def test_cut_at_the_edges(fault, when):
    check(fault(f"edge {when.__name__}", "features replay", when, cut))


@pytest.mark.slow
@pytest.mark.timeout(400 * CUTS + 600)
def test_cut_at_random_moments(fault):
    for i in range(CUTS):
        rng = random.Random(f"{SEED} {i}")
        run, what = rng.choice(list(RUNS)), rng.choice([cut, down_at_0, down_at_1])
        step, late = rng.randrange(STEPS), rng.uniform(0, 0.5)
        early = rng.uniform(0, 15) if rng.random() < 0.3 else LIMIT

        def at_random(pair: Pair, step=step, late=late, early=early) -> bool:
            if time.monotonic() - pair.begun < early and last_row(pair.folder) < step:
                return False
            time.sleep(late)
            return True

        seconds = rng.choice([float("inf"), rng.uniform(0, 2 * HEARTBEAT)])
        check(fault(f"random {i}", run, at_random, what, seconds))
