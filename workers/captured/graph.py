"""What is captured once and replayed: a CUDA graph, or on a CPU the call itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch


class Graph(Protocol):
    """Work over tensors at fixed addresses."""

    def replay(self) -> None:
        """Does it once more, with what the tensors hold now. Does not wait for the device."""


class Capture(Protocol):
    """Makes graphs, the largest first: those that follow use its memory."""

    def __call__(self, work: Callable[[], None]) -> Graph:
        """``work`` is called at least once before this returns. Collective, if ``work`` is."""


class CudaCapture:
    """CUDA graphs that share one pool of memory: no two are replayed at once."""

    def __init__(self) -> None:
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def __call__(self, work: Callable[[], None]) -> Graph:
        # Once before: kernels are compiled and loaded, communicators are set up, libraries take their workspaces.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            work()
        torch.cuda.current_stream().wait_stream(self._stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # thread_local: NCCL's watchdog asks after events on a thread of its own meanwhile, which is no concern of ours.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            work()
        return graph


class Called:
    """The stand-in for a device without graphs: a replay is the call, on the same tensors."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        work()

    def replay(self) -> None:
        self._work()
