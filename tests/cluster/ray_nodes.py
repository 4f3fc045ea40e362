"""A Ray cluster of two nodes on this machine whose head keeps its state in Redis, so that another can go on from it:
https://docs.ray.io/en/latest/ray-core/fault_tolerance/gcs.html
"""

from __future__ import annotations

import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from tests.cluster.servers import environment, free_port, moestro, short_home

RECONNECT_S = 600  # how long the other nodes wait for a head
COMMAND_S = 120.0


@dataclass
class TwoNodes:
    """The head computes nothing. Everything of ours but Serve's controller runs on the other node."""

    home: Path
    port: int
    redis_port: int
    password: str
    head: set[int] = field(default_factory=set)  # process ids

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def env(self) -> dict[str, str]:
        return environment(
            self.home,
            RAY_AUTH_MODE="token",
            RAY_AUTH_TOKEN=self.password,
            RAY_REDIS_ADDRESS=f"127.0.0.1:{self.redis_port}",
            RAY_gcs_rpc_server_reconnect_timeout_s=str(RECONNECT_S),
        )

    def start_head(self) -> None:
        before = {process.pid for process in self.processes()}
        self._ray("--head", f"--port={self.port}", "--num-cpus=0", "--include-dashboard=false", "--disable-usage-stats")
        self.head = {process.pid for process in self.processes()} - before

    def start_worker(self) -> None:
        # Another loopback address makes it another node.
        self._ray(f"--address={self.address}", "--num-cpus=8", "--node-ip-address=127.0.0.2", "--disable-usage-stats")

    def lose_head(self) -> None:
        """Everything on it at once, Serve's controller among it."""
        for process in self.processes():
            with suppress(psutil.Error):
                if process.pid in self.head or self.head & {parent.pid for parent in process.parents()}:
                    process.kill()
        # What it had on its disk is gone too: `ray start` takes the worker's raylet for a running head otherwise.
        for file in self.home.rglob("ray_current_cluster"):
            file.unlink()

    def moestro(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = moestro(*arguments, "--ray-address", self.address)
        return subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=COMMAND_S, check=False)

    def processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("RAY_TMPDIR") == str(self.home):
                    found.append(process)
        return found

    def _ray(self, *arguments: str) -> None:
        command = [
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "start",
            f"--redis-password={self.password}",
            *arguments,
        ]
        said = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=COMMAND_S, check=False)
        assert said.returncode == 0, said.stdout + said.stderr


@contextmanager
def two_nodes() -> Iterator[TwoNodes]:
    """Nothing of it outlives the block. Fails with what to do when there is no redis-server."""
    assert shutil.which("redis-server"), "redis-server is missing; on Debian: apt-get install redis-server"
    with short_home() as home:
        nodes = TwoNodes(home, free_port(), free_port(), secrets.token_hex(16))
        listen = ["--port", str(nodes.redis_port), "--bind", "127.0.0.1", "--requirepass", nodes.password, "--save", ""]
        redis = subprocess.Popen(["redis-server", *listen], cwd=home, stdout=subprocess.DEVNULL)
        try:
            nodes.start_head()
            nodes.start_worker()
            yield nodes
        finally:
            for process in nodes.processes():
                with suppress(psutil.Error):
                    process.kill()
            redis.kill()
            redis.wait()
