"""Compiles a Triton kernel for Hopper (sm_90) on a machine without a GPU, and reads what the compiler made of it."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.jit import JITFunction

MAX_SHARED_BYTES = 227 * 1024  # of one block on an H100 or H200


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel's machine code, in numbers."""

    registers: int  # of a thread, at most 255
    stack_bytes: int  # of a thread; what has not found a register lives here
    shared_bytes: int  # of a block
    ptx: str
    sass: str

    @property
    def spills(self) -> int:
        """Instructions that move a register to or from local memory."""
        return len(re.findall(r"\b(?:LDL|STL)\b", self.sass))

    @property
    def matrix_instructions(self) -> set[str]:
        """Names without the operands' layout, ``wgmma m64n16k16.f32.bf16.bf16`` for example."""
        names = re.findall(r"(wgmma)\.mma_async\.sync\.aligned\.(\S+)|(mma)\.sync\.aligned\.(\S+)", self.ptx)
        return {" ".join(part for part in name if part) for name in names}


def compile_for_hopper(
    kernel: Any, constants: Mapping[str, Any], types: Mapping[str, str], *, num_warps: int, num_stages: int
) -> Compiled:
    """``types`` names the type of each argument that is no constant: ``*bf16``, ``i32``. A pointer is taken to be
    aligned to 16 bytes, as torch's are; an integer is taken as it comes. An absent tensor is a constant None."""
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    missing = {name for name, kind in signature.items() if kind == "constexpr"} ^ set(constants)
    assert not missing, f"neither a constant nor a type, or not an argument: {missing}"
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*")
    }
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": False}
    with tempfile.TemporaryDirectory() as folder:
        cache, os.environ["TRITON_CACHE_DIR"] = os.environ.get("TRITON_CACHE_DIR"), folder
        try:
            source = ASTSource(kernel, signature, dict(constants), aligned)
            made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        finally:
            del os.environ["TRITON_CACHE_DIR"]
            if cache is not None:
                os.environ["TRITON_CACHE_DIR"] = cache
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(made.asm["cubin"])
        usage, sass = _cuobjdump("-res-usage", binary), _cuobjdump("-sass", binary)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()  # type: ignore[union-attr]
    return Compiled(int(registers), int(stack), made.metadata.shared, made.asm["ptx"], sass)


def _cuobjdump(option: str, binary: Path) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, binary], capture_output=True, text=True, check=True).stdout


class _HopperDriver:
    """What Triton asks of a driver before it launches."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass(frozen=True, slots=True)
class Launch:
    """A launch that was only compiled."""

    kernel: str
    programs: int
    binary: Any  # the same object for launches that share one


@contextmanager
def launches_for_hopper(patch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    """Within, a launch binds its arguments (CPU tensors will do) and compiles for Hopper as on a GPU; nothing runs."""
    launches: list[Launch] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> Any:
        binary = run(self, *args, grid=grid, warmup=True, **options)
        launches.append(Launch(self.fn.__name__, grid[0], binary))
        return binary

    with tempfile.TemporaryDirectory() as folder, patch.context() as patched:
        patched.setenv("TRITON_CACHE_DIR", folder)
        patched.setattr(driver, "_active", _HopperDriver())
        patched.setattr(JITFunction, "run", compile_only)
        yield launches
