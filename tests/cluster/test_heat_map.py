"""How loads become shades."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.cluster.cli.heat_map import MAX_CELL, bin_loads, heat_row, legend, shade

LOADS = st.lists(st.integers(0, 10**6), min_size=1, max_size=600)


@given(LOADS, st.integers(1, 300))
@settings(max_examples=100)
def test_bins_cover_every_expert_and_hide_no_hot_one(load: list[int], num_bins: int) -> None:
    bins = bin_loads(load, num_bins)
    assert len(bins) == min(len(load), num_bins)
    mean = sum(load) / len(load)
    assert max(bins) * mean == pytest.approx(max(load))
    assert all(relative >= 0 for relative in bins)
    if len(load) <= num_bins:
        assert [relative * mean for relative in bins] == pytest.approx(load)


@given(st.integers(1, 100), st.integers(1, 120))
@settings(max_examples=50)
def test_neighbours_share_a_bin_as_evenly_as_whole_experts_allow(num_experts: int, num_bins: int) -> None:
    # One hot expert at a time shows which bin is its own.
    homes = []
    for expert in range(num_experts):
        bins = bin_loads([int(e == expert) for e in range(num_experts)], num_bins)
        homes.append(bins.index(max(bins)))
        assert sum(relative > 0 for relative in bins) == 1
    sizes = [homes.count(home) for home in range(min(num_experts, num_bins))]
    assert homes == sorted(homes)
    assert max(sizes) - min(sizes) <= 1


def test_no_load_is_no_heat() -> None:
    assert bin_loads([0] * 9, 4) == (0.0,) * 4
    assert heat_row([0, 0], 10).plain == "·" * 2 * MAX_CELL


def test_shades_grow_with_the_load() -> None:
    glyphs = [shade(relative)[0] for relative in (0, 0.01, 0.49, 0.5, 1, 1.49, 1.5, 2.9, 3, 1000)]
    assert glyphs == ["·", "░", "░", "▒", "▒", "▒", "▓", "▓", "█", "█"]
    assert len({shade(relative) for relative in (0, 0.1, 1, 2, 4)}) == 5


@given(LOADS, st.integers(1, 200))
@settings(max_examples=100)
def test_a_row_fits_its_width(load: list[int], width: int) -> None:
    row = heat_row(load, width)
    assert min(len(load), width) <= row.cell_len <= width


def test_the_legend_says_when_experts_share_a_column() -> None:
    assert "busiest of up to 3 experts" in legend(256, 100).plain
    assert "experts)" not in legend(100, 100).plain
