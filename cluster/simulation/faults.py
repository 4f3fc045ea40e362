"""How each fault is done to a cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from moestro.cluster.simulation.scenario import Fault, FaultKind
from moestro.cluster.simulation.virtual_time import Process

if TYPE_CHECKING:
    from moestro.cluster.simulation.cluster import SimulatedCluster


def _kill_rank(cluster: SimulatedCluster, fault: Fault) -> None:
    if ranks := cluster.ranks:
        ranks[fault.target % len(ranks)].process.kill()


def _stop_rank(cluster: SimulatedCluster, fault: Fault) -> None:
    if ranks := cluster.ranks:
        rank = ranks[fault.target % len(ranks)]
        cluster.network.stop(rank.process)
        rank.worker.hold()

        def go_on() -> None:
            cluster.network.resume(rank.process)
            rank.worker.go_on()

        asyncio.get_running_loop().call_later(fault.for_s, go_on)


def _slow_rank(cluster: SimulatedCluster, fault: Fault) -> None:
    if ranks := cluster.ranks:
        turns = ranks[fault.target % len(ranks)].worker.turns
        turns.slowness = 5.0
        asyncio.get_running_loop().call_later(fault.for_s, setattr, turns, "slowness", 1.0)


def _part_rank(cluster: SimulatedCluster, fault: Fault) -> None:
    if ranks := cluster.ranks:
        gateway = cluster.gateways[cluster.addresses[fault.other % len(cluster.addresses)]].process
        _part(cluster, ranks[fault.target % len(ranks)].process, gateway, fault.for_s)


def _part_ranks(cluster: SimulatedCluster, fault: Fault) -> None:
    ranks = cluster.groups[fault.target % len(cluster.groups)].ranks
    if len(ranks) > 1:
        first = fault.target % len(ranks)
        second = (first + 1 + fault.other % (len(ranks) - 1)) % len(ranks)
        _part(cluster, ranks[first].process, ranks[second].process, fault.for_s)


def _part_supervisor(cluster: SimulatedCluster, fault: Fault) -> None:
    group = cluster.groups[fault.target % len(cluster.groups)]
    if ranks := group.ranks:
        _part(cluster, group.process, ranks[fault.other % len(ranks)].process, fault.for_s)


def _part(cluster: SimulatedCluster, one: Process, other: Process, for_s: float) -> None:
    cluster.network.part(one, other)
    asyncio.get_running_loop().call_later(for_s, cluster.network.heal, one, other)


def _fail_load(cluster: SimulatedCluster, fault: Fault) -> None:
    cluster.groups[fault.target % len(cluster.groups)].failing_loads += 1 + fault.other % 2


def _cut_link(cluster: SimulatedCluster, fault: Fault) -> None:
    gateway = cluster.gateways[cluster.addresses[fault.other % len(cluster.addresses)]].process
    connections = [
        connection
        for server in cluster.sockets.servers.values()
        for connection in server.connections
        if connection.client is gateway
    ]
    if connections:
        connections[fault.target % len(connections)].cut()


def _kill_directory(cluster: SimulatedCluster, fault: Fault) -> None:
    assert cluster.directory is not None
    if cluster.directory.process.is_alive:
        cluster.directory.process.kill()
        asyncio.get_running_loop().call_later(fault.for_s, cluster.start_directory)


def _kill_gateway(cluster: SimulatedCluster, fault: Fault) -> None:
    address = cluster.addresses[fault.target % len(cluster.addresses)]
    if cluster.gateways[address].process.is_alive:
        cluster.gateways[address].process.kill()
        asyncio.get_running_loop().call_later(fault.for_s, cluster.start_gateway, address)


def _kill_group(cluster: SimulatedCluster, fault: Fault) -> None:
    """Its supervisor, and with it all that it has started; Serve starts another."""
    cluster.groups[fault.target % len(cluster.groups)].process.kill()


def _cut_clients(cluster: SimulatedCluster, fault: Fault) -> None:
    server = cluster.sockets.servers.get(cluster.addresses[fault.target % len(cluster.addresses)])
    for connection in tuple(server.connections) if server else ():
        connection.cut()


FAULTS: dict[FaultKind, Callable[[SimulatedCluster, Fault], None]] = {
    FaultKind.KILL_RANK: _kill_rank,
    FaultKind.STOP_RANK: _stop_rank,
    FaultKind.SLOW_RANK: _slow_rank,
    FaultKind.PART_RANK: _part_rank,
    FaultKind.PART_RANKS: _part_ranks,
    FaultKind.PART_SUPERVISOR: _part_supervisor,
    FaultKind.FAIL_LOAD: _fail_load,
    FaultKind.CUT_LINK: _cut_link,
    FaultKind.KILL_DIRECTORY: _kill_directory,
    FaultKind.KILL_GATEWAY: _kill_gateway,
    FaultKind.KILL_GROUP: _kill_group,
    FaultKind.CUT_CLIENTS: _cut_clients,
}
