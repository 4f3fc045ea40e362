import copy
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.protos.errors import ConfigError
from moestro.router.balance import Topology, balance
from moestro.router.placement import Placement, spread
from moestro.router.placement_file import Shape, load_placements, save_placements

SHAPE = Shape("Qwen3MoeForCausalLM", 2, 4, 2, 3)
PLACEMENTS = (Placement(4, ((0, 1, -1), (2, 3, 0))), Placement(4, ((3, 2, 1), (0, -1, -1))))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("placements")


@pytest.fixture(scope="module")
def before(folder: Path) -> dict[str, object]:
    """What a good file holds."""
    path = folder / "before.json"
    save_placements(path, SHAPE, PLACEMENTS)
    content = json.loads(path.read_text())
    path.unlink()
    return content


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_placements(tmp_path / "p.json", SHAPE, PLACEMENTS)
    return tmp_path / "p.json"


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 5), st.integers(0, 3), st.integers(0, 2**32 - 1))
def test_what_is_saved_is_loaded(folder: Path, layers: int, experts: int, ranks: int, spare: int, seed: int) -> None:
    capacity = -(-experts // ranks) + spare
    load_LE = np.random.default_rng(seed).lognormal(0, 1, (layers, experts))
    placements = balance(load_LE, Topology.regular(ranks, ranks), capacity)
    shape = Shape("Some", layers, experts, ranks, capacity)
    save_placements(folder / "same.json", shape, placements)
    assert load_placements(folder / "same.json", shape) == placements
    assert [entry.name for entry in folder.iterdir()] == ["same.json"], "a temporary file is left"


# What a hand may do to a file: where, what is there then, and what is said about it.
EDITS = [
    (["format"], "something else", 'not a placement file: it has no "format"'),
    (["version"], 2, "version must be 1, got 2"),
    (["version"], "1", 'version must be an integer, got "1"'),
    (["model"], [], r"model must be an object, got \[\]"),
    (["model", "architecture"], "Other", 'model.architecture: this model is Qwen3MoeForCausalLM, got "Other"'),
    (["model", "num_layers"], 3, "model.num_layers must be 2 here, got 3"),
    (["model", "num_experts"], 8, "model.num_experts must be 4 here, got 8"),
    (["model", "num_experts"], 4.0, "model.num_experts must be an integer, got 4.0"),
    (["world_size"], 4, "world_size must be 2 here, got 4"),
    (["world_size"], True, "world_size must be an integer, got true"),
    (["capacity"], 2, "capacity must be 3 here, got 2"),
    (["layers"], None, "layers must be a list, got null"),
    (["layers"], [[[0, 1, -1], [2, 3, 0]]], "layers must have 2 entries, got 1"),
    (["layers", 1], [[0, 1, 2]], r"layers\[1\] must have 2 entries, got 1"),
    (["layers", 1, 0], [0, 1], r"layers\[1\]\[0\] must have 3 entries, got 2"),
    (["layers", 1, 0], 7, r"layers\[1\]\[0\] must be a list, got 7"),
    (["layers", 0, 1, 2], 4, r"layers\[0\]: slots\[1\]: expert must be in \[0, 4\), got 4"),
    (["layers", 0, 1, 2], -2, r"layers\[0\]: slots\[1\]: expert must be in \[0, 4\), got -2"),
    (["layers", 0, 1, 2], 3, r"layers\[0\]: slots\[1\]: an expert is placed twice on one rank"),
    (["layers", 0, 1, 0], -1, r"layers\[0\]: slots: no rank holds experts \[2\]"),
    (["layers", 0, 1, 0], "2", r'layers\[0\]\[1\]\[0\] must be an integer, got "2"'),
    (["layers", 0, 1, 0], True, r"layers\[0\]\[1\]\[0\] must be an integer, got true"),
    (["layers", 0, 1, 0], None, r"layers\[0\]\[1\]\[0\] must be an integer, got null"),
]


@pytest.mark.parametrize(("where", "value", "message"), EDITS)
def test_a_file_edited_wrong_is_refused_with_the_reason(saved: Path, where, value, message: str) -> None:
    content = json.loads(saved.read_text())
    place = content
    for key in where[:-1]:
        place = place[key]
    place[where[-1]] = value
    saved.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=message) as error:
        load_placements(saved, SHAPE)
    assert str(error.value).startswith(f"{saved}: ")


@pytest.mark.parametrize("key", ["format", "version", "model", "world_size", "capacity", "layers"])
def test_a_field_that_is_missing_is_named(saved: Path, key: str) -> None:
    content = json.loads(saved.read_text())
    del content[key]
    saved.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=key):
        load_placements(saved, SHAPE)


def test_every_truncation_is_refused(saved: Path) -> None:
    whole = saved.read_bytes()
    for length in range(len(whole) - 1):  # the last character is the end of the line
        saved.write_bytes(whole[:length])
        with pytest.raises(ConfigError, match="not JSON"):
            load_placements(saved, SHAPE)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 6) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(st.data())
def test_whatever_is_in_the_file_it_is_refused_or_means_what_it_says(folder: Path, before, data) -> None:
    """Anything put in any place: no other error, and nothing accepted but placements of this shape."""
    path = folder / "mutated.json"
    place = content = copy.deepcopy(before)
    while True:
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(JSON)
    path.write_text(json.dumps(content))
    try:
        loaded = load_placements(path, SHAPE)
    except ConfigError:
        return
    finally:
        path.unlink()
    assert [[list(rank) for rank in placement.slots] for placement in loaded] == content["layers"]
    assert {k: v for k, v in content.items() if k != "layers"} == {k: v for k, v in before.items() if k != "layers"}


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"", b"[" * 100_000, b"[]", b"7", b'{"format": NaN}'])
def test_what_is_no_placement_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "p.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"not JSON|not a placement file"):
        load_placements(tmp_path / "p.json", SHAPE)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.json: cannot be read: No such file"):
        load_placements(tmp_path / "none.json", SHAPE)


def test_a_failed_write_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="no space"):
        save_placements(saved, SHAPE, PLACEMENTS[::-1])
    assert load_placements(saved, SHAPE) == PLACEMENTS
    assert [entry.name for entry in saved.parent.iterdir()] == ["p.json"]


def test_placements_of_another_shape_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="placements must have 2 layers, got 1"):
        save_placements(tmp_path / "p.json", SHAPE, PLACEMENTS[:1])
    with pytest.raises(ValueError, match=r"placements\[1\]: experts, ranks and capacity must be \(4, 2, 3\)"):
        save_placements(tmp_path / "p.json", SHAPE, (PLACEMENTS[0], spread(4, 2)))
