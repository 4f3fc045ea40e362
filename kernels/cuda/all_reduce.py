"""A sum over the ranks of a host in one step, in the order of the ranks: every rank reads what every rank wrote.

Legend: R ranks, N elements.

Same bits as gathering and adding in fp32 (``router.mesh.MeshTensorParallel.sum``), on every rank, whatever N is; one
reading of R * N elements over NVLink instead of a gather, a loop of additions and a cast. For the small sums of
decoding. Not measured, and not run on several GPUs yet: only the arithmetic is tested.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048
_EIGHT = tl.constexpr(8)  # elements that are loaded together: 16 bytes of bf16


@triton.jit(do_not_specialize=["num_eights"])
def ordered_sum_kernel(
    peers_ptr,  # int64 [R], addresses of N elements each
    out_ptr,  # [N]
    num_eights,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at // _EIGHT < num_eights
    kind = tl.pointer_type(out_ptr.dtype.element_ty)
    peer_ptr = tl.multiple_of(tl.load(peers_ptr).to(kind), 16)
    total = tl.load(peer_ptr + at, mask=inside, other=0.0).to(tl.float32)
    for rank in tl.static_range(1, RANKS):
        peer_ptr = tl.multiple_of(tl.load(peers_ptr + rank).to(kind), 16)
        total += tl.load(peer_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)


def ordered_sum(peers_R: Tensor, x: Tensor) -> Tensor:
    """The sum of the tensors at the addresses ``peers_R`` (int64, in the order of ranks), each of the size and dtype of
    ``x``: added in this order in fp32, then rounded. The memory at an address is aligned to 16 bytes and may be read up
    to the next multiple of 8 elements."""
    num_eights = triton.cdiv(x.numel(), _EIGHT.value)
    out = torch.empty(num_eights * _EIGHT.value, dtype=x.dtype, device=x.device)
    ordered_sum_kernel[(triton.cdiv(out.numel(), _BLOCK),)](
        peers_R, out, num_eights, RANKS=len(peers_R), BLOCK=_BLOCK, num_warps=8, enable_fp_fusion=False
    )
    return out[: x.numel()].view(x.shape)


@dataclass(frozen=True, slots=True)
class OneShotSum:
    """``ordered_sum`` over symmetric memory. For one stream at a time; every rank calls ``sum`` for the same sizes in
    the same order. It can be captured in a CUDA graph."""

    buffer_N: Tensor  # this rank's part of the symmetric memory
    peers_R: Tensor
    handle: Any  # torch's, of the rendezvous

    def sum(self, x: Tensor) -> Tensor:
        """Raises ValueError where ``x`` is larger than the buffer, or of another dtype."""
        if x.numel() > self.buffer_N.numel() or x.dtype != self.buffer_N.dtype:
            raise ValueError(f"at most {self.buffer_N.numel()} of {self.buffer_N.dtype}, not {x.numel()} of {x.dtype}")
        self.buffer_N[: x.numel()].copy_(x.reshape(-1))
        self.handle.barrier(channel=0)  # all have written
        out = ordered_sum(self.peers_R, x)
        self.handle.barrier(channel=1)  # all have read
        return out


def why_not_one_shot(devices: Sequence[torch.device], host_of_rank: Sequence[str]) -> str | None:
    """What keeps these ranks from sharing memory; None if nothing does. ``devices`` are this rank's and, where they are
    in the same process's sight, its peers'."""
    if len(set(host_of_rank)) > 1:
        return f"ranks are on {len(set(host_of_rank))} hosts"
    if any(device.type != "cuda" for device in devices):
        return "a rank is not on a CUDA device"
    indices = [device.index or 0 for device in devices]
    for a in indices:
        for b in indices:
            if a != b and not torch.cuda.can_device_access_peer(a, b):
                return f"device {a} cannot read device {b}"
    return None


def connect(
    name: str, rank: int, size: int, store: Any, num_elements: int, dtype: torch.dtype, device: torch.device
) -> OneShotSum:
    """Collective over the ranks that share ``store`` (a ``torch.distributed.Store``); ``name`` is theirs alone. Ask
    ``why_not_one_shot`` first."""
    from torch._C._distributed_c10d import _SymmetricMemory

    num_elements = triton.cdiv(num_elements, _EIGHT.value) * _EIGHT.value
    _SymmetricMemory.set_group_info(name, rank, size, store)
    buffer_N = _SymmetricMemory.empty_strided_p2p((num_elements,), (1,), dtype, device, name)
    handle = _SymmetricMemory.rendezvous(buffer_N, name)
    peers_R = torch.tensor([handle.buffer_ptrs[r] for r in range(size)], dtype=torch.int64, device=device)
    return OneShotSum(buffer_N, peers_R, handle)
