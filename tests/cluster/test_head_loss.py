"""Ray's head is lost with all that runs on it, and another takes its place: `make test-head`."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from tests.cluster.ray_nodes import TwoNodes, two_nodes
from tests.cluster.servers import SMALL, free_port, moestro, until

from moestro.cluster.client import Client

pytestmark = pytest.mark.long

PROMPT = [5, 17, 200, 33, 71, 9]
AWAY_S = 30.0  # longer than anybody is given to report


@dataclass
class Served:
    nodes: TwoNodes
    address: str
    foreground: subprocess.Popen[bytes]

    def ask(self, max_tokens: int) -> tuple[int, ...]:
        with Client(self.address, timeout_s=60.0) as client:
            answer = client.generate(PROMPT, max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
            return tuple(answer.choices[0].token_ids)

    def picture(self) -> list[tuple[str, int, list[str]]]:
        with Client(self.address, timeout_s=60.0) as client:
            groups = client.status().groups
        return [(group.name, group.epoch, [rank.state for rank in group.ranks]) for group in groups]


@pytest.fixture(scope="module")
def served(checkpoint: Path) -> Iterator[Served]:
    with two_nodes() as nodes:
        config = nodes.home / "serve.toml"
        config.write_text(SMALL.format(dashboard_port=0) + "[recovery]\nwatchdog_s = 60.0\n")
        address = f"127.0.0.1:{free_port()}"
        options = ("--dp", 2, "--port", address.rpartition(":")[2], "--ray-address", nodes.address, "--config", config)
        log = nodes.home / "serve.log"
        with log.open("w") as output:
            foreground = subprocess.Popen(moestro("serve", checkpoint, *options), env=nodes.env, stderr=output)
        until(lambda: "Ctrl-C stops" in log.read_text() or foreground.poll() is not None, 180.0)
        assert foreground.poll() is None, log.read_text()
        yield Served(nodes, address, foreground)
        foreground.kill()


def test_streams_and_new_requests_go_on_without_a_head_and_all_is_found_again(served: Served) -> None:
    expected = served.ask(1000)
    before = served.picture()
    ours = {process.pid for process in served.nodes.processes() if _is_ours(process)}
    with ThreadPoolExecutor(4) as pool:
        streams = [pool.submit(served.ask, 1000) for _ in range(4)]
        time.sleep(0.5)
        served.nodes.lose_head()
        served.foreground.kill()  # it was on the head's machine
        began_s = time.monotonic()
        assert [stream.result() for stream in streams] == [expected] * 4
    while time.monotonic() < began_s + AWAY_S:
        assert served.ask(8) == expected[:8]
        assert served.picture() == before
        time.sleep(0.2)
    assert served.nodes.moestro("scale", "--groups", 2).returncode == 1  # paused, and says so

    served.nodes.start_head()
    began_s = time.monotonic()
    while time.monotonic() < began_s + AWAY_S:
        assert served.ask(8) == expected[:8]
        assert served.picture() == before
        time.sleep(0.2)
    assert {process.pid for process in served.nodes.processes() if _is_ours(process)} == ours
    grown = served.nodes.moestro("scale", "--groups", 2)
    assert (grown.returncode, grown.stderr.splitlines()[-1]) == (0, "2 groups of dp 2 x tp 1, 1 gateway"), grown.stderr
    until(lambda: [name for name, _, _ in served.picture()] == ["group-0", "group-1"])
    assert served.picture()[0] == before[0]
    assert served.ask(1000) == expected


def _is_ours(process: psutil.Process) -> bool:
    try:
        title = " ".join(process.cmdline())
    except psutil.Error:
        return False
    return "ray::Rank" in title or "ServeReplica:moestro" in title
