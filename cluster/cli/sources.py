"""Where the text of ``generate`` and ``chat`` comes from: a running cluster, or an engine in this process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Protocol, Unpack

from moestro.cluster import client_calls as calls
from moestro.cluster.client import AsyncClient
from moestro.cluster.client_calls import Messages, Options
from moestro.cluster.config import load_config
from moestro.cluster.edge.events import StreamEvent


class Source(Protocol):
    """The two calls both commands need; ``AsyncClient`` has them."""

    def stream(self, prompt: str | Sequence[int], **options: Unpack[Options]) -> AsyncIterator[StreamEvent]: ...

    def stream_chat(self, messages: Messages, **options: Unpack[Options]) -> AsyncIterator[StreamEvent]: ...


def open_source(address: str, local: bool, model: Path | None) -> AbstractAsyncContextManager[Source]:
    """A cluster's gateway, or with ``local`` the whole edge and one engine here. Raises CheckpointError."""
    return _local(model) if local else AsyncClient(address)


@asynccontextmanager
async def _local(model: Path | None) -> AsyncIterator[Source]:
    # Imported here: they bring torch, which a client of a cluster does not need.
    from moestro.cluster.edge.core import RequestCore
    from moestro.cluster.gateway import edge_limits, served_model
    from moestro.cluster.local_backend import LocalBackend
    from moestro.cluster.serving.rank_spec import rank_spec
    from moestro.workers.full_group import build_rank

    config = load_config(None, {"model": {"path": model}, "cluster": {"dp": 1}})
    backend = LocalBackend(build_rank(rank_spec(config)))
    core = RequestCore([served_model(config, backend)], edge_limits(config))

    class Local:
        def stream(self, prompt: str | Sequence[int], **options: Unpack[Options]) -> AsyncIterator[StreamEvent]:
            return core.stream(calls.stream(prompt, options).request)

        def stream_chat(self, messages: Messages, **options: Unpack[Options]) -> AsyncIterator[StreamEvent]:
            return core.stream(calls.chat(messages, options).request)

    try:
        yield Local()
    finally:
        core.close()
        await backend.close()
