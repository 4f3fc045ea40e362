"""``moestro experts`` against a gateway in this process."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import Result
from rich.console import Console
from tests.cluster.expert_cluster import DENSE, Cluster, FakeGroup, in_thread, report_of
from tests.cluster.servers import ROOT
from typer.testing import CliRunner

from moestro.cluster.cli.experts_view import age, layer_table, ranges
from moestro.cluster.cli.main import app
from moestro.protos.errors import ConfigError, InvalidRequest
from moestro.protos.experts import PlacementRequest

REPORT = report_of(16, 4, 3)


@pytest.fixture(scope="module")
def it() -> Iterator[Cluster]:
    with in_thread(FakeGroup("group-0", REPORT), FakeGroup("group-1", REPORT)) as cluster:
        yield cluster


@pytest.fixture
def asked(it: Cluster) -> list[list[PlacementRequest]]:
    """What each group is asked for in this test."""
    for group in it.groups:
        group.asked.clear()
    return [group.asked for group in it.groups]


def experts(it: Cluster, *arguments: str, width: int = 140) -> Result:
    command = ["experts", "--address", it.address, *arguments]
    return CliRunner().invoke(app, command, env={"COLUMNS": str(width), "TERM": "dumb"})


def shown(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("width", [80, 140, 250])
def test_the_overview_has_all_there_is_and_fits_the_terminal(it: Cluster, width: int) -> None:
    text = shown(experts(it, width=width))
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert lines[0].startswith("group-0  epoch 3  MixtureModel  16 experts in 3 layers, 5 slots on each of 4")
    assert any(line.startswith("group-1") for line in lines)
    rows = [line.split() for line in lines if line.startswith("    1  ")]
    assert len(rows) == 2  # of each group
    heat, balance = rows[0][1], float(rows[0][2])
    cell = len(heat) // 16
    assert cell == min(4, (width - 36) // 16)
    assert [i // cell for i, glyph in enumerate(heat) if glyph == "█"] == [1] * cell  # the hot one
    assert balance == pytest.approx(REPORT.layers[0].balancedness, abs=0.005)
    assert "1 (5.7 x mean)" in text
    assert "load by the layer's mean:" in text
    words = " ".join(text.split())
    assert "rebalancer on, observing; since the start 3.0 MiB moved, 2 layers switched, 1 undone" in words
    kept = (
        "1 min kept (load) layers 1-2: 3.0 MiB, predicted gain 2500.0 ms for 250.0 ms, stall 4.0 ms, realised 2250.0 ms"
    )
    assert kept in words


def test_ranks_with_their_shares(it: Cluster) -> None:
    text = shown(experts(it, "--group", "group-1"))
    assert "group-0" not in text
    row = next(line.split() for line in text.splitlines() if " 4000 " in line)
    assert [cell for cell in row if cell not in ("│", "|")] == [
        "3", "77", "4000", "40", "%", "5.00", "1.50", "4.00", "128", "40", "%",
    ]  # fmt: skip


def test_one_layer_in_detail(it: Cluster) -> None:
    text = shown(experts(it, "--group", "group-0", "--layer", "2"))
    hot = next(line for line in text.splitlines() if " 150 " in line)
    cells = [cell.strip() for cell in hot.replace("|", "│").split("│")]
    assert cells[1:6] == ["1", "150", "5.73", "2", "0, 3"]
    assert sum(line.count(" 1 │ ") for line in text.splitlines()) >= 15  # the others have one replica each
    wrong = experts(it, "--layer", "7")
    assert wrong.exit_code == 2
    assert "layer 7 has no experts; those with experts: 1-3" in wrong.output


def test_the_ledger_alone(it: Cluster) -> None:
    text = shown(experts(it, "--group", "group-0", "--decisions"))
    assert "ranks" not in text.replace("4 ranks", "")
    assert [outcome in text for outcome in ("refused", "kept", "loading")] == [True] * 3
    assert "gain below cost (4 times in a row)" in text
    assert text.count("realised") == 1  # what was not measured is not shown as zero


def test_json_is_the_full_matrix(it: Cluster, tmp_path: Path) -> None:
    file = tmp_path / "experts.json"
    assert shown(experts(it, "--json", str(file))) == ""
    tree = json.loads(file.read_text())
    assert tree == json.loads(shown(experts(it, "--json", "-")))
    group = tree["groups"][1]
    assert (group["group"], group["epoch"], group["num_experts"]) == ("group-1", 3, 16)
    for got, layer in zip(group["layers"], REPORT.layers, strict=True):
        assert (got["layer"], tuple(got["load"]), got["balancedness"]) == (layer.layer, layer.load, layer.balancedness)
        assert tuple(map(tuple, got["slots"])) == layer.slots
    assert [each["outcome"] for each in group["decisions"]] == ["refused", "kept", "loading"]
    nowhere = experts(it, "--json", str(tmp_path / "no" / "file"))
    assert isinstance(nowhere.exception, ConfigError)


def test_a_picture(it: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "experts.png"
    assert shown(experts(it, "--png", str(file))) == ""
    assert file.read_bytes().startswith(b"\x89PNG\r\n")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    without = experts(it, "--png", str(file))
    assert isinstance(without.exception, ConfigError)
    assert "install moestro[bench]" in str(without.exception)


@pytest.mark.parametrize(
    ("arguments", "request_"),
    [
        (("--even",), PlacementRequest(even=True)),
        (("--random", "0"), PlacementRequest(random_seed=0)),
        (("--no-rebalance",), PlacementRequest(rebalance=False)),
        (("--even", "--rebalance"), PlacementRequest(even=True, rebalance=True)),
    ],
)
def test_moving(
    it: Cluster, asked: list[list[PlacementRequest]], arguments: tuple[str, ...], request_: PlacementRequest
) -> None:
    assert shown(experts(it, "move", *arguments)).startswith("group-0, group-1: ")
    assert shown(experts(it, "move", *arguments, "--group", "group-1")).startswith("group-1: ")
    assert asked == [[request_], [request_, request_]]


def test_a_subcommand_finds_its_address_before_or_behind(it: Cluster, asked: list[list[PlacementRequest]]) -> None:
    shown(CliRunner().invoke(app, ["experts", "move", "--even", "--address", it.address]))
    shown(experts(it, "--group", "group-0", "move", "--even"))
    assert [len(each) for each in asked] == [2, 1]


@pytest.mark.parametrize("arguments", [(), ("--even", "--random", "3"), ("--random", "-1")])
def test_what_cannot_be_meant(it: Cluster, asked: list[list[PlacementRequest]], arguments: tuple[str, ...]) -> None:
    assert experts(it, "move", *arguments).exit_code == 2
    assert asked == [[], []]


def test_a_saved_placement_comes_back(it: Cluster, asked: list[list[PlacementRequest]], tmp_path: Path) -> None:
    file = tmp_path / "placement.json"
    assert "group-0: 3 layers" in shown(experts(it, "save", str(file), "--group", "group-0"))
    shown(experts(it, "move", "--from", str(file), "--no-rebalance"))
    wanted = PlacementRequest(layers=tuple(layer.slots for layer in REPORT.layers), rebalance=False)
    assert asked == [[wanted], [wanted]]

    several = experts(it, "save", str(file))
    assert several.exit_code == 2
    assert "one group a file; the cluster has group-0, group-1" in several.output
    nowhere = experts(it, "save", str(tmp_path / "no" / "file"), "--group", "group-0")
    assert isinstance(nowhere.exception, ConfigError)


def test_a_placement_of_another_model_stays_here(it: Cluster, tmp_path: Path) -> None:
    file = tmp_path / "placement.json"
    shown(experts(it, "save", str(file), "--group", "group-0"))
    other = FakeGroup("group-0", report_of(16, 2, 3))
    with in_thread(other) as elsewhere:
        refused = experts(elsewhere, "move", "--from", str(file))
    assert isinstance(refused.exception, ConfigError)
    assert "world_size must be 2 here, got 4" in str(refused.exception)
    assert other.asked == []


def test_a_dense_model_has_nothing_to_show(tmp_path: Path) -> None:
    with in_thread(FakeGroup("group-0", DENSE)) as it:
        assert "DenseModel has no mixture layers: nothing to show" in shown(experts(it))
        assert "nothing has been decided yet" in shown(experts(it, "--decisions"))
        assert "the model has no mixture layers" in experts(it, "--layer", "0").output
        assert json.loads(shown(experts(it, "--json", "-")))["groups"][0]["layers"] == []
        moved = experts(it, "move", "--even")
        assert isinstance(moved.exception, InvalidRequest)
        assert "no mixture layers" in str(moved.exception)
        file = str(tmp_path / "x")
        for arguments in (("--png", file), ("save", file), ("move", "--from", file)):
            refused = experts(it, *arguments).exception
            assert isinstance(refused, ConfigError)
            assert "no mixture layers" in str(refused)


def test_words() -> None:
    assert [ranges(each) for each in ((), (4,), (7, 1, 2, 3), (1, 3, 5, 6))] == ["", "4", "1-3, 7", "1, 3, 5-6"]
    assert [age(each) for each in (0.4, 59, 60, 3599, 7200)] == ["0 s", "59 s", "1 min", "60 min", "2 h"]


@pytest.mark.parametrize("module", ["gateway", "cli.experts", "cli.experts_view", "metrics.server"])
def test_neither_gateway_nor_command_line_load_torch(module: str) -> None:
    code = f"import sys, moestro.cluster.{module}; print([m for m in ('torch', 'ray') if m in sys.modules])"
    seen = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT / "src")}, capture_output=True, text=True, check=True
    )
    assert seen.stdout.strip() == "[]"


def test_ranks_are_called_as_the_status_calls_them_when_others_are_missing() -> None:
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(layer_table(report_of(4).layers[0], [0, 2]))
    rows = [[cell.strip() for cell in line.split("│")] for line in console.export_text().splitlines()]
    assert [row[5] for row in rows if row[1:2] in (["0"], ["1"], ["2"])] == ["0", "0, 2", "2"]
