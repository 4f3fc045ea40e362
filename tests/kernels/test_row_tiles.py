"""Which row counts a product is called with, and that a library which picks its kernel by the rows is seen through."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from moestro.kernels.row_tiles import REFERENCE_ROWS, RowTiles, agreeing_rows, cancelling_operands, row_counts

COUNTS = st.sets(st.sampled_from(row_counts(4096)), min_size=1).map(lambda counts: RowTiles(tuple(sorted(counts))))


@given(tiles=COUNTS, rows=st.integers(0, 3000))
def test_calls_cover_the_rows_with_allowed_counts(tiles: RowTiles, rows: int) -> None:
    calls = tiles.cut(rows)
    assert sum(wanted for wanted, _ in calls) == rows
    assert all(0 < wanted <= count and count in tiles.exact for wanted, count in calls)
    assert all(wanted == count for wanted, count in calls[:-1])


@given(rows=st.integers(1, 3000))
def test_padding_is_little_where_every_count_is_allowed(rows: int) -> None:
    calls = RowTiles(row_counts(4096)).cut(rows)
    assert sum(count for _, count in calls) - rows <= max(3, rows // 16)
    assert len(calls) <= 6


@given(tiles=COUNTS, rows=st.integers(0, 700))
def test_rows_come_back_in_order(tiles: RowTiles, rows: int) -> None:
    x_TI = torch.arange(2.0 * rows).view(rows, 2)
    seen: set[int] = set()

    def product(x_tI: torch.Tensor) -> torch.Tensor:
        seen.add(x_tI.shape[0])
        return x_tI.sum(1, keepdim=True)

    assert torch.equal(tiles.apply(product, x_TI, 1), x_TI.sum(1, keepdim=True))
    assert seen <= tiles.exact


def halves(x_TI: torch.Tensor, w_OI: torch.Tensor) -> torch.Tensor:
    """The same product, added up in another order."""
    half = x_TI.shape[1] // 2
    return (x_TI[:, :half].float() @ w_OI[:, :half].T.float()) + (x_TI[:, half:].float() @ w_OI[:, half:].T.float())


def test_a_row_count_with_another_order_is_not_allowed(dtype: torch.dtype) -> None:
    counts = row_counts(64)
    for out_features in (1, 7, 200):
        x_PI, w_OI = cancelling_operands(out_features, 90, dtype, torch.device("cpu"))

        def product(x_tI: torch.Tensor, w_OI: torch.Tensor = w_OI) -> torch.Tensor:
            if x_tI.shape[0] in (3, 32, 64):
                return halves(x_tI, w_OI).to(dtype)
            # One row at a time in fp64 is the same whatever the rows.
            return torch.cat([(row.double() @ w_OI.double().T).to(dtype).unsqueeze(0) for row in x_tI])

        allowed = agreeing_rows(product, x_PI, counts).exact
        assert allowed == set(counts) - {3, 32, 64}, out_features


def test_a_position_with_another_order_is_not_allowed() -> None:
    x_PI, w_OI = cancelling_operands(40, 64, torch.float32, torch.device("cpu"))

    def product(x_tI: torch.Tensor) -> torch.Tensor:
        out_tO = torch.cat([(row.double() @ w_OI.double().T).float().unsqueeze(0) for row in x_tI])
        out_tO[20:] = halves(x_tI, w_OI)[20:]
        return out_tO

    assert agreeing_rows(product, x_PI, row_counts(64)).counts == row_counts(20)


def test_without_agreement_only_the_reference_is_called() -> None:
    x_PI, w_OI = cancelling_operands(8, 64, torch.float32, torch.device("cpu"))
    tiles = agreeing_rows(lambda x: halves(x, w_OI) + x.shape[0], x_PI, row_counts(64))
    assert tiles.counts == (REFERENCE_ROWS,)
    assert tiles.cut(40) == [(16, 16), (16, 16), (8, 16)]


def test_the_operands_cancel(dtype: torch.dtype) -> None:
    x_PI, w_OI = cancelling_operands(50, 77, dtype, torch.device("cpu"))
    exact = x_PI.double() @ w_OI.double().T
    assert exact.abs().max() < 1e-12
    assert x_PI.abs().float().mean() > 0.5
