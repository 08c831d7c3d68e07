"""PyTorch's step of the same network, in a process of its own that takes turns with this one."""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Self

from fr_jax.experiments._bench.pytorch_networks import NETWORKS, network
from fr_jax.experiments._bench.turns import ISSUED_FROM_REST, Turn
from fr_jax.experiments._fields import SettingsError

__all__ = ["MODES", "Peer", "PeerError", "check_pytorch", "start"]

MODES = ("default", "reduce-overhead", "max-autotune", "eager")
"""Of ``torch.compile``, and without it. ``reduce-overhead`` issues CUDA graphs."""
WARM_UP = 4  # steps: with CUDA graphs the first compiles and the second records


class PeerError(RuntimeError):
    """PyTorch's process has failed or ended; the message has its last words."""


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


class Peer:
    """A contestant in a process of its own, which begins to compile at once.

    Args:
      name: in the table.
      make: called there: ``make(*arguments) -> (about, take_turn)``, its versions and device, and
        ``take_turn(steps) -> Turn``. It and its arguments must be picklable.

    Attributes:
      about: versions and device; empty until :meth:`ready`.
    """

    def __init__(self, name: str, make: Callable[..., Any], *arguments: Any) -> None:
        # A forked process would share this one's threads of XLA, and their locks.
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self.name, self.about = name, {}
        self.process = context.Process(target=serve, args=(theirs, make, *arguments), daemon=True)
        self.process.start()
        theirs.close()  # so that its end is seen here

    def ready(self, patience: float) -> Self:
        """Waits until its step is compiled, for so many seconds.

        Raises:
          PeerError: it failed, or is not ready by then.
        """
        self.about = self._answer(max(0.0, patience))
        return self

    def take_turn(self, steps: int) -> tuple[Self, Turn]:
        """``steps`` steps, from its device at rest to its device at rest.

        Raises:
          PeerError: it failed.
        """
        with contextlib.suppress(OSError):  # its answer says why
            self._connection.send(steps)
        return self, self._answer(None)

    def end(self) -> None:
        """Ends it, also while it is still compiling."""
        self.process.kill()
        self.process.join()
        self._connection.close()

    def _answer(self, patience: float | None) -> Any:
        try:
            if not self._connection.poll(patience):
                raise PeerError(f"{self.name} was not ready in time")
            answer = self._connection.recv()
        except (EOFError, OSError):
            self.process.join()
            raise PeerError(f"{self.name} has ended with code {self.process.exitcode}; see above") from None
        if isinstance(answer, Exception):
            raise PeerError(f"{self.name} failed: {answer!r}") from answer
        return answer


def serve(connection: Connection, make: Callable[..., Any], *arguments: Any) -> None:
    """The process of a :class:`Peer`: takes the turns that it is asked for until the other end is closed."""
    try:
        about, take_turn = make(*arguments)
        connection.send(about)
        while True:
            connection.send(take_turn(connection.recv()))
    except EOFError:
        pass
    except Exception as error:
        connection.send(RuntimeError(f"{type(error).__name__}: {error}"))
        raise


def start(model: str, dtype: str, batch_size: int, mode: str) -> Peer:
    """Starts PyTorch's process, and does not wait for it."""
    name = "PyTorch, " + ("eager" if mode == "eager" else f"compiled ({mode})")
    return Peer(name, make_contestant, model, dtype, batch_size, mode)


def make_contestant(model: str, dtype: str, batch_size: int, mode: str) -> tuple[dict[str, Any], Callable[[int], Turn]]:
    """PyTorch's training step, compiled."""
    import torch

    step, wait = make_step(model, dtype, batch_size, mode)
    take_turn(step, wait, WARM_UP)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    about = {"torch": torch.__version__, "device": device, "cudnn": torch.backends.cudnn.version()}
    return about, lambda steps: take_turn(step, wait, steps)


def make_step(model: str, dtype: str, batch_size: int, mode: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """PyTorch's training step on random images, and a function that waits for its device.

    Channels last; float32 with TF32 matrix units where there are any, as in JAX, or autocast to bfloat16 with float32
    weights; SGD with momentum, fused on a GPU.
    """
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    # As JAX does: cuDNN's algorithms are chosen by trial, and TF32 is allowed.
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
        # CUDA graphs may then overwrite the outputs of the step before.
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
