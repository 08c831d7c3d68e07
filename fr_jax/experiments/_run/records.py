"""What a run says about itself: ``config.json`` at its start, ``summary.json`` at its end."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import jax

from fr_jax.diagnostics.memory.step_memory import device_peaks
from fr_jax.experiments._cli.settings import as_json
from fr_jax.experiments._run.session import Session
from fr_jax.training.loop import Outcome

__all__ = ["make_config", "make_summary"]


def make_config(session: Session) -> dict[str, Any]:
    """What ``config.json`` holds: the settings, and what they came to."""
    packages = ("fr_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return as_json(session.settings) | {
        "data_source": session.task.source,
        "data_checksum": session.task.checksum,
        "headline": session.task.headline._asdict(),
        "resolved_cuts": list(session.cuts),
        "steps_per_epoch": session.task.pipeline.steps_per_epoch,
        "devices_used": [str(device) for sharding in session.placement for device in sharding.device_set],
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def make_summary(session: Session, outcome: Outcome, sample: str | None = None) -> dict[str, Any]:
    """What ``summary.json`` holds; ``sample`` is what the task shows of a trained network."""
    s, t, headline = session.settings, outcome.totals, session.task.headline.name
    # A set: stages may share devices.
    devices = {device for sharding in session.placement for device in sharding.device_set}
    return {
        "dataset": session.task.dataset,
        "data_source": session.task.source,
        "model": s.model,
        "method": s.method,
        "K": s.K,
        "cuts": list(session.cuts),
        "seed": s.seed,
        "steps": outcome.step,
        **dict.fromkeys(("test_loss", f"test_{headline}", f"best_test_{headline}")),
        **t.scores,
        "seconds": round(t.seconds, 3),
        "step_seconds_median": outcome.step_seconds_median,
        "device": f"{len(devices)} x {jax.devices()[0].device_kind}",
        **_peaks(devices),
        "diverged": outcome.divergence is not None,
        **({} if sample is None else {"sample": sample}),
    }


def _peaks(devices: set[jax.Device]) -> dict[str, dict[str, int]]:
    """The most bytes in use on each device of this process since it started, where the device counts (a GPU does)."""
    found = device_peaks(devices & set(jax.local_devices()))
    counted = {name: peak for name, peak in sorted(found.items()) if peak is not None}
    return {"device_peak_bytes": counted} if counted else {}
