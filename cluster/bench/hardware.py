"""What a measurement ran on: the record that every benchmark's JSON carries.

Only the standard library, so that it can be imported anywhere (no torch, no grpc). It holds nothing that names a
machine or a person: no host name, no user, no path.
"""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

# Instruction sets that decide which matrix kernels a CPU can use.
_CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "asimd", "bf16", "sve")
_PACKAGES = ("torch", "triton", "transformers", "numpy", "grpcio", "ray")

Record = dict[str, object]


def hardware_record() -> Record:
    """Hardware, versions, commit and date, ready for ``json.dump``.

    Keys: ``cpu`` (model, features), ``cores`` (logical: of the machine; usable: by this process; quota: of its
    cgroup, None when unlimited), ``memory_bytes`` (of the machine, or of the cgroup when that is smaller), ``gpus``
    (name, memory, driver; empty without nvidia-smi), ``python``, ``packages`` (None: not installed), ``commit`` and
    ``dirty`` (None outside a git checkout), ``date`` (UTC, ISO 8601).
    """
    commit, dirty = git_state(Path(__file__).resolve())
    return {
        "cpu": {"model": _cpu_model(), "features": _cpu_features()},
        "cores": {"logical": os.cpu_count(), "usable": _usable_cores(), "quota": _core_quota()},
        "memory_bytes": _memory_bytes(),
        "gpus": _gpus(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in _PACKAGES},
        "commit": commit,
        "dirty": dirty,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def git_state(file: Path) -> tuple[str | None, bool | None]:
    """The commit of the checkout that tracks ``file`` and whether any tracked file differs from it; (None, None) when
    no repository tracks it (an installed wheel inside somebody else's checkout must not claim its commit)."""
    if _run("git", "-C", str(file.parent), "ls-files", "--error-unmatch", file.name) is None:
        return None, None
    commit = _run("git", "-C", str(file.parent), "rev-parse", "HEAD")
    status = _run("git", "-C", str(file.parent), "status", "--porcelain", "--untracked-files=no")
    return commit, None if status is None else bool(status)


def _run(*command: str) -> str | None:
    """Standard output of a short command, or None when it is missing, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _cpu_field(*names: str) -> str | None:
    for line in _read("/proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in names:
            return value.strip()
    return None


def _cpu_model() -> str | None:
    return _cpu_field("model name") or platform.processor() or None


def _cpu_features() -> list[str]:
    present = set((_cpu_field("flags", "Features") or "").split())
    return [name for name in _CPU_FEATURES if name in present]


def _usable_cores() -> int | None:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _core_quota() -> float | None:
    """Cores' worth of time that cgroup v2 grants, None when unlimited or unknown."""
    parts = _read("/sys/fs/cgroup/cpu.max").split()
    if len(parts) != 2 or parts[0] == "max":
        return None
    return int(parts[0]) / int(parts[1])


def _memory_bytes() -> int | None:
    sizes = [
        int(line.split()[1]) * 1024 for line in _read("/proc/meminfo").splitlines() if line.startswith("MemTotal:")
    ]
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    if limit.isdigit():
        sizes.append(int(limit))
    return min(sizes) if sizes else None


def _gpus() -> list[Record]:
    listing = _run("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits")
    gpus: list[Record] = []
    for line in (listing or "").splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == 3:
            memory = int(fields[1]) * 2**20 if fields[1].isdigit() else None
            gpus.append({"name": fields[0], "memory_bytes": memory, "driver": fields[2]})
    return gpus


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
