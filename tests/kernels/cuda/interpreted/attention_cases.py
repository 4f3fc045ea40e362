"""Steps of attention to try: sequences with a past in a paged cache, and spans of them to compute."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moestro.kernels.backend import AttentionShape, HeadNorm, Spans
from moestro.kernels.paged_attention import paged_attention_reference

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Case:
    """A cache in which every sequence has ``length`` tokens, and the queries of all of them."""

    kv_NCbD: Tensor
    table_SB: Tensor
    q_SLQD: Tensor

    @property
    def block_size(self) -> int:
        return self.kv_NCbD.shape[2]


def random_case(seed, num_seqs, length, width, num_kv_heads, group, block_size, dtype=torch.bfloat16, columns=0):
    generator = torch.Generator().manual_seed(seed)
    columns = max(columns, -(-length // block_size))
    num_blocks = 1 + num_seqs * columns
    kv_NCbD = torch.randn(num_blocks, 2 * num_kv_heads, block_size, width, generator=generator).to(dtype)
    table_SB = (torch.randperm(num_blocks - 1, generator=generator) + 1).int().view(num_seqs, columns)
    q_SLQD = torch.randn(num_seqs, length, num_kv_heads * group, width, generator=generator).to(torch.bfloat16)
    return Case(kv_NCbD, table_SB, q_SLQD)


def make_spans(case, pieces):
    """``pieces``: (sequence, first position, one past the last); single tokens first. Also their queries."""
    pieces = sorted(pieces, key=lambda piece: piece[2] - piece[1] > 1)
    starts = [0]
    for _, first, stop in pieces:
        starts.append(starts[-1] + stop - first)
    slots = [
        int(case.table_SB[s, p // case.block_size]) * case.block_size + p % case.block_size
        for s, first, stop in pieces
        for p in range(first, stop)
    ]
    spans = Spans(
        starts,
        [stop for _, _, stop in pieces],
        sum(stop - first == 1 for _, first, stop in pieces),
        torch.stack([case.table_SB[s] for s, _, _ in pieces]),
        torch.tensor(slots, dtype=torch.int64),
        case.block_size,
    )
    return spans, torch.cat([case.q_SLQD[s, first:stop] for s, first, stop in pieces]), pieces


def reference(spans, q_TQD, kv_NCbD, window, scale, sinks_Q=None):
    """fp64; a sink takes its share of every weight."""
    out_TQD = paged_attention_reference(
        q_TQD.double(), kv_NCbD, spans.query_start_S1, spans.context_len_S, spans.block_table_SB, window, scale
    )
    return out_TQD if sinks_Q is None else out_TQD * _left_by_sinks(spans, q_TQD, kv_NCbD, window, scale, sinks_Q)


def _left_by_sinks(spans, q_TQD, kv_NCbD, window, scale, sinks_Q):
    """sum(exp(scores)) / (sum(exp(scores)) + exp(sink)) as [T, Q, 1]."""
    num_kv_heads, block_size = kv_NCbD.shape[1] // 2, kv_NCbD.shape[2]
    group = q_TQD.shape[1] // num_kv_heads
    left_TQ = torch.zeros(q_TQD.shape[:2], dtype=torch.float64)
    for s, length in enumerate(spans.context_len_S):
        position = torch.arange(length)
        k_HLD = kv_NCbD[spans.block_table_SB[s].long()[position // block_size], :num_kv_heads, position % block_size]
        k_QLD = k_HLD.double().transpose(0, 1).repeat_interleave(group, 0)
        for t in range(spans.query_start_S1[s], spans.query_start_S1[s + 1]):
            at = length - (spans.query_start_S1[s + 1] - t)
            first = 0 if window is None else max(0, at - window + 1)
            scores_QL = (k_QLD[:, first : at + 1] @ q_TQD[t].double()[:, :, None])[..., 0] * scale
            total_Q = torch.logsumexp(scores_QL, 1)
            left_TQ[t] = torch.sigmoid(total_Q - sinks_Q.double())
    return left_TQ[..., None]


def make_shape(case, window, scale, rotary_dim=None):
    num_heads, width = case.q_SLQD.shape[2:]
    num_kv_heads = case.kv_NCbD.shape[1] // 2
    rotary_dim = width if rotary_dim is None else rotary_dim
    return AttentionShape(num_heads, num_kv_heads, width, rotary_dim, scale, window, torch.bfloat16, CPU)


def random_norm(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    heads = shape.num_heads + shape.num_kv_heads
    return HeadNorm(1 + 0.2 * torch.randn(heads, shape.head_dim, generator=generator), 1e-6)
