"""A stand-in for the parts of DeepEP that the adapter uses, on the CPU, after what DeepEP documents and asserts.

It shows that the adapter speaks that interface. It cannot show that DeepEP behaves so on hardware.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

topk_idx_t = torch.int64


class Buffer:
    """Two calls alternate between two buffers; the next is sent only after the one before was received."""

    def __init__(
        self,
        group: None,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        comm: Any = None,
    ) -> None:
        assert group is None
        assert low_latency_mode
        self.rank, self.size, self.comm = comm.Get_rank(), comm.Get_size(), comm
        self.num_qps_per_rank, self.num_rdma_bytes, self.under_way = num_qps_per_rank, num_rdma_bytes, False
        assert comm.allgather((self.rank, b"handle")) == [(rank, b"handle") for rank in range(self.size)]

    @staticmethod
    def get_low_latency_rdma_size_hint(max_tokens: int, hidden: int, num_ranks: int, num_experts: int) -> int:
        return 2 * num_experts * max_tokens * hidden * 2

    def low_latency_dispatch(
        self, x: Tensor, topk_idx: Tensor, max_tokens: int, num_experts: int, use_fp8: bool, return_recv_hook: bool
    ) -> tuple[Any, ...]:
        self._send()
        assert not use_fp8
        assert return_recv_hook
        assert x.dtype == torch.bfloat16
        assert x.is_contiguous()
        assert topk_idx.is_contiguous()
        assert topk_idx.dtype == topk_idx_t
        assert x.shape[0] == topk_idx.shape[0] <= max_tokens
        assert self.size * max_tokens % 4 == 0
        assert num_experts == self.size * self.num_qps_per_rank
        num_local = self.num_qps_per_rank
        received = torch.full((num_local, self.size * max_tokens, x.shape[1]), float("nan"), dtype=x.dtype)
        counts = torch.zeros(num_local, dtype=torch.int32)
        sources: list[list[tuple[int, int]]] = [[] for _ in range(num_local)]
        sent = self.comm.allgather((x.view(torch.int16).tolist(), topk_idx.tolist()))

        def receive() -> None:
            # The blocks of the ranks come in no particular order.
            for local in range(num_local):
                for source in torch.randperm(self.size).tolist():
                    rows, experts = sent[source]
                    for token in range(len(rows)):
                        if self.rank * num_local + local in experts[token]:
                            row = torch.tensor(rows[token], dtype=torch.int16).view(torch.bfloat16)
                            received[local, len(sources[local])] = row
                            sources[local].append((source, token))
                counts[local] = len(sources[local])
            self.under_way = False

        return received, counts, (sources, max_tokens, num_experts), None, receive

    def low_latency_combine(
        self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, handle: Any, return_recv_hook: bool
    ) -> tuple[Any, ...]:
        self._send()
        sources, max_tokens, _ = handle
        assert return_recv_hook
        assert x.dtype == torch.bfloat16
        assert x.is_contiguous()
        assert x.shape[:2] == (self.num_qps_per_rank, self.size * max_tokens)
        assert topk_weights.dtype == torch.float32
        first = self.rank * self.num_qps_per_rank
        sent = [
            (source, token, first + local, x[local, place].view(torch.int16).tolist())
            for local, of_local in enumerate(sources)
            for place, (source, token) in enumerate(of_local)
        ]
        rows = {
            (token, expert): torch.tensor(row, dtype=torch.int16).view(torch.bfloat16).float()
            for of_rank in self.comm.allgather(sent)
            for home, token, expert, row in of_rank
            if home == self.rank
        }
        combined = torch.zeros(topk_idx.shape[0], x.shape[2])
        for token, experts in enumerate(topk_idx.tolist()):
            for k, expert in enumerate(experts):
                combined[token] += rows[token, expert] * topk_weights[token, k]

        def receive() -> None:
            self.under_way = False

        return combined.to(torch.bfloat16), None, receive

    def _send(self) -> None:
        assert not self.under_way, "sent before the last call was received"
        self.under_way = True
