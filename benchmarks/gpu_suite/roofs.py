"""What the device can do at best, measured on the spot: bandwidth of a copy, rate of a bf16 product."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from benchmarks.gpu_suite.checks import Check, Settings, Values, attempt
from benchmarks.gpu_suite.timing import seconds, spread


@dataclass(frozen=True, slots=True)
class Sizes:
    copy_bytes: int
    matmul: int  # of a square product
    repeats: int  # of the operation in one round
    rounds: int


FULL = Sizes(copy_bytes=4 << 30, matmul=8192, repeats=10, rounds=5)
SMALL = Sizes(copy_bytes=1 << 22, matmul=128, repeats=2, rounds=3)


@dataclass(frozen=True, slots=True)
class Roofs:
    """Medians."""

    bytes_per_s: float
    flop_per_s: float


def run(settings: Settings) -> Iterator[Check]:
    device, sizes = torch.device(settings.device), SMALL if settings.small else FULL
    yield attempt("copy bandwidth", lambda: copy_bandwidth(device, sizes))
    yield attempt("bf16 matmul", lambda: matmul_rate(device, sizes, settings.seed))


def measure(settings: Settings) -> Roofs:
    """Both, for a part that wants to be compared with them in the same process."""
    device, sizes = torch.device(settings.device), SMALL if settings.small else FULL
    copy, matmul = copy_bandwidth(device, sizes), matmul_rate(device, sizes, settings.seed)
    return Roofs(copy["bytes_per_s"]["median"], matmul["flop_per_s"]["median"])


def copy_bandwidth(device: torch.device, sizes: Sizes) -> Values:
    """Bytes read plus bytes written per second, device to device."""
    source = torch.zeros(sizes.copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copies() -> None:
        for _ in range(sizes.repeats):
            target.copy_(source)

    copies()
    rates = [2 * sizes.copy_bytes * sizes.repeats / seconds(copies, device) for _ in range(sizes.rounds)]
    figures = spread(rates)
    return {
        "headline": f"{figures['median'] / 1e12:.3f} TB/s",
        "bytes_per_s": figures,
        "buffer_bytes": sizes.copy_bytes,
        "counted": "bytes read and bytes written",
    }


def matmul_rate(device: torch.device, sizes: Sizes, seed: int) -> Values:
    """Floating-point operations per second of a square bf16 product of normal numbers (zeros run faster)."""
    generator = torch.Generator(device)
    generator.manual_seed(seed)
    shape = (sizes.matmul, sizes.matmul)
    left, right = (torch.randn(shape, generator=generator, device=device).to(torch.bfloat16) for _ in range(2))
    out = torch.empty_like(left)

    def products() -> None:
        for _ in range(sizes.repeats):
            torch.matmul(left, right, out=out)

    products()
    rates = [2 * sizes.matmul**3 * sizes.repeats / seconds(products, device) for _ in range(sizes.rounds)]
    figures = spread(rates)
    return {
        "headline": f"{figures['median'] / 1e12:.1f} TFLOP/s",
        "flop_per_s": figures,
        "shape": [sizes.matmul] * 3,
    }
