"""Memory that runs short: the policy, the reader on made-up and on real files, and the watch between them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.cluster.memory import MemoryReading, Pressure, pressure, reserve
from moestro.cluster.memory_reader import MemoryReader, cgroups, read_cgroup
from moestro.cluster.memory_watch import watch_memory

MIB = 2**20
GIB = 2**30


def test_the_reserve_is_a_fiftieth_within_bounds() -> None:
    assert reserve(20 * GIB) == 20 * GIB // 50
    assert reserve(GIB) == 64 * MIB
    assert reserve(2000 * GIB) == GIB
    assert reserve(100 * MIB) == 25 * MIB  # of a very small limit, a quarter


def test_first_the_new_then_the_waiting_and_back_without_flutter() -> None:
    total = 50 * GIB  # its reserve is 1 GiB
    now, seen = Pressure.NONE, []
    for free in (9.0, 1.1, 0.9, 1.1, 0.6, 0.4, 0.55, 0.7, 1.2, 1.3, 9.0):
        now = pressure(MemoryReading(int(free * GIB), total), now)
        seen.append(now)
    none, new, waiting = Pressure
    assert seen == [none, none, new, new, new, waiting, waiting, new, new, none, none]


@settings(deadline=None)
@given(free=st.integers(-(2**40), 2**40), total=st.integers(1, 2**40), before=st.sampled_from(Pressure))
def test_less_memory_is_never_less_pressure(free: int, total: int, before: Pressure) -> None:
    here = pressure(MemoryReading(free, total), before)
    assert pressure(MemoryReading(free - 1, total), before) >= here
    assert pressure(MemoryReading(free, total), here) == here  # the same reading again changes nothing


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A cgroup with a limit inside one without, inside one with a tighter one."""

    def group(path: Path, limit: str, used: int, inactive: int) -> None:
        path.mkdir(parents=True, exist_ok=True)
        (path / "memory.max").write_text(f"{limit}\n")
        (path / "memory.current").write_text(f"{used}\n")
        (path / "memory.stat").write_text(f"anon 1\ninactive_file {inactive}\n")

    group(tmp_path / "root/a/b/c", str(800 * MIB), 300 * MIB, 100 * MIB)
    group(tmp_path / "root/a/b", "max", 500 * MIB, 0)
    group(tmp_path / "root/a", str(700 * MIB), 600 * MIB, 50 * MIB)
    (tmp_path / "cgroup").write_text("1:memory:/old\n0::/a/b/c\n")
    return tmp_path


def test_the_tightest_cgroup_counts_and_reclaimable_pages_do_not(tree: Path) -> None:
    root = tree / "root"
    assert [each.relative_to(root).as_posix() for each in cgroups(root, tree / "cgroup")] == ["a/b/c", "a/b", "a"]
    assert read_cgroup(root / "a/b/c") == MemoryReading(600 * MIB, 800 * MIB)
    with pytest.raises(ValueError, match="max"):
        read_cgroup(root / "a/b")
    reader = MemoryReader(root=root, own_cgroup=tree / "cgroup")
    assert reader.read() == MemoryReading(150 * MIB, 700 * MIB)
    (root / "a/memory.max").write_text("max\n")
    assert reader.read() == MemoryReading(600 * MIB, 800 * MIB)
    (root / "a/b/c/memory.current").unlink()
    assert reader.read().total == psutil.virtual_memory().total


def test_without_cgroup_v2_the_machine_counts(tmp_path: Path) -> None:
    reader = MemoryReader(root=tmp_path, own_cgroup=tmp_path / "none")
    assert reader.read().total == psutil.virtual_memory().total


def test_the_limit_of_a_process_counts_against_what_it_has_resident() -> None:
    """The real machine: a limit just above what this process uses leaves little, and memory it takes shows."""
    resident = psutil.Process().memory_info().rss
    reader = MemoryReader(limit=resident + 256 * MIB)
    before = reader.read()
    assert before.total == resident + 256 * MIB
    held = bytearray(b"x") * (128 * MIB)
    after = reader.read()
    assert 96 * MIB < before.free - after.free < 192 * MIB
    assert pressure(MemoryReader(limit=resident + len(held) + MIB).read(), Pressure.NONE) is Pressure.WAITING


def test_a_watch_tells_of_changes_only() -> None:
    class Scripted:
        def __init__(self, free: Iterator[int]) -> None:
            self._free = free

        def read(self) -> MemoryReading:
            return MemoryReading(next(self._free), 50 * GIB)

    async def scenario() -> list[Pressure]:
        told: list[Pressure] = []
        free = iter([9 * GIB, 9 * GIB, GIB // 2 + 1, GIB // 2 + 1, 0, 9 * GIB])
        with pytest.raises(RuntimeError, match="StopIteration"):
            await watch_memory(Scripted(free), told.append, every_s=0.0)
        return told

    assert asyncio.run(scenario()) == [Pressure.NEW, Pressure.WAITING, Pressure.NONE]
