"""The extension module of this folder.

    python -m moestro.kernels.cpu.build       # builds ahead of time; says why not where it cannot

One OpenMP runtime: the module asks for ``libgomp.so.1``, and the loader answers with the one of that name that torch
brought along. Hence GCC only; another compiler's runtime would start a second team of threads.
"""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

from moestro.kernels.native_module import BuildError, NativeModule

_FLAGS = (
    "-march=x86-64-v4",  # AVX-512 F, BW, CD, DQ, VL: a module built here runs wherever unavailable_reason is silent
    "-mavx512bf16",
    "-mprefer-vector-width=512",
    "-fopenmp",
    "-Wno-unused-parameter",
    "-Wno-unknown-pragmas",
)
_NEEDED = ("avx512_f", "avx512_bw", "avx512_cd", "avx512_dq", "avx512_vl", "avx512_bf16")

MODULE = NativeModule("moestro_cpu", Path(__file__).resolve().parent, _FLAGS, ("-l:libgomp.so.1",))


def unavailable_reason() -> str | None:
    """Why ``load`` cannot work on this machine; None where nothing speaks against it. Builds nothing."""
    has = torch.cpu.get_capabilities()
    if missing := [flag for flag in _NEEDED if not has.get(flag)]:
        return f"the processor lacks {', '.join(missing)}"
    return MODULE.unavailable_reason()


@cache
def load() -> ModuleType:
    """The extension module, built if need be.

    Raises ``BuildError`` with what the compiler said.
    """
    if reason := unavailable_reason():
        raise BuildError(reason)
    return MODULE.load()


def main() -> None:
    if reason := unavailable_reason():
        print(f"no C++ kernels: {reason}")
        return
    begin = time.monotonic()
    load()
    print(f"C++ kernels ready after {time.monotonic() - begin:.1f} s")


if __name__ == "__main__":
    main()
