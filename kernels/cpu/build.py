"""Compiles the C++ of this folder into one extension module and loads it.

    python -m moestro.kernels.cpu.build       # builds ahead of time; says why not where it cannot

The module is kept in the user's cache folder (``$XDG_CACHE_HOME``, else ``~/.cache``) under a hash of everything that
decides its contents. Ranks that start together build once: the first holds a lock, the others wait for its file.

The compiler is called directly: ``torch.utils.cpp_extension.load`` would want ninja and builds one file after the other
without it. Headers of torch cost seconds each, so that only ``bind_*.cpp`` include them.

One OpenMP runtime: the module asks for ``libgomp.so.1``, and the loader answers with the library of that name which
torch brought along and loaded before. Hence GCC only: another compiler would start a second team of threads.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

NAME = "moestro_cpu"
FLAGS = (
    "-std=c++20",
    "-O3",
    "-march=x86-64-v4",  # AVX-512 F, BW, CD, DQ, VL: a module built here runs wherever unavailable_reason is silent
    "-mavx512bf16",
    "-mprefer-vector-width=512",
    "-ffp-contract=off",  # a sum is rounded where the source says so
    "-fopenmp",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-maybe-uninitialized",
)
_NEEDED = ("avx512_f", "avx512_bw", "avx512_cd", "avx512_dq", "avx512_vl", "avx512_bf16")


class BuildError(RuntimeError):
    """The kernels cannot be built or loaded here; the message is the compiler's or the loader's."""


def unavailable_reason() -> str | None:
    """Why ``load`` cannot work on this machine; None where nothing speaks against it. Builds nothing."""
    if sys.platform != "linux":
        return f"the kernels are built on Linux only, not on {sys.platform}"
    has = torch.cpu.get_capabilities()
    if missing := [flag for flag in _NEEDED if not has.get(flag)]:
        return f"the processor lacks {', '.join(missing)}"
    if shutil.which(_compiler()) is None:
        return f"there is no compiler {_compiler()} (CXX names another GCC)"
    if not (_python_headers() / "Python.h").exists():
        return f"there is no Python.h in {_python_headers()}"
    return None


@cache
def load() -> ModuleType:
    """The extension module, built if need be.

    Raises ``BuildError`` with what the compiler said.
    """
    if reason := unavailable_reason():
        raise BuildError(reason)
    path = _built()
    spec = importlib.util.spec_from_file_location(NAME, path)
    if spec is None or spec.loader is None:
        raise BuildError(f"{path} is no extension module")
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise BuildError(str(error)) from error
    return module


def _built() -> Path:
    """Where the module lies, after building it unless another process has."""
    folder = _cache_folder()
    path = folder / f"{NAME}-{_key()}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if path.exists():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")), tempfile.TemporaryDirectory(dir=folder) as scratch:
            if not path.exists():
                _compile(Path(scratch), Path(scratch) / path.name)
                (Path(scratch) / path.name).replace(path)  # atomic: nobody ever loads half a module
    except OSError as error:
        raise BuildError(f"cannot build in {folder}: {error.strerror}") from error
    return path


def _compile(scratch: Path, target: Path) -> None:
    from torch.utils import cpp_extension  # takes a third of a second, which only a build should pay

    include = [_python_headers(), *cpp_extension.include_paths()]
    flags = [*FLAGS, *(f"-isystem{path}" for path in include)]
    sources = sorted(_here().glob("*.cpp"), key=lambda source: -source.name.startswith("bind_"))  # slow ones first
    objects = [scratch / f"{source.stem}.o" for source in sources]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        jobs = zip(sources, objects, strict=True)
        list(pool.map(lambda job: _run([*flags, "-c", str(job[0]), "-o", str(job[1])]), jobs))
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    libraries += ["-ltorch_python", "-ltorch_cpu", "-lc10", "-l:libgomp.so.1"]
    _run(["-shared", *map(str, objects), *libraries, "-o", str(target)])


def _run(arguments: list[str]) -> None:
    done = subprocess.run([_compiler(), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{_compiler()} failed:\n{done.stderr}")


def _key() -> str:
    """A hash of what decides the module's contents."""
    version = subprocess.run([_compiler(), "--version"], capture_output=True, text=True).stdout
    digest = hashlib.sha256(repr((FLAGS, version, torch.__version__)).encode())
    for source in sorted(_here().glob("*.[ch]*")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:16]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed, also by a crash
        yield


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moestro"


def _compiler() -> str:
    return os.environ.get("CXX") or "g++"


def _python_headers() -> Path:
    return Path(sysconfig.get_paths()["include"])


def _here() -> Path:
    return Path(__file__).resolve().parent


def main() -> None:
    if reason := unavailable_reason():
        print(f"no C++ kernels: {reason}")
        return
    begin = time.monotonic()
    load()
    print(f"C++ kernels ready after {time.monotonic() - begin:.1f} s: {_built()}")


if __name__ == "__main__":
    main()
