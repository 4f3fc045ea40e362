"""Runs Triton kernels on the CPU, in Triton's interpreter: only in a process that began with TRITON_INTERPRET=1, which
``test_in_the_interpreter.py`` starts."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]


def matrix_instruction(self, a, b, d, input_precision, max_num_imprecise_acc):
    """The interpreter's ``tl.dot``, as Hopper's wgmma is taken to do it: an element is its accumulator, to which one
    group of products after the other is added, in the order of K; nothing else has a say.

    numpy's own product hands the work to BLAS, which adds up in another order for other numbers of rows (and Triton's
    interpreter takes bf16 for integers).
    """
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    group = 256 // a.dtype.primitive_bitwidth  # products of one instruction
    left, right = _as_doubles(a), _as_doubles(b)
    assert left.shape[1] % group == 0
    # A sum of so few exact products in fp64 has the same fp32 whatever its order.
    left_GOK = np.ascontiguousarray(left.reshape(len(left), -1, group).swapaxes(0, 1))
    acc = d.data.astype(np.float32)
    for sum_ON in left_GOK @ np.ascontiguousarray(right.reshape(-1, group, right.shape[1])):
        acc = (acc + sum_ON).astype(np.float32)
    return TensorHandle(acc, tl.float32)


def _as_doubles(handle):
    from triton.language import bfloat16, float16, float32
    from triton.runtime.interpreter import _convert_float

    if handle.dtype.scalar == bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if handle.dtype.primitive_bitwidth == 8:
        return _convert_float(handle.data, handle.dtype, float16, None).view(np.float16).astype(np.float64)
    assert handle.dtype.scalar == float32, handle.dtype
    return handle.data.astype(np.float64)


def round_to_nearest(cast):
    """The interpreter cuts numbers off where bf16 or e4m3 ends; a GPU rounds."""

    def cast_rounding(self, src, dst_type, *mode):
        import triton.language as tl

        to = {tl.bfloat16: (torch.bfloat16, torch.uint16), tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8)}
        if src.dtype.scalar != tl.float32 or dst_type.scalar not in to:
            return cast(self, src, dst_type, *mode)
        dtype, bits = to[dst_type.scalar]
        rounded = torch.from_numpy(np.array(src.data)).to(dtype).view(bits).numpy()
        return type(src)(rounded.reshape(src.data.shape), dst_type.scalar)

    return cast_rounding


def call_patching_once(patch_language):
    """``InterpretedFunction.__call__``, which redirects the language's functions anew for each call of one jitted
    function by another: nine tenths of a test's time."""
    patched = set()

    def call(self, *args, **kwargs):
        if self.fn not in patched:
            patch_language(self.fn)
            patched.add(self.fn)
        return self.rewrite()(*args, **kwargs)

    return call


if INTERPRETED:

    @pytest.fixture(autouse=True, scope="session")
    def _like_hopper():
        from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, _patch_lang

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(InterpreterBuilder, "create_dot", matrix_instruction)
            for name in ("cast_impl", "create_fp_to_fp"):
                patch.setattr(InterpreterBuilder, name, round_to_nearest(getattr(InterpreterBuilder, name)))
            patch.setattr(InterpretedFunction, "__call__", call_patching_once(_patch_lang))
            yield
