"""Activations whose bits do not depend on the rows beside.

Legend: R rows, I expert width; ``gate_up`` is the fused product, its first half the gate.

Vectorised loops on a CPU leave a tail to scalar code, whose exponential differs in the last bit. Which elements are the
tail must therefore be a matter of their column alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

_UNSHARED_ELEMENTS = {"cpu": 32768}
"""Elements up to which torch gives an elementwise operation to one thread. Beyond, threads may begin within a row."""


def swiglu(gate_up_R2I: Tensor) -> Tensor:
    """``silu(gate) * up``."""
    gate_RI, up_RI = gate_up_R2I.chunk(2, -1)
    return _silu(gate_RI) * up_RI


def sigmoid(x: Tensor) -> Tensor:
    """``1 / (1 + exp(-x))`` in fp32, returned in the dtype of x. Unlike ``torch.sigmoid``, of operations that give each
    element the same bits wherever it stands: torch's own exponential has no scalar tail."""
    return (1 / (1 + torch.exp(-x.float()))).to(x.dtype)


def _silu(x_RI: Tensor) -> Tensor:
    """Row by row, as x is a column slice: loops do not run on from one row into the next."""
    num_rows, width = x_RI.shape
    step = max(1, _UNSHARED_ELEMENTS.get(x_RI.device.type, x_RI.numel()) // max(1, width))
    if num_rows <= step:
        return torch.nn.functional.silu(x_RI)
    out_RI = torch.empty(num_rows, width, dtype=x_RI.dtype, device=x_RI.device)
    for start in range(0, num_rows, step):
        torch.ops.aten.silu.out(x_RI[start : start + step], out=out_RI[start : start + step])
    return out_RI
