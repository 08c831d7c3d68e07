"""What a result says of where, when and with what it was measured."""

from __future__ import annotations

import dataclasses
import datetime
import importlib
import json
import os
import platform
from typing import Any

__all__ = ["machine", "settings_of"]


def machine(package: str = "jax") -> dict[str, Any]:
    """Processor and device, date, versions, and the environment's settings that change speed.

    Args:
      package: what computed; only ``jax`` is asked for its device.
    """
    environment = {name: os.environ[name] for name in ("GLIBC_TUNABLES", "NPROC", "XLA_FLAGS") if name in os.environ}
    loaded = importlib.import_module(package)
    device = f", {loaded.devices()[0].device_kind}" if package == "jax" else ""
    return {
        "machine": f"{os.cpu_count()} x {_processor()}{device}",
        "date": datetime.date.today().isoformat(),
        package: loaded.__version__,
        "python": platform.python_version(),
        "environment": environment,
    }


def _processor() -> str:
    """Its name where the system tells it: ``platform`` says no more than x86_64 on Linux."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return (names or [platform.processor() or platform.machine()])[0]


def settings_of(settings: Any, *leave_out: str) -> dict[str, Any]:
    """A program's settings as a result holds them: without where it goes, and without those of ``leave_out``."""
    plain = dataclasses.asdict(settings)
    kept = {name: value for name, value in plain.items() if name not in ("output", "overwrite", *leave_out)}
    return json.loads(json.dumps(kept, default=str))
