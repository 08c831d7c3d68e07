"""PyTorch's step of the same network, in a process of its own that takes turns with this one.

``python -m fr_jax.experiments.throughput.pytorch_peer MODEL DTYPE BATCH_SIZE MODE`` says ``{"ready": ..}`` when its
step is compiled, then reads numbers of steps from stdin, one per line, and answers each with a ``Turn`` as JSON.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

from fr_jax.experiments._bench.turns import ISSUED_FROM_REST, Turn
from fr_jax.experiments._fields import SettingsError
from fr_jax.experiments.throughput.pytorch_network import NETWORKS, network

__all__ = ["MODES", "Peer", "PeerError", "check_pytorch", "start"]

MODES = ("default", "reduce-overhead", "max-autotune", "eager")
"""Of ``torch.compile``, and without it. ``reduce-overhead`` issues CUDA graphs."""
WARM_UP = 4


class PeerError(RuntimeError):
    """PyTorch's process has ended; the message has its last words."""


def check_pytorch(models: tuple[str, ...]) -> None:
    """Raises SettingsError where PyTorch is missing, or a model that it is asked for."""
    if importlib.util.find_spec("torch") is None:
        raise SettingsError(
            "--pytorch needs PyTorch, which is not installed here. Install it (pip install 'fr_jax[pytorch]'), or "
            "leave it out with --pytorch none."
        )
    for model in models:
        if model not in NETWORKS:
            raise SettingsError(
                f"--models {model} is not written in PyTorch here; these are: {', '.join(NETWORKS)}. Choose among "
                "them, or leave PyTorch out with --pytorch none."
            )


class Peer(NamedTuple):
    """PyTorch's contestant.

    Attributes:
      name: in the table.
      process: of it.
      lines: what it has said and nobody has read yet; None is the end.
      about: what it says of itself: versions and device. Empty until :meth:`ready`.
    """

    name: str
    process: subprocess.Popen
    lines: queue.Queue[str | None]
    about: dict[str, Any]

    def ready(self, patience: float) -> Self:
        """Waits until its step is compiled, for so many seconds.

        Raises:
          PeerError: it failed, or is not ready by then.
        """
        return self._replace(about=self._answer(patience)["ready"])

    def take_turn(self, steps: int) -> tuple[Self, Turn]:
        """``steps`` steps, from its device at rest to its device at rest.

        Raises:
          PeerError: it failed.
        """
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{steps}\n")
            self.process.stdin.flush()
        except OSError:
            pass  # its answer says why
        return self, Turn(**self._answer())

    def end(self) -> None:
        """Ends it, also while it is still compiling."""
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()

    def _answer(self, patience: float | None = None) -> dict[str, Any]:
        deadline = None if patience is None else time.monotonic() + patience
        said = []
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                line = self.lines.get(timeout=left)
            except queue.Empty:
                raise PeerError(f"{self.name} was not ready in time") from None
            if line is None:
                self.lines.put(None)  # for whoever asks again
                code = self.process.wait()
                raise PeerError(f"{self.name} has ended with code {code}: {' | '.join(said[-5:]) or 'see above'}")
            if line.startswith("{"):
                return json.loads(line)
            said.append(line.rstrip())


def start(model: str, dtype: str, batch_size: int, mode: str) -> Peer:
    """Starts the process, which begins to compile, and does not wait for it."""
    name = "PyTorch, " + ("eager" if mode == "eager" else f"compiled ({mode})")
    return start_peer(name, ["-m", "fr_jax.experiments.throughput.pytorch_peer", model, dtype, str(batch_size), mode])


def start_peer(name: str, arguments: Sequence[str]) -> Peer:
    """Starts ``python ARGUMENTS``, which answers as :func:`main` does."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, *arguments], **pipes)
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    return Peer(name, process, lines, {})


def make_step(model: str, dtype: str, batch_size: int, mode: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """PyTorch's training step on random images, and a function that waits for its device.

    Channels last; float32 with TF32 matrix units where there are any, as in JAX, or autocast to bfloat16 with float32
    weights; SGD with momentum, fused on a GPU.
    """
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    module = network(model).to(device, memory_format=torch.channels_last).train()
    images = torch.randn(batch_size, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    targets = torch.randint(0, 10, (batch_size,), device=device)
    fused = {"fused": True} if device.type == "cuda" else {}
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9, **fused)

    def loss_of(images: Any, targets: Any) -> Any:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            outputs = module(images)
        return torch.nn.functional.cross_entropy(outputs.float(), targets)

    loss_fn = loss_of if mode == "eager" else torch.compile(loss_of, mode=mode)

    def step() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        optimizer.zero_grad(set_to_none=True)
        loss_fn(images, targets).backward()
        optimizer.step()

    return step, torch.cuda.synchronize if device.type == "cuda" else lambda: None


def take_turn(step: Callable[[], Any], wait: Callable[[], Any], steps: int) -> Turn:
    """``steps`` steps from rest to rest, measured as :meth:`.turns.Contestant.take_turn` does."""
    wait()
    start, busy, thread = time.perf_counter(), time.process_time(), time.thread_time()
    issued = (0.0, 0.0)
    for i in range(steps):
        step()
        if i < ISSUED_FROM_REST:
            issued = ((time.perf_counter() - start) / (i + 1), (time.thread_time() - thread) / (i + 1))
    wait()
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    return Turn(seconds / steps, *issued, busy / steps)


def main() -> None:
    """Compiles the step, and takes the turns that it is asked for until stdin ends."""
    model, dtype, batch_size, mode = sys.argv[1:]
    import torch

    step, wait = make_step(model, dtype, int(batch_size), mode)
    take_turn(step, wait, WARM_UP)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    about = {"torch": torch.__version__, "device": device, "cudnn": torch.backends.cudnn.version()}
    print(json.dumps({"ready": about}), flush=True)
    for line in sys.stdin:
        print(json.dumps(take_turn(step, wait, int(line))._asdict()), flush=True)


if __name__ == "__main__":
    main()
