"""The command: its options, its errors, and a run from the shell's side against a real server."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator

import pytest
import typer
from tests.bench.stub_server import stub_server
from typer.testing import CliRunner

from moestro.cluster.cli.bench import bench

app = typer.Typer()
app.command()(bench)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A stub server on a thread with a loop of its own."""
    ready, holder = threading.Event(), {}

    async def serve() -> None:
        async with stub_server() as (_, where):
            holder.update(address=where, loop=asyncio.get_running_loop(), stop=asyncio.Event())
            ready.set()
            await holder["stop"].wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert ready.wait(10)
    yield holder["address"]
    holder["loop"].call_soon_threadsafe(holder["stop"].set)
    thread.join(10)


def invoke(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"})


def test_run_save_show_and_compare(address, tmp_path):
    saved, picture = tmp_path / "run.json", tmp_path / "run.png"
    run = ("--address", address, "--rate", 40, "--requests", 6, "--output", 3, "--warmup", 1, "--rounds", 2)
    first = invoke(*run, "--slo", "ttft=2s", "--json", saved, "--records", "--plot", picture)
    assert first.exit_code == 0, first.output
    assert "Time to first token" in first.output
    assert "6 of 6 completed" in first.output
    report = json.loads(saved.read_text())
    assert report["settings"]["load"] == "open loop, 40 requests/s, Poisson"
    assert [len(r["records"]) for r in report["rounds"]] == [6, 6]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path) not in saved.read_text()

    shown = invoke("--show", saved, "--compare", saved)
    assert shown.exit_code == 0, shown.output
    assert "1.000" in shown.output
    assert "differs" not in shown.output


def test_prompts_and_trace_come_from_files(address, tmp_path):
    prompts, trace, saved = tmp_path / "prompts.txt", tmp_path / "trace.jsonl", tmp_path / "run.json"
    prompts.write_text("def f(x):\n\nimport os\n")
    trace.write_text(
        "".join(json.dumps({"input_tokens": 9, "output_tokens": 2, "arrival_s": t / 10}) + "\n" for t in range(3))
    )
    result = invoke("--address", address, "--trace", trace, "--warmup", 0, "--json", saved)
    assert result.exit_code == 0, result.output
    report = json.loads(saved.read_text())
    assert report["settings"]["load"] == "open loop, at the times of the trace"
    assert report["rounds"][0]["metrics"]["input_tokens"] == 27
    assert report["settings"]["files"].startswith("trace.jsonl sha256:")

    result = invoke("--address", address, "--prompts", prompts, "--requests", 2, "--output", 2, "--json", saved)
    assert result.exit_code == 0, result.output
    assert json.loads(saved.read_text())["rounds"][0]["metrics"]["input_tokens"] == 6  # the server counts 3 a text


def test_failures_are_in_the_report_and_in_the_table(address):
    result = invoke("--address", address, "--concurrency", 2, "--requests", 2, "--output", 13, "--warmup", 0)
    assert result.exit_code == 0, result.output
    assert "2 of 2 requests failed with RESOURCE_EXHAUSTED: 32 requests wait already" in result.output


def test_nobody_there():
    result = invoke("--address", "127.0.0.1:1")
    assert result.exit_code == 1
    assert "no answer from 127.0.0.1:1: UNAVAILABLE" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rate", "-1"), "--rate must be a finite number above 0, got -1"),
        (("--rate", "1", "--concurrency", "2"), "--rate and --concurrency exclude each other"),
        (("--requests", "0"), "--requests must be between 1 and 1e+06, got 0"),
        (("--duration", "5"), "--duration must be a number with a unit"),
        (("--output", "uniform:min=9,max=2"), "--output: min must not exceed max, got min=9, max=2"),
        (("--slo", "ttft=fast"), "--slo ttft must be a number with a unit"),
        (("--rounds", "0"), "--rounds must be between 1 and 1000, got 0"),
        (("--channels", "0"), "--channels must be between 1 and 256, got 0"),
        (("--trace", "no-such-file"), "--trace cannot be read"),
        (("--json", "no-such-folder/x.json"), "the folder of no-such-folder/x.json must exist"),
        (("--compare", "no-such-file"), "--compare cannot be read"),
    ],
)
def test_bad_options_are_named(arguments, message):
    result = invoke(*arguments, "--address", "127.0.0.1:1")
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


def test_a_request_that_cannot_fit_is_refused_before_the_run(address):
    result = invoke("--address", address, "--input", 300)
    assert result.exit_code == 2
    assert "context of 256 tokens" in " ".join(result.output.replace("│", " ").split())
