"""Building the native module of this folder, once for each version of its sources, and loading it.

    python -m moestro.router.native.build      # ahead of the first start, which would wait for it (some 15 s)

The module lies in the user's cache under a hash of sources, flags, torch and Python. Ranks that start together build it
once: the others wait at a lock. Imported only where it is used, so that nothing compiles on import.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from functools import cache
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch

_HERE = Path(__file__).resolve().parent
_FLAGS = ("-O3", "-std=c++20", "-fPIC", "-shared", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra")


class CannotBuild(RuntimeError):
    """No native module here; the message says why, in one line."""


@cache
def load() -> Any:
    """The module. Raises CannotBuild."""
    if sys.platform != "linux":
        raise CannotBuild(f"boards need Linux, not {sys.platform}")
    path = _folder() / f"_board.{_digest()}.so"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.parent / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                _compile(path)
        spec = spec_from_file_location("_board", path, loader=ExtensionFileLoader("_board", str(path)))
        assert spec is not None
        assert spec.loader is not None
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
    except (OSError, ImportError) as error:
        raise CannotBuild(str(error)) from error
    return module


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moestro" / "native"


def _digest() -> str:
    parts = [torch.__version__, sysconfig.get_config_var("SOABI") or "", *_FLAGS, os.environ.get("CXX", "")]
    parts += [path.read_text() for path in sorted([*_HERE.glob("*.h"), *_HERE.glob("*.cpp")])]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _compile(path: Path) -> None:
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        raise CannotBuild(f"no C++ compiler: {compiler[0]} is not found")
    root = Path(torch.__file__).parent
    includes = [root / "include", root / "include" / "torch" / "csrc" / "api" / "include"]
    partial = path.with_suffix(f".{os.getpid()}")
    command = [
        *compiler,
        *_FLAGS,
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *(f"-isystem{include}" for include in (*includes, sysconfig.get_path("include"))),
        *map(str, sorted(_HERE.glob("*.cpp"))),
        f"-L{root / 'lib'}",
        *("-lc10", "-ltorch_cpu", "-ltorch_python"),
        *("-o", str(partial)),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[-200:])
        raise CannotBuild(f"the compiler failed: {first}")
    os.replace(partial, path)


if __name__ == "__main__":
    load()
