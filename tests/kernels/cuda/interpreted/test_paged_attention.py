"""The kernel for decodes and prompts against the definition, and its promise: a query's bits depend on nothing else."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.cuda.interpreted.attention_cases import CPU, make_shape, make_spans, random_case, reference
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.kernels.cuda.attention import CudaAttention, make_attention
from moestro.kernels.cuda.attention_plan import count_segments, make_plan
from moestro.kernels.cuda.paged_attention import attend_, attention_tile, choose_splits

SCALE = 0.2


def attend(case, pieces, window=None, splits=None, sinks_Q=None, plan=None):
    """Each piece's results, in the order asked for."""
    spans, q_TQD, ordered = make_spans(case, pieces)
    plan = plan or CudaAttention(make_shape(case, window, SCALE), None).plan(spans)
    out_TQD = torch.full_like(q_TQD, float("nan"))
    for work in plan.works:
        num_splits = None if splits is None else 1 if splits == 1 else work.segments + 1
        attend_(
            out_TQD, q_TQD, case.kv_NCbD, plan.block_table_SB, work,
            window=window, scale=SCALE, sinks_Q=sinks_Q, num_splits=num_splits,
        )  # fmt: skip
    rows = dict(zip(ordered, out_TQD.split([stop - first for _, first, stop in ordered]), strict=True))
    return [rows[piece] for piece in pieces]


def check_against_reference(case, pieces, window, splits, sinks_Q=None):
    got = torch.cat(attend(case, pieces, window, splits, sinks_Q))
    for piece, out in zip(pieces, attend(case, pieces, window, splits, sinks_Q), strict=True):
        spans, q_TQD, _ = make_spans(case, [piece])
        want = reference(spans, q_TQD, case.kv_NCbD, window, SCALE, sinks_Q)
        error = (out.double() - want).norm() / want.norm()
        assert error < 4e-3, (piece, window, splits, float(error))
    assert got.isfinite().all()


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize(
    ("width", "num_kv_heads", "group", "window"),
    [(64, 2, 4, None), (80, 1, 1, 40), (96, 2, 3, None), (128, 1, 8, None), (192, 1, 2, 150), (256, 1, 2, None)],
)
def test_is_the_definition(width, num_kv_heads, group, window, splits):
    segment = attention_tile(width).segment
    case = random_case(width, 3, segment + 9, width, num_kv_heads, group, 16)
    pieces = [(0, segment + 8, segment + 9), (1, 0, 1), (2, segment - 3, segment + 2), (0, 14, 21)]
    check_against_reference(case, pieces, window, splits)


@pytest.mark.parametrize("window", [None, 1, 128])
def test_sinks_join_the_sum(window):
    case = random_case(3, 1, 300, 128, 1, 4, 16)
    sinks_Q = torch.tensor([0.5, -1.0, 30.0, float("-inf")])
    for splits in (1, 2):
        check_against_reference(case, [(0, 299, 300), (0, 250, 259)], window, splits, sinks_Q)


def test_no_worse_than_fused_attention_of_torch():
    case = random_case(5, 1, 256, 128, 1, 1, 16)
    spans, q_TQD, _ = make_spans(case, [(0, 0, 256)])
    got = attend(case, [(0, 0, 256)])[0].double()
    block_L = case.table_SB[0].long().repeat_interleave(16)
    k_LD, v_LD = (case.kv_NCbD[block_L, slab, torch.arange(256) % 16] for slab in (0, 1))
    want = reference(spans, q_TQD, case.kv_NCbD, None, SCALE)
    q_1LD = q_TQD.transpose(0, 1)
    fused = torch.nn.functional.scaled_dot_product_attention(
        q_1LD, k_LD[None], v_LD[None], is_causal=True, scale=SCALE
    ).transpose(0, 1)
    assert (got - want).norm() <= 1.02 * (fused.double() - want).norm()


def check_bits(case, length, cuts, window, sinks_Q=None, positions=()):
    """Sequence 0 whole, cut, token by token, in company, with keys split and not: all the same."""
    whole = attend(case, [(0, 0, length)], window, 1, sinks_Q)[0]
    for splits in (1, 2):
        for first, stop in zip([0, *cuts], [*cuts, length], strict=True):
            got = attend(case, [(0, first, stop)], window, splits, sinks_Q)[0]
            assert torch.equal(got, whole[first:stop]), (first, stop, splits)
        for position in positions:
            alone = attend(case, [(0, position, position + 1)], window, splits, sinks_Q)[0]
            assert torch.equal(alone, whole[position : position + 1]), (position, splits)
    others = [(1, length - 1, length), (1, 3, 4), (1, 2, 13)]
    crowd = attend(case, [*others, *((0, p, p + 1) for p in positions)], window, 2, sinks_Q)[len(others) :]
    for position, got in zip(positions, crowd, strict=True):
        assert torch.equal(got, whole[position : position + 1]), ("crowd", position)


@pytest.mark.parametrize(
    ("width", "group", "window"), [(64, 8, 100), (128, 8, None), (128, 3, 70), (256, 1, None), (80, 2, None)]
)
def test_bits_depend_on_the_sequence_and_the_position_alone(width, group, window):
    segment, keys = attention_tile(width).segment, attention_tile(width).keys
    length = segment + keys + 5
    case = random_case(width + group, 2, length, width, 1, group, 16)
    positions = sorted({0, keys - 1, keys, segment - 1, segment, segment + 1, length - 1})
    sinks_Q = torch.linspace(-1, 1, group) if group == 8 else None
    check_bits(case, length, [7, segment - 1, segment + 3], window, sinks_Q, positions)


@settings(max_examples=6, deadline=None)
@given(
    length=st.integers(20, 330),
    heads=st.sampled_from([(1, 1), (1, 5), (2, 4), (1, 16)]),
    window=st.one_of(st.none(), st.integers(1, 200)),
    block_size=st.sampled_from([1, 8, 24, 32]),
    cut=st.integers(1, 19),
    seed=st.integers(0, 1000),
)
def test_any_cut_of_any_sequence(length, heads, window, block_size, cut, seed):
    case = random_case(seed, 2, length, 24, *heads, block_size)
    check_bits(case, length, [cut], window, None, [length - 1, length // 2])


def test_long_context():
    """Dozens of segments, most of them behind the window or not."""
    case = random_case(9, 1, 5000, 128, 1, 8, 16)
    whole = attend(case, [(0, 4995, 5000)], None, 1)[0]
    for splits in (1, 2):
        assert torch.equal(attend(case, [(0, 4999, 5000)], None, splits)[0], whole[4:])
    check_against_reference(case, [(0, 4999, 5000)], 700, 2)


def test_what_stands_behind_the_last_token_is_not_read():
    case = random_case(4, 1, 20, 64, 1, 2, 8, columns=6)
    before = attend(case, [(0, 19, 20), (0, 10, 20)])
    live = case.table_SB[0, :3].long()
    dead = torch.ones(len(case.kv_NCbD), dtype=torch.bool)
    dead[live] = False
    case.kv_NCbD[dead] = float("nan")
    case.kv_NCbD[live[2], :, 4:] = float("nan")
    for old, new in zip(before, attend(case, [(0, 19, 20), (0, 10, 20)]), strict=True):
        assert torch.equal(old, new)


def test_what_is_not_a_number_stays_so_and_harms_nobody_else():
    case = random_case(6, 2, 40, 64, 1, 2, 8)
    before = attend(case, [(1, 39, 40)])[0]
    case.q_SLQD[0, 39, 0, 3] = float("nan")
    sick, well = attend(case, [(0, 39, 40), (1, 39, 40)])
    assert sick[0, 0].isnan().all()
    assert sick[0, 1].isfinite().all()
    assert torch.equal(well, before)


@pytest.mark.parametrize("window", [None, 30])
def test_a_captured_step_is_refilled(window):
    """A replay computes what was copied into the plan; what it has room for beyond that is padding."""
    case = random_case(8, 3, 600, 128, 1, 8, 16)
    attention = CudaAttention(make_shape(case, window, SCALE), None)
    static = attention.static_plan(4, 640, 16)
    for pieces in ([(0, 599, 600), (1, 3, 4), (2, 299, 300)], [(2, 256, 257)], [(1, 511, 512), (0, 12, 13)]):
        spans, q_TQD, _ = make_spans(case, pieces)
        static.copy_(attention.plan(spans))
        num = len(pieces)
        assert static.slot_T[num:].eq(-1).all()
        assert torch.equal(static.slot_T[:num], spans.slot_T)
        padded_TQD = torch.cat([q_TQD, torch.full((4 - num, 8, 128), float("nan"), dtype=q_TQD.dtype)])
        out_TQD = torch.full_like(padded_TQD, float("nan"))
        attend_(out_TQD, padded_TQD, case.kv_NCbD, static.block_table_SB, static.works[0], window=window, scale=SCALE)
        assert torch.equal(out_TQD[:num], torch.cat(attend(case, pieces, window)))
        assert not out_TQD[num:].any()


def test_a_step_that_does_not_fit_is_refused():
    case = random_case(8, 3, 60, 64, 1, 2, 16)
    attention = CudaAttention(make_shape(case, None, SCALE), None)
    static = attention.static_plan(2, 64, 16)
    for pieces in ([(s, 59, 60) for s in range(3)], [(0, 5, 9)], [(0, 3, 4), (1, 0, 5)]):
        with pytest.raises(ValueError, match="do not fit"):
            static.copy_(attention.plan(make_spans(case, pieces)[0]))


def test_an_empty_step():
    case = random_case(1, 1, 8, 64, 1, 2, 8)
    spans, _, _ = make_spans(case, [(0, 0, 1)])
    empty = type(spans)([0], [], 0, spans.block_table_SB[:0], spans.slot_T[:0], 8)
    assert make_plan(empty, queries=8, segment=512, window=None).works == ()


def test_shapes_that_are_not_computed_are_refused():
    case = random_case(1, 1, 4, 264, 1, 1, 8)
    with pytest.raises(ValueError, match="head_dim"):
        make_attention(make_shape(case, None, 1.0), None)
    case = random_case(1, 1, 4, 16, 1, 65, 8)
    with pytest.raises(ValueError, match="query heads"):
        make_attention(make_shape(case, None, 1.0), None)


def test_splits():
    assert choose_splits(1, 4, 128, 4096) == 128
    assert choose_splits(132, 4, 128, 4096) == 1, "enough programs without"
    assert choose_splits(100, 4, 512, 4096) == 1, "a workspace beyond bounds"
    assert count_segments(0, 511, 512, None) == 1
    assert count_segments(511, 512, 512, None) == 2
    assert count_segments(1022, 1022, 512, 512) == 2
    assert count_segments(1023, 1023, 512, 512) == 1
    assert CPU.type == "cpu"
