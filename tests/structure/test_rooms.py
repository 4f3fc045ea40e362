"""The rules between the rooms, read off the source: imports point down, and each room keeps its outside world small."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("cluster", "workers", "router", "kernels", "protos")

# What each room may import of ours; `demo` is only paths to the bundled checkpoints.
ALLOWED = {
    "cluster": {"cluster", "workers", "router", "protos", "demo"},
    "workers": {"workers", "router", "kernels", "protos"},
    "router": {"router", "kernels", "protos"},
    "kernels": {"kernels"},
    "protos": {"protos"},
}
# Outside packages that only some folders may know.
CONFINED = {
    "ray": {"cluster/serving"},
    "grpc": {"cluster", "protos/gen"},
    "pydantic": {"cluster"},
    "typer": {"cluster"},
    "rich": {"cluster"},
    "transformers": set(),
}
# Sans-IO: state machines that must not see a socket, a clock, a thread or a tensor.
PURE = (
    "workers/scheduler.py",
    "workers/scheduler_tables.py",
    "workers/scheduler_sequence.py",
    "workers/kv_blocks.py",
    "cluster/directory.py",
    "cluster/edge/admitted.py",
    "cluster/edge/history.py",
    "cluster/edge/incidents.py",
    "cluster/edge/journal.py",
    "cluster/memory.py",
    "cluster/ranks/capacity.py",
    "cluster/edge/admission.py",
    "cluster/edge/estimates.py",
    "cluster/edge/fair_queue.py",
    "cluster/edge/tickets.py",
    "cluster/edge/parked.py",
    "cluster/edge/resuming.py",
    "router/placement.py",
    "router/rehome.py",
    "router/stragglers.py",
    "router/view.py",
    "workers/memory_plan.py",
)
IMPURE = {"time", "asyncio", "threading", "socket", "torch", "grpc", "ray", "random"}


def sources(room: str) -> Iterator[Path]:
    return (path for path in sorted((ROOT / room).rglob("*.py")) if "gen" not in path.parts)


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_down(room: str) -> None:
    wrong = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in sources(room)
        for name in imports(path)
        if name.startswith("moestro.") and name.split(".")[1] not in ALLOWED[room] | {"__version__"}
    }
    assert not wrong


@pytest.mark.parametrize(("package", "homes"), CONFINED.items())
def test_outside_packages_stay_where_they_belong(package: str, homes: set[str]) -> None:
    wrong = {
        f"{path.relative_to(ROOT)}: {name}"
        for room in ROOMS
        for path in sources(room)
        for name in imports(path)
        if name.split(".")[0] == package
        and not any(path.relative_to(ROOT).as_posix().startswith(f"{home}/") for home in homes)
    }
    assert not wrong


@pytest.mark.parametrize("name", PURE)
def test_sans_io_cores_have_no_io(name: str) -> None:
    assert not {each for each in imports(ROOT / name) if each.split(".")[0] in IMPURE}


def test_rooms_are_namespace_folders_behind_committed_links() -> None:
    for room in ROOMS:
        link = ROOT / "src" / "moestro" / room
        assert link.is_symlink()
        assert link.resolve() == ROOT / room
        assert (ROOT / room / "py.typed").exists()
        assert not list((ROOT / room).rglob("__init__.py"))


@pytest.mark.parametrize("name", ["moestro.cluster.gateway", "moestro.cluster.client", "moestro.cluster.directory"])
def test_what_computes_nothing_imports_no_torch(name: str) -> None:
    """It would cost each gateway 200 MB and its start some seconds."""
    code = f"import sys, {name}; sys.exit('torch' in sys.modules)"
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": path})
