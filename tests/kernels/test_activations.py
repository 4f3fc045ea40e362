from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from moestro.kernels.activations import sigmoid, swiglu


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("shape", [(0, 8), (1, 6), (5, 64), (300, 400)])
def test_definition(device, dtype, shape):
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(2)) * 3).to(device, dtype)
    gate, up = x.double().chunk(2, -1)
    tolerance = 1e-6 if dtype == torch.float32 else 2**-6
    want = gate / (1 + torch.exp(-gate)) * up
    torch.testing.assert_close(swiglu(x).double(), want, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        sigmoid(x).double(), 1 / (1 + torch.exp(-x.double())), rtol=tolerance, atol=tolerance / 8
    )


def test_large_arguments_saturate(dtype):
    assert sigmoid(torch.tensor([-1e4, 1e4], dtype=dtype)).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("width", [1, 37, 100, 512])
def test_a_row_does_not_depend_on_the_rows_beside_it(device, dtype, threads, width):
    generator = torch.Generator().manual_seed(width)
    rows = max(1000, 80_000 // width)  # more elements than torch leaves to one thread
    x = (torch.randn(rows, 2 * width, generator=generator) * 4).to(device, dtype)
    torch.set_num_threads(1)
    alone = torch.cat([swiglu(x[r : r + 1]) for r in range(0, rows, 7)])
    narrow = torch.cat([sigmoid(x[r : r + 1, :1]) for r in range(0, rows, 7)])
    torch.set_num_threads(threads)
    assert torch.equal(swiglu(x)[::7], alone)
    assert torch.equal(swiglu(x[3:])[4::7], alone[1:])
    assert torch.equal(sigmoid(x[:, :1].contiguous())[::7], narrow)
