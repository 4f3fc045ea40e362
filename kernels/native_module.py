"""Compiles the C++ of a folder into one extension module, once for each version of it, and loads it.

The module is kept in the user's cache folder (``$XDG_CACHE_HOME``, else ``~/.cache``) under a hash of everything that
decides its contents. Ranks that start together build once: the first holds a lock, the others wait for its file.

The compiler is called directly: ``torch.utils.cpp_extension.load`` would want ninja and builds one file after the other
without it. Headers of torch cost seconds each, so only ``bind_*.cpp`` should include them.
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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch.utils import cpp_extension

_FLAGS = ("-std=c++20", "-O3", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")
"""Without contraction a sum is rounded where the source says so."""


class BuildError(RuntimeError):
    """A module cannot be built or loaded here; the message is the compiler's or the loader's, or says why not."""


@dataclass(frozen=True, slots=True)
class NativeModule:
    """The ``*.cpp`` of a folder as a Python module ``name``."""

    name: str
    folder: Path
    flags: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()  # besides torch's

    def unavailable_reason(self) -> str | None:
        """Why ``load`` cannot work on this machine; None where nothing speaks against it. Builds nothing."""
        if sys.platform != "linux":
            return f"{self.name} is built on Linux only, not on {sys.platform}"
        if shutil.which(_compiler()) is None:
            return f"no C++ compiler: {_compiler()} is not found (CXX names another GCC)"
        if not (_python_headers() / "Python.h").exists():
            return f"there is no Python.h in {_python_headers()}"
        return None

    def load(self) -> ModuleType:
        """The module, built if need be. Raises BuildError."""
        path = self.built()
        spec = importlib.util.spec_from_file_location(self.name, path)
        if spec is None or spec.loader is None:
            raise BuildError(f"{path} is no extension module")
        try:
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        except ImportError as error:
            raise BuildError(str(error)) from error
        return module

    def built(self) -> Path:
        """Where the module lies, after building it unless another process has. Raises BuildError."""
        if reason := self.unavailable_reason():
            raise BuildError(reason)
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moestro"
        path = folder / f"{self.name}-{self._key()}{sysconfig.get_config_var('EXT_SUFFIX')}"
        if path.exists():
            return path
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(path.with_suffix(".lock")), tempfile.TemporaryDirectory(dir=folder) as scratch:
                if not path.exists():
                    self._compile(Path(scratch), Path(scratch) / path.name)
                    (Path(scratch) / path.name).replace(path)  # atomic: nobody ever loads half a module
        except OSError as error:
            raise BuildError(f"cannot build in {folder}: {error.strerror}") from error
        return path

    def _compile(self, scratch: Path, target: Path) -> None:
        include = [_python_headers(), *cpp_extension.include_paths()]
        flags = [*_FLAGS, *self.flags, *(f"-isystem{path}" for path in include)]
        slow_first = sorted(self.folder.glob("*.cpp"), key=lambda source: -source.name.startswith("bind_"))
        objects = [scratch / f"{source.stem}.o" for source in slow_first]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            jobs = zip(slow_first, objects, strict=True)
            list(pool.map(lambda job: _run([*flags, "-c", str(job[0]), "-o", str(job[1])]), jobs))
        libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
        libraries += ["-ltorch_python", "-ltorch_cpu", "-lc10", *self.libraries]
        _run(["-shared", *map(str, objects), *libraries, "-o", str(target)])

    def _key(self) -> str:
        """A hash of what decides the module's contents."""
        version = subprocess.run([_compiler(), "--version"], capture_output=True, text=True).stdout
        digest = hashlib.sha256(repr((_FLAGS, self.flags, self.libraries, version, torch.__version__)).encode())
        for source in sorted(self.folder.glob("*.[ch]*")):
            digest.update(source.name.encode() + b"\0" + source.read_bytes())
        return digest.hexdigest()[:16]


def _run(arguments: list[str]) -> None:
    done = subprocess.run([_compiler(), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"the compiler failed: {done.stderr.strip()}")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed, also by a crash
        yield


def _compiler() -> str:
    return os.environ.get("CXX") or "g++"


def _python_headers() -> Path:
    return Path(sysconfig.get_paths()["include"])
