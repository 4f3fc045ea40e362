"""Clusters of other shapes, in other people's Ray, and ones that do not come up. Each starts its own processes."""

from __future__ import annotations

import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import transformers
from tests.cluster.servers import environment, free_port, run, serving, short_home, until
from tests.model.oracle import reference_greedy

from moestro.cluster.client import Client

PROMPT = [5, 17, 200, 33, 71, 9]


def test_two_groups_behind_two_gateways_on_one_port_and_ctrl_c(checkpoint: Path) -> None:
    port = free_port()
    with serving(checkpoint, "--groups", 2, "--dp", 1, "--gateways", 2, "--port", port) as server:
        assert server.address == f"127.0.0.1:{port}"
        assert "2 groups of dp 1 x tp 1" in server.lines[0]
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda _: _alone(server.address), range(16)))
        assert len({tuple(ids) for ids in answers}) == 1
        with server.client() as client:
            groups = client.status().groups
        assert [group.name for group in groups] == ["group-0", "group-1"]
        assert all(rank.num_steps > 0 for group in groups for rank in group.ranks)
        listening = {
            connection.pid
            for connection in psutil.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
        }
        assert len(listening) == 2

        took_s = server.stop(signal.SIGINT, to_all=True)
        assert server.process.returncode == 0
        assert server.left_behind() == []
        assert took_s < 15
        assert (server.lines[5:], server.output) == (["stopped"], [])


def _alone(address: str) -> tuple[int, ...]:
    """A connection of its own, so that the kernel spreads the calls over the gateways."""
    with Client(address, timeout_s=30.0) as client:
        return tuple(client.generate(PROMPT, max_tokens=16, temperature=0.0, ignore_eos=True).choices[0].token_ids)


def test_ctrl_c_while_loading_leaves_nothing(checkpoint: Path) -> None:
    with serving(checkpoint, "--port", 0, wait_for_ready=False) as server:
        until(lambda: bool(server.find("ray::Rank")), 60.0)
        server.stop(signal.SIGINT, to_all=True)
        assert server.process.returncode == 0
        assert server.left_behind() == []
        assert (server.lines, server.output) == (["stopped"], [])


def test_sigterm_while_ray_starts_leaves_nothing(checkpoint: Path) -> None:
    with serving(checkpoint, "--port", 0, wait_for_ready=False) as server:
        until(lambda: bool(server.find("gcs_server")), 60.0)
        server.stop(signal.SIGTERM)
        assert server.process.returncode == 0
        until(lambda: not _ray_processes(server.home), 5.0)
        assert (server.lines, server.output) == (["stopped"], [])


@dataclass(frozen=True)
class TheirRay:
    """A Ray cluster that somebody else has started, and what they tell its users."""

    home: Path
    address: str
    access: dict[str, str]

    def daemons(self) -> set[int]:
        return {process.pid for process in _ray_processes(self.home) if "ray::" not in " ".join(process.cmdline())}


@pytest.fixture(scope="module")
def their_ray() -> Iterator[TheirRay]:
    with short_home() as home:
        theirs = TheirRay(
            home, f"127.0.0.1:{free_port()}", {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        )
        command = ["start", "--head", f"--port={theirs.address.rpartition(':')[2]}", "--num-cpus=5"]
        command += ["--include-dashboard=false", "--disable-usage-stats"]
        subprocess.run(
            [sys.executable, "-m", "ray.scripts.scripts", *command],
            env=environment(home, **theirs.access),
            check=True,
            capture_output=True,
        )
        try:
            yield theirs
        finally:
            for process in _ray_processes(home):
                process.terminate()
            psutil.wait_procs(_ray_processes(home), timeout=5.0)
            for process in _ray_processes(home):
                process.kill()


def _ray_processes(home: Path) -> list[psutil.Process]:
    """Ray's own daemons of one session, told by its folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("RAY_TMPDIR") == str(home) and "moestro" not in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_tensor_parallel_in_an_existing_ray_which_survives(their_ray: TheirRay, checkpoint: Path) -> None:
    daemons = their_ray.daemons()
    assert len(daemons) >= 3
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    expected = reference_greedy(model, PROMPT, 32)
    arguments = ("--dp", 1, "--tp", 2, "--port", 0, "--ray-address", their_ray.address)
    with serving(checkpoint, *arguments, **their_ray.access) as server:
        with server.client() as client:
            answer = client.generate(PROMPT, max_tokens=32, temperature=0.0, ignore_eos=True)
            assert list(answer.choices[0].token_ids) == expected
            (group,) = client.status().groups
            assert [(rank.dp_rank, rank.tp_rank) for rank in group.ranks] == [(0, 0), (0, 1)]
        took_s = server.stop(signal.SIGTERM)
        assert (server.process.returncode, server.left_behind()) == (0, [])
        assert took_s < 20
        assert server.output == []
    assert their_ray.daemons() == daemons
    until(lambda: not _titled(their_ray, "ray::ServeController", "ray::ServeReplica", "ray::Rank"), 10.0)


def test_a_shape_that_does_not_fit_says_so(their_ray: TheirRay, checkpoint: Path) -> None:
    access = environment(their_ray.home, **their_ray.access)
    arguments = ("--dp", 1, "--tp", 3, "--port", 0, "--ray-address", their_ray.address)
    answer = run(their_ray.home, "serve", checkpoint, *arguments, env=access)
    assert (answer.returncode, answer.stdout) == (1, "")
    assert answer.stderr.count("\n") == 1, answer.stderr
    assert answer.stderr.startswith("error: ")
    assert "tp" in answer.stderr
    assert "Traceback" not in answer.stderr


def _titled(theirs: TheirRay, *titles: str) -> list[str]:
    lines = [" ".join(process.cmdline()) for process in _ray_processes(theirs.home)]
    return [line for line in lines if line.startswith(titles)]
