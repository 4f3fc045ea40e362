"""What a rank's memory is used for, measured where it runs."""

from __future__ import annotations

import logging
from pathlib import Path

import psutil
import torch

from moestro.workers.memory_plan import MemoryPlan
from moestro.workers.model.decoder import Decoder

log = logging.getLogger(__name__)

HEADROOM = 0.1  # of the limit, for what steps need while they are computed
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def most_slots(model: Decoder, device: torch.device, cache_bytes: int, limit: int, sharers: int) -> int:
    """Experts of a layer that this rank has memory for, in every mixture layer; to be asked when its share of the
    weights is read and before its cache of ``cache_bytes`` is written to. What it has read already fits, whatever the
    plan says. ``limit``: bytes it may use in all; 0: of its device, or of a host that ``sharers`` ranks share."""
    banks = model.banks.values()
    slot = sum(bank.experts.shape.num_bytes for bank in banks)
    read = sum(len(bank.held) * bank.experts.shape.num_bytes for bank in banks)
    limit = limit or _there_is(device) // (1 if device.type == "cuda" else sharers)
    plan = MemoryPlan(int(limit * (1 - HEADROOM)), _used(device) - read + cache_bytes, slot)
    most = max([plan.slots, *(len(bank.held) for bank in banks)])
    log.info("memory: %d bytes, %d of them for other than experts, %d for each expert", limit, plan.fixed, plan.slot)
    return most


def _there_is(device: torch.device) -> int:
    """Bytes of a device's memory, or of the host's as far as this container may use it (cgroup v2)."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    total: int = psutil.virtual_memory().total
    limit = _CGROUP_LIMIT.read_text().strip() if _CGROUP_LIMIT.is_file() else "max"
    return total if limit == "max" else min(total, int(limit))


def _used(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    resident: int = psutil.Process().memory_info().rss
    return resident
