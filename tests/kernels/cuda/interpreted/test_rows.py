"""The counting sort against torch's stable sort."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.kernels.cuda.rows import sort_pairs, tiles_of_sorted


def check_tiles(tiles, slots_R, num_slots, rows_of_tile):
    """Every row once, in the order of slots, none in a tile of another slot."""
    covered = []
    for slot, first, end in tiles.table_3B.T.tolist():
        if slot < 0:
            continue
        assert 0 < end - first <= rows_of_tile
        assert (slots_R[first:end] == slot).all()
        covered += range(first, end)
    assert covered == list(range(len(slots_R)))


@given(
    num_tokens=st.integers(1, 150),
    top_k=st.integers(1, 4),
    num_slots=st.sampled_from([1, 5, 15, 16, 40]),
    rows_of_tile=st.sampled_from([16, 64]),
    skew=st.sampled_from([0, 1, 6]),
    seed=st.integers(0, 99),
)
@settings(max_examples=15, deadline=None)
def test_sorted_as_torch_sorts(num_tokens, top_k, num_slots, rows_of_tile, skew, seed):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(num_tokens, top_k, generator=generator) ** (1 + skew)
    slots_TK = (spread * num_slots).long()
    tiles, counts_L = sort_pairs(slots_TK, num_slots, rows_of_tile)
    want_P = slots_TK.flatten().argsort(stable=True)
    assert tiles.order_P.tolist() == want_P.tolist()
    assert counts_L.tolist() == slots_TK.flatten().bincount(minlength=num_slots).tolist()
    check_tiles(tiles, slots_TK.flatten()[want_P], num_slots, rows_of_tile)


@pytest.mark.parametrize("counts", [[0, 0, 0], [3, 0, 0], [0, 16, 17], [33, 0, 1], [1] * 20])
@pytest.mark.parametrize("padding", [0, 40])
def test_tiles_of_sorted_rows(counts, padding):
    slots_R = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    tiles = tiles_of_sorted(torch.tensor(counts), sum(counts) + padding, 16)
    assert tiles.order_P is None
    check_tiles(tiles, slots_R, len(counts), 16)
