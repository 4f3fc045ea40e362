"""Hosts that are none: a network namespace each, on one bridge, so that one can be cut off. Needs root.

A process in one shares no memory with the others either (its process ids are its own), as on a host of its own.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

PREFIX = "10.213.77"


@dataclass(frozen=True, slots=True)
class Host:
    """One of them; ``name`` is also that of its end of the cable at the bridge."""

    name: str
    address: str

    def inside(self, command: Sequence[str]) -> list[str]:
        """The command as it runs there. It dies with the process that starts it."""
        enter = ["ip", "netns", "exec", self.name]
        return [*enter, "unshare", "--pid", "--fork", "--kill-child", "--mount-proc", *command]

    @property
    def is_up(self) -> bool:
        """Whether it can be reached."""
        return bool(int(Path(f"/sys/class/net/{self.name}/flags").read_text(), 16) & 1)

    @contextmanager
    def cut_off(self) -> Iterator[None]:
        _ip("link", "set", self.name, "down")
        try:
            yield
        finally:
            _ip("link", "set", self.name, "up")


@dataclass(frozen=True, slots=True)
class Network:
    """``here`` is the address of this machine on it."""

    here: str
    hosts: tuple[Host, ...]


@contextmanager
def network(num_hosts: int) -> Iterator[Network]:
    """While the block runs. Raises CalledProcessError where that is not allowed."""
    tag = f"{os.getpid() % 0xFFFF:x}"
    bridge, here = f"mob{tag}", f"{PREFIX}.1"
    with ExitStack() as stack:
        _ip("link", "add", bridge, "type", "bridge")
        stack.callback(_ip, "link", "del", bridge)
        _ip("addr", "add", f"{here}/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        hosts = []
        for number in range(num_hosts):
            host = Host(f"mo{tag}n{number}", f"{PREFIX}.{number + 2}")
            _ip("netns", "add", host.name)
            stack.callback(_remove, host.name)
            _ip("link", "add", host.name, "type", "veth", "peer", "name", "eth0", "netns", host.name)
            _ip("link", "set", host.name, "master", bridge, "up")
            _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", "eth0")
            _ip("-n", host.name, "link", "set", "eth0", "up")
            _ip("-n", host.name, "link", "set", "lo", "up")
            hosts.append(host)
        yield Network(here, tuple(hosts))


def _remove(name: str) -> None:
    with suppress(subprocess.CalledProcessError):
        _ip("netns", "del", name)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
