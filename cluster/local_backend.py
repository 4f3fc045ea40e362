"""The backend in this process: an engine on a thread, no cluster. What ``--local`` uses."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

from moestro.cluster.backend import Capacity, unknown_rank
from moestro.cluster.delta_streams import DeltaStreams, QueuedDeltas
from moestro.cluster.ranks.capacity import rank_capacity
from moestro.protos import wire
from moestro.protos.errors import Unavailable
from moestro.protos.gen import rank_pb2 as pb
from moestro.protos.sequences import EngineLimits, SequenceRequest
from moestro.workers.full_group import BuiltRank
from moestro.workers.rank_loop import StepOutput


class LocalBackend:
    """Implements ``Backend`` over one rank, called ``name``. Create, use and close on one asyncio loop."""

    def __init__(self, rank: BuiltRank, name: str = "local") -> None:
        self._rank = rank
        self._name = name
        self._load = rank.load
        self._events = asyncio.get_running_loop()
        self._streams = DeltaStreams("local", self._cancel)
        self._ended = ""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def limits(self) -> EngineLimits:
        return self._rank.limits

    def capacity(self) -> Capacity:
        return rank_capacity(self.limits, self._load, len(self._streams))

    def start(self, sequences: Sequence[SequenceRequest]) -> QueuedDeltas:
        wanted = sequences[0].diagnostics.rank
        if wanted not in ("", self._name):
            raise unknown_rank(wanted, [self._name])
        stream, renamed = self._streams.open(sequences)
        for sequence in renamed:
            self._rank.loop.submit(pb.AttachRequest(submit=wire.encode_request(sequence)).SerializeToString())
        return stream

    async def available(self) -> None:
        """There is one engine, and no other after it."""
        if self._ended:
            raise Unavailable(self._ended)

    async def outlived(self, engine: str) -> bool:
        return False

    async def close(self) -> None:
        """Ends the engine; open streams fail."""
        self._rank.loop.stop()
        await asyncio.to_thread(self._thread.join)

    def _cancel(self, sequence_id: str) -> None:
        self._rank.loop.submit(pb.AttachRequest(cancel=sequence_id).SerializeToString())

    def _run(self) -> None:
        reason = "the engine was stopped"
        try:
            self._rank.loop.run(self._post)
        except Exception as error:
            reason = f"the engine failed: {type(error).__name__}"
            raise
        finally:
            self._events.call_soon_threadsafe(self._end, reason)

    def _end(self, reason: str) -> None:
        self._ended = reason
        self._streams.fail(Unavailable(reason))

    def _post(self, output: StepOutput) -> None:
        self._events.call_soon_threadsafe(self._deliver, output)

    def _deliver(self, output: StepOutput) -> None:
        self._load = output.load
        for delta in output.deltas:
            self._streams.deliver(delta)
        for sequence_id, reason in output.refusals:
            self._streams.refuse(sequence_id, reason)
