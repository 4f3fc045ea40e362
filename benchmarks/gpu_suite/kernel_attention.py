"""Paged attention of the backend: norm, rotation, cache and product at once, against fp64; the same bits however a
sequence is cut, in any company, and planned on the device alone.

Legend: S sequences, T tokens, N heads of queries, keys and values together, Q query heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from benchmarks.gpu_suite.checks import Check, Settings, Unmet, Values, attempt
from torch import Tensor

from moestro.kernels.backend import AttentionShape, Backend, Decodes, HeadNorm, PagedAttention, Spans

TOLERANCE = 1e-2
_BLOCK = 16
_SHAPES = (  # query heads, key/value heads, head width, window, head norm
    (32, 4, 128, None, True),
    (32, 8, 128, None, False),
    (64, 8, 64, 128, True),
    (8, 8, 80, None, False),
    (6, 2, 96, 37, False),
    (4, 1, 192, None, False),
    (4, 2, 256, None, True),
)
_SMALL_SHAPES = ((4, 2, 16, None, True), (4, 1, 24, 9, False))
_LENGTHS = (1, 15, 16, 17, 130, 513, 1500)
_SMALL_LENGTHS = (1, 16, 17, 40)


@dataclass(frozen=True, slots=True)
class Sequences:
    """What all ways of computing have in common: every token's heads, and the blocks of every sequence."""

    lengths: Sequence[int]
    qkv: list[Tensor]  # by sequence: qkv_TND
    table_SB: Tensor
    kv_NCbD: Tensor  # to be copied


def attention_checks(backend: Backend, settings: Settings, generator: torch.Generator) -> Iterator[Check]:
    for heads, kv_heads, width, window, normed in _SMALL_SHAPES if settings.small else _SHAPES:
        yield attempt(
            f"attention {heads} over {kv_heads} heads of {width}" + (f", window {window}" if window else ""),
            lambda s=(heads, kv_heads, width, window, normed): attention(
                backend, *s, _SMALL_LENGTHS if settings.small else _LENGTHS, generator
            ),
        )


def attention(
    backend: Backend,
    heads: int,
    kv_heads: int,
    width: int,
    window: int | None,
    normed: bool,
    lengths: Sequence[int],
    generator: torch.Generator,
) -> Values:
    device = generator.device
    shape = AttentionShape(heads, kv_heads, width, width, width**-0.5, window, torch.bfloat16, device)
    weight_ND = 1 + 0.1 * torch.randn(heads + kv_heads, width, generator=generator, device=device)
    norm = HeadNorm(weight_ND, 1e-6) if normed else None
    kernel = backend.make_attention(shape, norm)
    made = _sequences(shape, lengths, generator)
    whole, cache = _run(kernel, made, [[(s, 0, n)] for s, n in enumerate(lengths)])
    error = _error(made, whole, shape, norm)
    if not error <= TOLERANCE:
        raise Unmet(f"the error is {error:.1e}, at most {TOLERANCE:.0e} was to be", error=error)
    ways = {"together": [[(s, 0, n) for s, n in enumerate(lengths)]]}
    ways |= {f"in chunks of {size}": _chunks(lengths, size) for size in (7, 64)}
    ways["decoded at the end"] = [
        [(s, 0, n - 1) for s, n in enumerate(lengths) if n > 1],
        [(s, n - 1, 1) for s, n in enumerate(lengths)],
    ]
    for what, steps in ways.items():
        found, found_cache = _run(kernel, made, steps)
        _compare(what, whole, cache, found, found_cache)
    found, found_cache = _run(kernel, made, ways["decoded at the end"], on_the_device=True)
    _compare("decoded by a plan made on the device", whole, cache, found, found_cache)
    return {"headline": f"error {error:.1e}, the same bits {len(ways) + 1} ways", "error": error, "ways": [*ways]}


def _sequences(shape: AttentionShape, lengths: Sequence[int], generator: torch.Generator) -> Sequences:
    device, total = generator.device, shape.num_heads + 2 * shape.num_kv_heads
    columns = -(-max(lengths) // _BLOCK) + 1
    blocks = len(lengths) * columns + 1
    order = torch.randperm(blocks - 1, generator=generator, device=device) + 1
    kv_NCbD = torch.randn(
        blocks, 2 * shape.num_kv_heads, _BLOCK, shape.head_dim, generator=generator, device=device
    ).bfloat16()
    kv_NCbD[0] = 0
    qkv = [torch.randn(n, total, shape.head_dim, generator=generator, device=device).bfloat16() for n in lengths]
    return Sequences(lengths, qkv, order.to(torch.int32).view(len(lengths), columns), kv_NCbD)


Step = list[tuple[int, int, int]]
"""Spans: sequence, first token, number of tokens."""


def _chunks(lengths: Sequence[int], size: int) -> list[Step]:
    steps: list[Step] = []
    for start in range(0, max(lengths), size):
        steps.append([(s, start, min(size, n - start)) for s, n in enumerate(lengths) if n > start])
    return steps


def _run(
    kernel: PagedAttention[Any], made: Sequences, steps: Sequence[Step], *, on_the_device: bool = False
) -> tuple[list[Tensor], Tensor]:
    """Each sequence's out_TQD, and the cache. With ``on_the_device`` steps of decodes are planned there."""
    cache = made.kv_NCbD.clone()
    out: list[dict[int, Tensor]] = [{} for _ in made.lengths]
    for step in steps:
        spans = sorted(step, key=lambda span: span[2] > 1)
        tokens = torch.cat([torch.arange(start, start + n) for _, start, n in spans]).to(cache.device)
        row_T = torch.cat([torch.full((n,), row) for row, (_, _, n) in enumerate(spans)]).to(cache.device)
        table_SB = made.table_SB[torch.tensor([s for s, _, _ in spans], device=cache.device)]
        slot_T = table_SB[row_T, tokens // _BLOCK].long() * _BLOCK + tokens % _BLOCK
        qkv_TND = torch.cat([made.qkv[s][start : start + n] for s, start, n in spans])
        starts = [0]
        for _, _, n in spans:
            starts.append(starts[-1] + n)
        contexts = [start + n for _, start, n in spans]
        decodes = sum(n == 1 for _, _, n in spans)
        if on_the_device and decodes == len(spans):
            length_S = torch.tensor(contexts, dtype=torch.int32, device=cache.device)
            plan = kernel.plan_decodes(Decodes(length_S, table_SB, slot_T, _BLOCK))
        else:
            plan = kernel.plan(Spans(starts, contexts, decodes, table_SB, slot_T, _BLOCK))
        cos_T1D, sin_T1D = _tables(tokens, qkv_TND.shape[2])
        got_TQD = kernel.apply(qkv_TND, cos_T1D, sin_T1D, cache, plan)
        for row, (s, start, n) in enumerate(spans):
            out[s][start] = got_TQD[starts[row] : starts[row] + n]
    return [torch.cat([parts[start] for start in sorted(parts)]) for parts in out], cache


def _error(made: Sequences, whole: Sequence[Tensor], shape: AttentionShape, norm: HeadNorm | None) -> float:
    """Of the last token of each sequence, against fp64 from the projected heads on."""
    squares = total = 0.0
    for qkv_TND, got_TQD in zip(made.qkv, whole, strict=True):
        want_QD = _definition(qkv_TND.double(), shape, norm)
        squares += float((got_TQD[-1].double() - want_QD).square().sum())
        total += float(want_QD.square().sum())
    return (squares / total) ** 0.5


def _definition(qkv_TND: Tensor, shape: AttentionShape, norm: HeadNorm | None) -> Tensor:
    """out_QD of the last token, in fp64."""
    length, heads, kv_heads = len(qkv_TND), shape.num_heads, shape.num_kv_heads
    qk_TND, v_THD = qkv_TND[:, : heads + kv_heads], qkv_TND[:, heads + kv_heads :]
    if norm is not None:
        qk_TND = qk_TND * (qk_TND.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * norm.weight_ND.double()
    cos_T1D, sin_T1D = (table.double() for table in _tables(torch.arange(length, device=qk_TND.device), shape.head_dim))
    qk_TND = qk_TND * cos_T1D + qk_TND.roll(shape.head_dim // 2, -1) * sin_T1D
    first = 0 if shape.window is None else max(0, length - shape.window)
    group = heads // kv_heads
    k_LQD = qk_TND[first:, heads:].repeat_interleave(group, 1)
    v_LQD = v_THD[first:].repeat_interleave(group, 1)
    scores_QL = torch.einsum("qd,lqd->ql", qk_TND[-1, :heads], k_LQD) * shape.scale
    return torch.einsum("ql,lqd->qd", torch.softmax(scores_QL, -1), v_LQD)


def _tables(position_T: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """cos_T1D and signed sin_T1D."""
    angle_T1d = position_T.view(-1, 1, 1) * torch.linspace(0.01, 1.0, width // 2, device=position_T.device)
    return angle_T1d.cos().repeat(1, 1, 2), torch.cat((-angle_T1d.sin(), angle_T1d.sin()), -1)


def _compare(what: str, want: Sequence[Tensor], want_cache: Tensor, got: Sequence[Tensor], got_cache: Tensor) -> None:
    for want_TQD, got_TQD in zip(want, got, strict=True):
        if not torch.equal(want_TQD, got_TQD):
            token = int((want_TQD != got_TQD).flatten(1).any(1).int().argmax())
            raise Unmet(f"{what}: token {token} of a sequence of {len(want_TQD)} has other bits")
    if not torch.equal(want_cache, got_cache):
        raise Unmet(f"{what}: the cache holds other bits")
