"""Doing what a fault says to a process, and undoing what lasts."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress

import psutil
from benchmarks.chaos.plan import Fault, Kind
from benchmarks.chaos.system import NotNow, Role, System, Target

DUTY_S, PERIOD_S = 0.02, 0.1  # a slow rank runs so long in each period

_ROLES = {
    Kind.KILL_GATEWAY: Role.GATEWAY,
    Kind.KILL_SUPERVISOR: Role.SUPERVISOR,
    Kind.KILL_DIRECTORY: Role.DIRECTORY,
    Kind.KILL_HEAD: Role.HEAD,
}


async def inject(system: System, fault: Fault, struck: Callable[[str], None]) -> None:
    """Does it and, for a fault that lasts, waits and undoes it. ``struck`` is told whom it hit, the moment after.
    Raises NotPossible or NotNow with nothing done."""
    if fault.kind is Kind.FULL_DISK:
        with system.full_disk():
            struck("disk")
            await asyncio.sleep(fault.lasts_s)
        return
    targets = choose(fault, system.targets(_ROLES.get(fault.kind, Role.RANK)))
    name = ", ".join(target.name for target in targets)
    if fault.kind is Kind.PARTITION:
        with system.partitioned(targets[0]):
            struck(name)
            await asyncio.sleep(fault.lasts_s)
    elif fault.kind is Kind.STOP_RANK:
        send(targets, signal.SIGSTOP)
        struck(name)
        await asyncio.sleep(fault.lasts_s)
        send(targets, signal.SIGCONT)
    elif fault.kind is Kind.SLOW_RANK:
        struck(name)
        await _slow(targets, fault.lasts_s)
    else:
        send(targets, signal.SIGKILL)
        struck(name)


def ranks_lost(system: System, fault: Fault) -> int:
    """At most so many ranks are lost by it."""
    if fault.kind is Kind.FULL_DISK:
        return 0
    return system.ranks_lost_with(_ROLES.get(fault.kind, Role.RANK)) * _num_hit(fault)


def _num_hit(fault: Fault) -> int:
    return 2 if fault.kind is Kind.KILL_TWO_RANKS else 1


def choose(fault: Fault, among: Sequence[Target]) -> list[Target]:
    """Whom a fault hits. Raises NotNow when too few are there: one unit of ranks must be left, since of nothing nothing
    can be kept."""
    if fault.kind in _ROLES:
        if not among:
            raise NotNow("nobody is there")
        return [fault.choose(among)]
    hits = _num_hit(fault)
    first = among.index(fault.choose(among)) if among else 0
    chosen = [among[(first + offset) % len(among)] for offset in range(min(hits, len(among)))]
    units = {_unit(target) for target in among} - {_unit(target) for target in chosen}
    if len(set(chosen)) < hits or not units:
        raise NotNow(f"{len(among)} ranks are there")
    return chosen


def _unit(target: Target) -> str:
    return target.unit or target.name


def send(targets: Sequence[Target], number: signal.Signals) -> None:
    """To those that are still there."""
    for target in targets:
        with suppress(psutil.NoSuchProcess):
            psutil.Process(target.pid).send_signal(number)


async def _slow(targets: Sequence[Target], seconds: float) -> None:
    """Runs them ``DUTY_S`` of each ``PERIOD_S``."""
    loop = asyncio.get_running_loop()
    ends_s = loop.time() + seconds
    try:
        while loop.time() < ends_s:
            send(targets, signal.SIGSTOP)
            await asyncio.sleep(PERIOD_S - DUTY_S)
            send(targets, signal.SIGCONT)
            await asyncio.sleep(DUTY_S)
    finally:
        send(targets, signal.SIGCONT)
