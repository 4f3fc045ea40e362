"""A cluster without Ray: the same supervisors, workers, rank servers, gateways and directory as plain processes.

It starts and restarts much faster, so that hundreds of faults take minutes, and its ranks may be on hosts of their own,
which can be cut off from the network.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil
from benchmarks.chaos.plain.keeper import Keeper, Part
from benchmarks.chaos.plain.network import Host, network
from benchmarks.chaos.plain.parts import Orders, command
from benchmarks.chaos.ports import free_port
from benchmarks.chaos.served import ROOT, Shape
from benchmarks.chaos.system import NotPossible, Role, Target

from moestro.cluster.client import Client
from moestro.cluster.config import Config
from moestro.protos.errors import MoestroError

START_S = 300.0
_ROLES = {Role.GATEWAY: "gateway", Role.SUPERVISOR: "group", Role.DIRECTORY: "directory"}


@dataclass(frozen=True)
class Plain:
    """Implements ``System``."""

    address: str
    shape: Shape
    keeper: Keeper
    folder: Path
    hosts: tuple[Host, ...]

    @property
    def num_ranks(self) -> int:
        return self.shape.num_ranks

    def ranks_lost_with(self, role: Role) -> int:
        return self.shape.ranks_lost_with(role)

    def processes(self) -> Sequence[psutil.Process]:
        found = []
        for role in _ROLES.values():
            for _, pid in self.keeper.alive(role):
                with suppress(psutil.Error):
                    process = psutil.Process(pid)
                    found += [process, *process.children(recursive=True)]
        return found

    def targets(self, role: Role) -> Sequence[Target]:
        if role is Role.HEAD:
            raise NotPossible("kill head: there is none without Ray")
        if role is not Role.RANK:
            return [Target(role, name, pid) for name, pid in self.keeper.alive(_ROLES[role])]
        files = sorted(self.folder.glob("group-*.json"))
        ranks = [rank for file in files for rank in json.loads(file.read_text())]
        return [Target(role, name, pid, unit) for name, pid, unit in ranks if psutil.pid_exists(pid)]

    @contextmanager
    def partitioned(self, target: Target) -> Iterator[None]:
        seat = re.search(r"rank (\d+)", target.name)
        if not self.hosts or seat is None:
            raise NotPossible("partition: ranks share this machine's network; see --hosts")
        with self.hosts[int(seat[1]) % len(self.hosts)].cut_off():
            yield

    @contextmanager
    def full_disk(self) -> Iterator[None]:
        raise NotPossible("full disk: nothing is written without Ray")
        yield


@contextmanager
def plain(shape: Shape, on_hosts: bool = False, log: Path | None = None) -> Iterator[Plain]:
    """A cluster at full strength; nothing of it outlives the block. ``on_hosts``: each seat on a host of its own."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mo")))
        net = stack.enter_context(network(shape.dp * shape.tp)) if on_hosts else None
        port = free_port()
        orders = Orders(
            config=configuration(shape, port),
            secret=secrets.token_hex(16),
            name="directory",
            here=net.here if net else "127.0.0.1",
            directory_port=free_port(),
            folder=str(folder),
            hosts=tuple((host.name, host.address) for host in net.hosts) if net else (),
        )
        file = log or folder / "log"
        writing = stack.enter_context(open(file, "w"))
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
        keeper = stack.enter_context(Keeper(list(_parts(shape, orders)), folder, writing))
        address = f"127.0.0.1:{port}"
        _wait_whole(address, shape.num_ranks, file)
        yield Plain(address, shape, keeper, folder, net.hosts if net else ())


def configuration(shape: Shape, port: int) -> Config:
    """The demo model, small."""
    return Config.model_validate(
        {
            "cluster": asdict(shape),
            "rank": {"kv_memory": "32MiB", "threads": 1, "device": "cpu"},
            "server": {"port": port, "drain_s": 1.0},
        }
    )


def _parts(shape: Shape, orders: Orders) -> Iterator[Part]:
    names = [("directory", "directory")]
    names += [("group", f"group-{number}") for number in range(shape.groups)]
    names += [("gateway", f"gateway-{number}") for number in range(shape.gateways)]
    for role, name in names:
        yield Part(role, name, command(role, replace(orders, name=name)))


def _wait_whole(address: str, num_ranks: int, log: Path) -> None:
    """Raises RuntimeError with the end of what was said."""
    deadline = time.monotonic() + START_S
    with Client(address, timeout_s=2.0, retries=0) as client:
        while time.monotonic() < deadline:
            with suppress(MoestroError, TimeoutError):
                ranks = [rank for group in client.status().groups for rank in group.ranks]
                if sum(rank.state == "serving" for rank in ranks) == num_ranks:
                    return
            time.sleep(0.1)
    raise RuntimeError(f"the cluster did not come up:\n{log.read_text()[-4000:]}")
