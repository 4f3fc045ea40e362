"""What becomes of streams when a part of the cluster that no token passes through is lost or replaced: one cluster of
two groups behind two gateways. The tests share it and run in this order.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import pytest
from benchmarks.steady_load import Asked, SteadyLoad
from tests.cluster.servers import Server, free_port, run, serving, until

from moestro.cluster.client import Client
from moestro.cluster.client_calls import CHANNEL_OPTIONS
from moestro.cluster.client_results import ClusterStatus
from moestro.protos.errors import Unavailable

PROMPT = [5, 17, 200, 33, 71, 9]
LONG = 1000
PATIENT = "[recovery]\nwatchdog_s = 60.0\n"  # nothing hangs here, however slow the machine is


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[Server]:
    options = ("--groups", 2, "--dp", 1, "--gateways", 2, "--port", free_port())
    with serving(checkpoint, *options, settings=PATIENT) as server:
        yield server


# A connection of its own for each client, so that the kernel spreads them over the gateways, and patience with a
# machine that is slow to accept it.
OWN = {"grpc.use_local_subchannel_pool": 1, "grpc.min_reconnect_backoff_ms": 20_000}


def connect(server: Server) -> Client:
    with patch("moestro.cluster.client.CHANNEL_OPTIONS", tuple((dict(CHANNEL_OPTIONS) | OWN).items())):
        return server.client()


def ask(server: Server, max_tokens: int = 8) -> tuple[int, ...]:
    with connect(server) as client:
        answer = client.generate(PROMPT, max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        return tuple(answer.choices[0].token_ids)


def stream(server: Server, max_tokens: int) -> tuple[int, ...]:
    """As a user has it: what is cut off is resumed."""
    with Client(server.address, timeout_s=240.0) as client:
        events = client.stream(PROMPT, max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        return tuple(token for event in events for delta in event.deltas for token in delta.token_ids)


def status(server: Server) -> ClusterStatus:
    with connect(server) as client:
        return client.status()


def picture(server: Server) -> list[tuple[str, int, list[str]]]:
    return [(group.name, group.epoch, [rank.state for rank in group.ranks]) for group in status(server).groups]


def blocks_used(server: Server) -> int:
    return sum(rank.kv_blocks_used for group in status(server).groups for rank in group.ranks)


SERVING = [("group-0", 1, ["serving"]), ("group-1", 1, ["serving"])]


def test_a_killed_directory_is_rebuilt_and_nobody_notices(server: Server) -> None:
    expected = ask(server, LONG)
    with ThreadPoolExecutor(4) as pool:
        streams = [pool.submit(ask, server, LONG) for _ in range(4)]
        time.sleep(0.3)
        (directory,) = server.find("moestro:Directory")
        directory.kill()
        while not all(stream.done() for stream in streams):
            assert ask(server) == expected[:8]
            assert picture(server) == SERVING
        assert [stream.result() for stream in streams] == [expected] * 4
    until(lambda: bool(server.find("moestro:Directory")), 20.0)
    began_s = time.monotonic()
    while time.monotonic() < began_s + 3.0:  # the new one hears of everybody meanwhile
        assert picture(server) == SERVING
        assert ask(server) == expected[:8]
    assert server.lines[5:] == []


def test_a_killed_gateway_takes_only_its_own_connections(server: Server) -> None:
    expected = ask(server, LONG)
    clients = [connect(server) for _ in range(8)]
    streams = [client.stream(PROMPT, max_tokens=LONG, temperature=0.0, ignore_eos=True) for client in clients]
    for stream in streams:
        next(stream)
    server.find("moestro:Gateway")[0].kill()

    def rest(index: int) -> str:
        try:
            ids = [token for event in streams[index] for delta in event.deltas for token in delta.token_ids]
        except Unavailable:
            return "cut"
        assert tuple(ids) == expected[-len(ids) :]
        return "ended"

    with ThreadPoolExecutor(8) as pool:
        fates = list(pool.map(rest, range(8)))
    assert set(fates) <= {"cut", "ended"}
    assert "ended" in fates
    until(lambda: blocks_used(server) == 0, 10.0)
    for client in clients:
        client.close()
    until(lambda: len(server.find("moestro:Gateway")) == 2, 20.0)
    assert [ask(server) for _ in range(4)] == [expected[:8]] * 4


def change(server: Server, *arguments: object) -> subprocess.CompletedProcess[str]:
    """``auto`` might find another Ray of this machine."""
    return run(server.home, *arguments, "--ray-address", server.ray_address)


def told(server: Server, words: str) -> int:
    return sum(words in line for line in server.lines[5:])


@pytest.mark.long
def test_it_shrinks_and_is_replaced_and_grows_under_load_without_a_failed_request(server: Server) -> None:
    asked = [Asked.of(seed, vocab_size=250, max_tokens=100) for seed in range(8)]
    config = server.home / "update.toml"
    config.write_text("[scheduler]\nmax_num_tokens = 512\n")
    expected = ask(server, LONG)
    with SteadyLoad(server.address, asked, clients=3, seed=0) as load, ThreadPoolExecutor(1) as pool:
        shrunk = change(server, "scale", "--groups", 1, "--gateways", 1)
        long = pool.submit(stream, server, 3 * LONG)  # longer than anybody waits for it
        updated = change(server, "update", "--config", config)
        grown = change(server, "scale", "--groups", 2)
        assert long.result()[:LONG] == expected
        assert len(long.result()) == 3 * LONG
    assert load.tally.is_clean, load.tally
    commands = (shrunk, updated, grown)
    assert [each.returncode for each in commands] == [0, 0, 0], [each.stderr for each in commands]
    assert shrunk.stderr.endswith("1 group of dp 1 x tp 1, 1 gateway\n")
    assert updated.stderr.count("serves, epoch") == 1
    assert updated.stderr.endswith("updated: 1 group of dp 1 x tp 1, 1 gateway\n")
    assert re.search(r"group-\d serves, epoch \d\n2 groups of dp 1 x tp 1, 1 gateway\n$", grown.stderr)
    assert len(server.find("ray::Rank")) == 2
    assert len(server.find("moestro:Gateway")) == 1
    # The one in the foreground tells the same.
    until(lambda: told(server, "serves, epoch") == told(server, "has left") == 2, 20.0)
    assert told(server, "lost") == 0


def test_what_cannot_change_while_it_serves_is_refused(server: Server, tmp_path: Path) -> None:
    config = tmp_path / "update.toml"
    config.write_text('[model]\ndtype = "float32"\n')
    refused = change(server, "update", "--config", config)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == (
        "error: model.dtype: cannot change while the cluster serves: it is 'auto', got 'float32'\n"
    )
    refused = change(server, "scale", "--groups", 0)
    assert refused.returncode == 1
    assert "cluster.groups" in refused.stderr
    assert "greater than or equal to 1" in refused.stderr
