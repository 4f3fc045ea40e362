"""What a stretch of work costs in joules, by NVML's counter; nothing is ever set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(slots=True)
class Energy:
    """``joules`` is there once the block is left, unless ``reason`` says why not."""

    joules: float | None = None
    reason: str = ""

    def per(self, count: int) -> dict[str, object]:
        """For a record: joules in all and for each of ``count``."""
        if self.joules is None:
            return {"not_measured": self.reason}
        return {"joules": self.joules, "joules_per_token": self.joules / count}


@contextmanager
def measured(device: torch.device) -> Iterator[Energy]:
    """Counts while the block runs; the caller sees to it that the device has finished within it."""
    energy = Energy()
    try:
        read = _counter(device)
        before = read()
    except Exception as error:  # a driver without the counter, a machine without NVML: said, not raised
        energy.reason = f"{type(error).__name__}: {error}"
        yield energy
        return
    yield energy
    energy.joules = (read() - before) / 1e3


def _counter(device: torch.device) -> Callable[[], int]:
    """Reads millijoules since the driver was loaded."""
    if device.type != "cuda":
        raise RuntimeError(f"there is no counter for {device.type}")
    import pynvml

    pynvml.nvmlInit()
    uuid = torch.cuda.get_device_properties(device).uuid
    handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    return lambda: int(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle))
