"""The table of tiles: whole, and what the tuning command writes."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from benchmarks.tune_tiles import EXPERT_KERNELS, MODELS, TABLE, candidates, cases, default_entries, dump, merged
from tests.kernels.cuda.hopper import MAX_SHARED_BYTES

from moestro.kernels.cuda.tiles import KERNELS, ROWS, Tile, bucket, default_tile, h200, part_width, read_table


def test_what_is_not_measured_is_the_default_rule():
    table = h200()
    for key, choices in table.tiles.items():
        if key not in table.measured:
            assert choices == [(rows, default_tile(*key, rows)) for rows in ROWS]


def test_every_case_of_the_models_is_listed():
    assert {key for model in MODELS.values() for key in cases(model)} <= set(h200().tiles)


def test_gate_up_and_down_share_their_rows():
    for model in MODELS.values():
        for gate_up, down in EXPERT_KERNELS:
            for rows in ROWS:
                first = h200().choose(gate_up, 2 * model.width, model.hidden, rows)
                assert first.rows == h200().choose(down, model.hidden, model.width, rows).rows


def test_written_and_read_again(tmp_path):
    path = tmp_path / "table.json"
    path.write_text(dump(default_entries()), encoding="utf-8")
    assert dump(merged(read_table(path), [])) == path.read_text(encoding="utf-8")
    tuned = {**default_entries()[0], "measured": True}
    path.write_text(dump(merged(read_table(TABLE), [tuned])), encoding="utf-8")
    table = read_table(path)
    assert (tuned["kernel"], tuned["out_features"], tuned["in_features"]) in table.measured
    assert len(table.tiles) == len(h200().tiles)


def test_an_unlisted_shape_gets_the_default():
    assert h200().choose("linear", 48, 80, 16) == default_tile("linear", 48, 80, 16)


def test_more_rows_than_the_last_bucket():
    assert [bucket(rows) for rows in (0, 1, 16, 17, 1024, 99999)] == [16, 16, 16, 32, 1024, 1024]
    assert h200().choose("down", 2048, 768, 99999) == h200().choose("down", 2048, 768, 1024)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("rows", ROWS)
def test_candidates_are_possible_tiles(kernel, rows):
    tiles = candidates(kernel, rows)
    assert tiles
    for tile in [*tiles, default_tile(kernel, 4096, 4096, rows)]:
        assert isinstance(tile, Tile)
        assert tile.out % 64 == 0
        assert tile.rows >= 16
        assert tile.warps % 4 == 0
        assert tile.stages * tile.features * tile.out <= MAX_SHARED_BYTES


@pytest.mark.parametrize(
    ("shape", "parts"), [((5120, 2048), 2), ((2048, 4096), 8), ((151936, 2048), 1), ((128, 512), 1)]
)
def test_parts_follow_from_the_shape(shape, parts):
    width = part_width(*shape)
    assert -(-shape[1] // width) == parts
    assert width == shape[1] or width % 256 == 0  # every block of features divides it
