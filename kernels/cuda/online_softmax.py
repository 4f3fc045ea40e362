"""Softmax over keys that are seen piece by piece (Milakov and Gimelshein 2018), and how pieces are joined.

Legend: M rows (a query head of a query each), D head width, N keys of a tile.

The state of a row is what its keys so far amount to: the largest score ``m_M`` in units of log 2, the sum ``l_M`` of
2 ** (score - m), and ``acc_MD``, the values weighted alike. Every rounding here is written down (no product is fused
with a sum but where it says ``fma``), since the same numbers must come out of every kernel that joins pieces.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def finite_base(m_M):
    """What scores are measured from: a row that has seen nothing yet must not compute inf - inf."""
    return tl.where(m_M == float("-inf"), 0.0, m_M)


@triton.jit
def join(m_M, l_M, acc_MD, other_m_M, other_l_M, other_acc_MD):
    """Two states of the same rows as one. A state of no keys (-inf, 0, 0) changes nothing, on either side."""
    both_m_M = tl.maximum(m_M, other_m_M, propagate_nan=tl.PropagateNan.ALL)
    base_M = finite_base(both_m_M)
    mine_M, others_M = tl.exp2(m_M - base_M), tl.exp2(other_m_M - base_M)
    both_l_M = tl.fma(l_M, mine_M, other_l_M * others_M)
    both_acc_MD = tl.fma(acc_MD, mine_M[:, None], other_acc_MD * others_M[:, None])
    return both_m_M, both_l_M, both_acc_MD


@triton.jit
def finish(m_M, l_M, acc_MD, sink_M, v_scale):
    """The rows' results. A sink is one more key without a value (gpt-oss); minus infinity where there is none."""
    _, l_M, acc_MD = join(m_M, l_M, acc_MD, sink_M, tl.where(sink_M == float("-inf"), 0.0, 1.0), tl.zeros_like(acc_MD))
    return acc_MD * v_scale / l_M[:, None]
