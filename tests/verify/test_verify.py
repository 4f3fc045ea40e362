"""verify against a real server: green on an engine that is invariant by construction, red on a planted violation."""

from __future__ import annotations

import asyncio
import json
import re
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
from tests.verify.engines import invariant, planted, planted_in_kernel
from tests.verify.serving import Change, serving
from typer.testing import CliRunner, Result

from moestro.cluster.cli.main import app
from moestro.cluster.verify import suite
from moestro.cluster.verify.grpc_target import GrpcTarget
from moestro.cluster.verify.perturbations import PERTURBATIONS
from moestro.cluster.verify.run import Report, verify

ONE_RANK = {"other rank", "other group"}  # do not apply to a server of one rank
needs_invariant_kernels = pytest.mark.skipif(
    find_spec("moestro.kernels.row_tiles") is None, reason="the kernels depend on the batch"
)


def report_of(
    checkpoint: Path | None,
    change: Change,
    names: tuple[str, ...],
    num_requests: int,
    seed: int,
    dtype: str = "float32",
) -> Report:
    async def scenario() -> Report:
        async with serving(checkpoint, dtype, change) as address, GrpcTarget(address, "", 60.0) as target:
            return await verify(target, num_requests, seed, names)

    return asyncio.run(asyncio.wait_for(scenario(), 120))


def command(checkpoint: Path, change: Change, *arguments: str) -> Result:
    """The command in a thread of its own, the server on this one's loop."""

    async def scenario() -> Result:
        async with serving(checkpoint, "float32", change) as address:
            runner = CliRunner()
            asked = ["verify", "--address", address, *arguments]
            return await asyncio.to_thread(runner.invoke, app, asked, env={"COLUMNS": "200", "TERM": "dumb"})

    return asyncio.run(asyncio.wait_for(scenario(), 120))


def test_an_invariant_engine_is_equal_under_every_perturbation(checkpoint: Path) -> None:
    report = report_of(checkpoint, invariant, tuple(PERTURBATIONS), num_requests=8, seed=1)
    assert [row.perturbation for row in report.rows] == list(PERTURBATIONS)
    for row in report.rows:
        if row.perturbation in ONE_RANK | {"rebalanced"}:
            assert row.compared is None, row
            assert row.note
            continue
        assert row.compared is not None, row
        assert row.compared.difference is None, row
        assert row.num_requests in (8, 16)
        assert min(row.compared.tokens, row.compared.logprobs, row.compared.hidden_states) > 100, row
    assert report.is_equal
    notes = {row.perturbation: row.note for row in report.rows}
    assert notes["other rank"] == "one rank"
    assert re.fullmatch(r"[1-9]\d* preemptions", notes["preempted"])
    assert re.search(r"beside ([89]|[1-9]\d+) other requests", notes["crowd"])


@pytest.mark.parametrize("layer", [3, 0])
def test_a_tile_size_that_depends_on_the_batch_is_found_with_its_layer(checkpoint: Path, layer: int) -> None:
    report = report_of(checkpoint, partial(planted, in_layer=layer), ("again", "chunked by 1"), num_requests=8, seed=2)
    again, chunked = report.rows
    assert again.is_equal, "alone nothing differs: only comparing with another batch shows it"
    assert not report.is_equal
    assert chunked.compared is not None
    difference = chunked.compared.difference
    assert difference is not None
    assert difference.layer == layer
    assert difference.position is not None
    assert difference.index is not None
    assert chunked.num_different > 0


@needs_invariant_kernels
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_demo_is_equal_and_with_a_planted_fault_is_not(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "MAX_PROMPT", 150)  # quicker, and still more than one chunk of attention
    names = "crowd", "order", "chunked by 1", "preempted", "cached"
    honest = report_of(None, lambda model: model, names, num_requests=5, seed=3, dtype=dtype)
    assert honest.is_equal, [row.compared for row in honest.rows]
    faulty = report_of(None, partial(planted_in_kernel, in_layer=3), names[2:3], num_requests=5, seed=3, dtype=dtype)
    compared = faulty.rows[0].compared
    assert compared is not None
    assert compared.difference is not None
    assert compared.difference.layer == 3


def test_the_command_says_so_and_exits_with_1(checkpoint: Path) -> None:
    arguments = ("--requests", "4", "--perturbation", "chunked", "--perturbation", "other rank")
    result = command(checkpoint, partial(planted, in_layer=3), *arguments)
    assert result.exit_code == 1, result.output
    said = " ".join(result.stdout.split())
    assert re.search(
        r"chunked by 1: request \d \([a-z0-9, -]+\), choice \d, (prompt logprob|token|logprob) \d+: ", said
    )
    assert re.search(r"first differs at position \d+, after layer 3\b", said)
    assert "not applicable: one rank" in said
    assert "The answers depend on the cluster" in said
    assert "Not applicable, and so not proved: other rank." in said


def test_the_command_exits_with_0_when_all_is_equal(checkpoint: Path) -> None:
    result = command(checkpoint, invariant, "--requests", "3", "--perturbation", "order", "--seed", "5", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["equal"], told["requests"], told["seed"], told["home"]) == (True, 3, 5, "local")
    (row,) = told["perturbations"]
    assert (row["perturbation"], row["applies"], row["equal"], row["different"]) == ("order", True, True, 0)
    assert row["tokens"] > 0
    assert row["hidden_states"] > 0


def test_comparing_nothing_proves_nothing(checkpoint: Path) -> None:
    result = command(checkpoint, invariant, "--requests", "1", "--perturbation", "other group")
    assert result.exit_code == 1, result.output
    assert "Nothing was compared." in result.stdout


def test_an_unknown_perturbation_and_nobody_there(checkpoint: Path) -> None:
    runner = CliRunner()
    wrong = runner.invoke(app, ["verify", "--perturbation", "sideways"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert wrong.exit_code == 2
    assert "must be one of again, crowd" in wrong.output
    assert "not 'sideways'" in wrong.output
