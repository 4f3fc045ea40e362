"""The arithmetic of the one-shot sum, with this process's memory in the place of the peers'."""

from __future__ import annotations

import pytest
import torch

from moestro.kernels.cuda.all_reduce import OneShotSum, ordered_sum, why_not_one_shot


def gathered_sum(parts):
    """What ``MeshTensorParallel.sum`` computes of the gathered parts."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(parts[0].dtype)


class Barrier:
    def __init__(self):
        self.channels = []

    def barrier(self, channel):
        self.channels.append(channel)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("ranks", [1, 2, 8])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 2048), (0, 64), (3, 700)])
def test_is_the_gathered_sum(ranks, shape, dtype):
    generator = torch.Generator().manual_seed(ranks)
    buffers = [torch.full((5000,), float("nan"), dtype=dtype) for _ in range(ranks)]
    peers_R = torch.tensor([buffer.data_ptr() for buffer in buffers])
    parts = [(100 * torch.randn(shape, generator=generator)).to(dtype) for _ in range(ranks)]
    parts[0].view(-1)[:1] = -0.0
    for buffer, part in zip(buffers, parts, strict=True):
        buffer[: part.numel()] = part.view(-1)
    got = ordered_sum(peers_R, parts[0])
    assert got.shape == shape
    bits = torch.int16 if dtype == torch.bfloat16 else torch.int32
    assert torch.equal(got.view(bits), gathered_sum(parts).view(bits))


def test_a_buffer_is_read_between_two_barriers():
    buffers = [torch.zeros(16, dtype=torch.bfloat16) for _ in range(2)]
    buffers[1][:3] = torch.tensor([1.0, 2.0, 3.0])
    barrier = Barrier()
    one_shot = OneShotSum(buffers[0], torch.tensor([buffer.data_ptr() for buffer in buffers]), barrier)
    assert one_shot.sum(torch.tensor([[1.0, 1.0, 1.0]]).bfloat16()).tolist() == [[2.0, 3.0, 4.0]]
    assert barrier.channels == [0, 1]
    for wrong in (torch.zeros(17, dtype=torch.bfloat16), torch.zeros(3)):
        with pytest.raises(ValueError, match="at most 16"):
            one_shot.sum(wrong)


def test_says_why_memory_cannot_be_shared():
    cpu = torch.device("cpu")
    assert why_not_one_shot([cpu], ["a", "b"]) == "ranks are on 2 hosts"
    assert why_not_one_shot([cpu], ["a", "a"]) == "a rank is not on a CUDA device"
