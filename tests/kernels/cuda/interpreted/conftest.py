"""Runs Triton kernels on the CPU, in Triton's interpreter: only in a process that began with TRITON_INTERPRET=1, which
``test_in_the_interpreter.py`` starts."""

from __future__ import annotations

import os

import numpy as np
import pytest

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

    left, right = _as_doubles(a), _as_doubles(b)
    group = 256 // a.dtype.primitive_bitwidth  # products of one instruction
    acc = d.data.astype(np.float32)
    for start in range(0, left.shape[-1], group):
        total = np.zeros(acc.shape)
        for k in range(start, min(start + group, left.shape[-1])):
            total += left[:, k, None] * right[None, k, :]
        acc = (acc + total).astype(np.float32)
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


if INTERPRETED:

    @pytest.fixture(autouse=True, scope="session")
    def _hopper_dot():
        from triton.runtime.interpreter import InterpreterBuilder

        saved = InterpreterBuilder.create_dot
        InterpreterBuilder.create_dot = matrix_instruction
        yield
        InterpreterBuilder.create_dot = saved
