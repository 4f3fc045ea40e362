"""A whole simulated cluster, and one run of a scenario."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from typing import Any, cast

from moestro.cluster.directory_calls import DirectoryCalls, DirectoryServer
from moestro.cluster.simulation.checks import Reader
from moestro.cluster.simulation.client import SimulatedClient
from moestro.cluster.simulation.epochs import Epochs
from moestro.cluster.simulation.experts import Experts
from moestro.cluster.simulation.faults import FAULTS
from moestro.cluster.simulation.gateway import SimulatedGateway
from moestro.cluster.simulation.group import GroupPlan, SimulatedGroup
from moestro.cluster.simulation.handles import Handle, Host
from moestro.cluster.simulation.network import Network
from moestro.cluster.simulation.rank import SimulatedRank
from moestro.cluster.simulation.rpc import Sockets
from moestro.cluster.simulation.scenario import Ask, Scenario
from moestro.cluster.simulation.trace import Trace
from moestro.cluster.simulation.virtual_time import Process
from moestro.cluster.simulation.worker import SimulatedWorker
from moestro.protos.errors import Overloaded, Quarantined, SequenceFailed, Unavailable
from moestro.router.parallel import GroupShape

PATIENCE_S = 300.0  # by then every request must have ended
SETTLE_S = 60.0  # by then everything must be free again
LOOK_S = 0.5


class SimulatedCluster:
    """Built in the loop it runs on."""

    def __init__(self, scenario: Scenario, trace: Trace) -> None:
        self.scenario, self.trace = scenario, trace
        self.rng = random.Random(f"run {scenario.seed}")
        self.network = Network(self.rng, trace)
        self.sockets = Sockets(self.network)
        self.failures: list[BaseException] = []
        self._processes: list[Process] = []
        self._rank_deaths_s: list[float] = []
        self._epochs = Epochs(self.failures.append)
        self._incarnations = 0
        self.directory: Host | None = None
        self.handle = cast(DirectoryCalls, Handle(self.network, lambda: self.directory))
        self.gateways: dict[str, SimulatedGateway] = {}
        self.addresses = [f"gateway-{number}" for number in range(scenario.gateways)]
        plan = GroupPlan(
            GroupShape(scenario.dp, scenario.tp),
            scenario.scheduler,
            Experts(scenario.num_experts, 2, scenario.redundant, scenario.most_slots, []),
        )
        self.groups = [
            SimulatedGroup(number, plan, self.process, self.sockets, self.handle, self.rng, self.observe)
            for number in range(scenario.groups)
        ]
        self.clients = [
            SimulatedClient(ask, self.process(ask.name), self.sockets, self.addresses, self.rng, trace)
            for ask in scenario.asks
        ]

    def process(self, name: str) -> Process:
        process = Process(name, self.failures.append)
        self._processes.append(process)
        process.at_death(lambda: self._died(name))
        process.at_death(lambda: self.sockets.lose(process))
        return process

    def _died(self, name: str) -> None:
        self.trace(name, "dies")
        if "/w" in name:
            self._rank_deaths_s.append(asyncio.get_running_loop().time())

    @property
    def ranks(self) -> list[SimulatedRank]:
        return [rank for group in self.groups for rank in group.ranks]

    def start_directory(self) -> None:
        self._incarnations += 1
        process = self.process(f"directory.{self._incarnations}")
        groups = frozenset(group.name for group in self.groups if group.name)
        knows = self.rng.random() < 0.5  # whether Ray says which groups run
        self.directory = Host(process, DirectoryServer(groups if knows or not groups else None))

    def start_gateway(self, address: str) -> None:
        self._incarnations += 1
        process = self.process(f"{address}.{self._incarnations}")

        async def run() -> None:
            self.gateways[address] = gateway = SimulatedGateway(
                process, address, self.sockets, self.handle, self.scenario.gateways, self.trace
            )
            await gateway.run()

        process.spawn(run())

    async def run(self) -> None:
        """The whole scenario. Raises AssertionError where an invariant does not hold."""
        try:
            await self._run()
        finally:
            await self._end()

    async def _run(self) -> None:
        asyncio.get_running_loop().set_exception_handler(self._unhandled)
        self.process("kernel").spawn(self.sockets.keep_alive())
        self.start_directory()
        for group in self.groups:
            group.start()
        for address in self.addresses:
            self.start_gateway(address)
        async with asyncio.timeout(SETTLE_S):
            while not all(address in self.sockets.servers for address in self.addresses):
                await asyncio.sleep(0.05)
                self._check_failures()
        faults = asyncio.create_task(self._do_faults())
        asking = [client.process.spawn(client.run(), client.process.name) for client in self.clients]
        await self._wait_for(asking)
        await faults
        self.check_ends()
        await self._settle()
        self._check_failures()

    async def _wait_for(self, asking: list[asyncio.Task[None]]) -> None:
        """Until every client has its answer or has given up."""
        loop = asyncio.get_running_loop()
        until_s = loop.time() + PATIENCE_S
        while waiting := [task.get_name() for task in asking if not task.done()]:
            assert loop.time() < until_s, f"after {PATIENCE_S:.0f} s {waiting[0]} has not ended"
            await asyncio.sleep(0.1)
            self._check_failures()

    def _check_failures(self) -> None:
        if self.failures:
            raise self.failures[0]

    async def _end(self) -> None:
        """Kills all that still lives, so that nothing outlives the loop."""
        for process in self._processes:
            process.kill()
        await asyncio.sleep(0.5)

    async def _do_faults(self) -> None:
        loop = asyncio.get_running_loop()
        begin_s = loop.time()
        for fault in self.scenario.faults:
            await asyncio.sleep(max(0.0, begin_s + fault.at_s - loop.time()))
            self.trace("fault", "{} {} {} for {} s", fault.kind.value, fault.target, fault.other, fault.for_s)
            FAULTS[fault.kind](self, fault)
        await asyncio.sleep(max((fault.for_s for fault in self.scenario.faults), default=0.0))

    def observe(self, worker: SimulatedWorker, what: str, facts: Mapping[str, Any]) -> None:
        """What workers tell of themselves."""
        self.trace(worker.process.name, what + " {}", tuple(facts.values()))
        if what == "poisoned":
            asyncio.get_running_loop().call_soon(worker.process.kill)
        self._epochs.observe(worker.process.name, what, facts)

    def check_ends(self) -> None:
        for client in self.clients:
            reader, ask = client.reader, client.reader.ask
            assert not (ask.is_not_a_number and reader.is_finished), f"{ask.name} has an answer"
            assert not (ask.is_poison and reader.is_finished), f"{ask.name} has an answer"
            if reader.error is not None:
                allowed = is_allowed(reader.error, ask) or self._looked_guilty(reader)
                assert allowed, f"{ask.name} failed: {reader.error!r}"
            elif not reader.has_left and client.process.is_alive:
                assert reader.is_finished, f"{ask.name} never ended"

    def _looked_guilty(self, reader: Reader) -> bool:
        """A request that was there each time may be taken for the one that kills: with it at least two have died."""
        num_deaths = sum(at_s >= reader.ask.at_s for at_s in self._rank_deaths_s)
        return isinstance(reader.error, Quarantined) and num_deaths >= 2

    async def _settle(self) -> None:
        """Nothing may be left of any request, and every group must be whole again."""
        for _ in range(int(SETTLE_S / LOOK_S)):
            if not self.leftovers():
                return
            await asyncio.sleep(LOOK_S)
        raise AssertionError(f"left over after {SETTLE_S:.0f} s: {self.leftovers()}")

    def leftovers(self) -> list[str]:
        """What should be free when no request is open."""
        found = []
        for gateway in self.gateways.values():
            if gateway.process.is_alive and gateway.core.num_open:
                found.append(f"{gateway.process.name}: {gateway.core.num_open} requests")
        for group in self.groups:
            if not group.is_full:
                found.append(f"group {group.number} is not at full strength")
        for rank in self.ranks:
            rank.worker.turns.scheduler.check_integrity()
            load = rank.worker.turns.load
            if load.num_running or load.num_waiting or load.kv_blocks_used:
                found.append(f"{rank.process.name}: {load}")
        return found

    def _unhandled(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, Exception):
            self.failures.append(error)


def is_allowed(error: BaseException, ask: Ask) -> bool:
    """Whether a request may end so."""
    if isinstance(error, Quarantined):
        return ask.is_poison
    if isinstance(error, SequenceFailed):
        return ask.is_not_a_number
    return isinstance(error, Overloaded) or (isinstance(error, Unavailable) and "times is the most" in str(error))
