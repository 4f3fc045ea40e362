"""The noise against its definition in plain Python, published outputs of SplitMix64, and statistics."""

from __future__ import annotations

import struct

import pytest
import torch
from tests.sampling.statistics import chi_square_fits, kolmogorov_smirnov_fits, uncorrelated

from moestro.workers.sampling.noise import gumbel_, row_keys, uniform_at, uniform_vocab
from moestro.workers.sampling.seeds import GAMMA, derive_seed, mix64

torch.set_num_threads(1)
MASK = (1 << 64) - 1


def uniform_by_definition(seed: int, position: int, token: int) -> float:
    key = mix64((mix64((seed + GAMMA) & MASK) + (position + 1) * GAMMA) & MASK)
    word = mix64((key + (token // 2 + 1) * GAMMA) & MASK) >> (32 * (token % 2)) & 0x7FFFFFFF
    f32 = lambda value: struct.unpack("f", struct.pack("f", value))[0]  # noqa: E731
    # A float64 product of two float32 is exact, and 31-bit sums are exact in float64: one rounding each, as in IEEE.
    return f32(f32(f32(word) + 0.5) * (2.0**-31 * (1 - 2.0**-24)))


def test_mixer_reproduces_the_published_splitmix64_stream() -> None:
    stream = [mix64((1234567 + n * GAMMA) & MASK) for n in range(1, 6)]
    assert stream == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@pytest.mark.parametrize("vocab_size", [1, 2, 7, 300])
def test_uniforms_equal_their_definition_bit_for_bit(vocab_size: int) -> None:
    cases = [(0, 0), (1, 0), (0, 1), (MASK, 5), (1 << 63, 131071), (0x123456789ABCDEF0, 1 << 31)]
    got = uniform_vocab(row_keys([s for s, _ in cases], [p for _, p in cases]), vocab_size)
    want = [[uniform_by_definition(s, p, token) for token in range(vocab_size)] for s, p in cases]
    assert got.dtype == torch.float32
    assert got.tolist() == want


def test_golden_vector() -> None:
    bits = uniform_vocab(row_keys([42], [1000]), 6).view(torch.int32)
    assert bits.tolist() == [[1059236871, 1056333467, 1063515135, 1059322080, 1058892098, 1016271099]]


def test_lookup_equals_the_whole_vocabulary() -> None:
    keys = row_keys(range(5), [3, 1, 4, 1, 5])
    whole = uniform_vocab(keys, 101)
    ids = torch.stack([torch.randperm(101, generator=torch.Generator().manual_seed(r)) for r in range(5)])
    assert torch.equal(uniform_at(keys, ids), whole.gather(1, ids))


def test_a_row_does_not_depend_on_its_batch() -> None:
    seeds, positions = list(range(17)), list(range(100, 117))
    batch = gumbel_(uniform_vocab(row_keys(seeds, positions), 1003))
    for row in range(17):
        alone = gumbel_(uniform_vocab(row_keys([seeds[row]], [positions[row]]), 1003))
        assert torch.equal(batch[row : row + 1], alone)


def test_extreme_words_stay_inside_the_open_interval() -> None:
    from moestro.workers.sampling.noise import _to_uniform

    uniform = _to_uniform(torch.tensor([0, 1, 0x7FFFFFFF, 0x7FFFFFC0], dtype=torch.int32))
    assert float(uniform.min()) > 0
    assert float(uniform.max()) < 1
    assert bool(gumbel_(uniform).isfinite().all())


@pytest.mark.parametrize("axis", ["seeds", "positions", "tokens"])
def test_uniform_along_each_axis(axis: str) -> None:
    n = 60_000
    if axis == "tokens":
        uniforms = uniform_vocab(row_keys([7], [12]), n)[0]
    elif axis == "seeds":
        uniforms = uniform_vocab(row_keys(range(n), [12] * n), 3)[:, 2]
    else:
        uniforms = uniform_vocab(row_keys([7] * n, range(n)), 3)[:, 1]
    assert kolmogorov_smirnov_fits(uniforms)
    counts = torch.bincount((uniforms * 256).long(), minlength=256)
    assert chi_square_fits(counts, torch.full((256,), n / 256))


@pytest.mark.parametrize("neighbour", ["seed", "position", "token", "half"])
def test_neighbours_are_independent(neighbour: str) -> None:
    """Joint cells of a value and its neighbour's are equally full, and the two do not correlate."""
    seeds, positions = range(1000, 1300), range(300)
    a = uniform_vocab(row_keys(seeds, [9] * 300), 200)
    if neighbour == "seed":
        b = uniform_vocab(row_keys([s + 1 for s in seeds], [9] * 300), 200)
    elif neighbour == "position":
        a = uniform_vocab(row_keys([5] * 300, positions), 200)
        b = uniform_vocab(row_keys([5] * 300, [p + 1 for p in positions]), 200)
    elif neighbour == "token":
        a, b = a[:, 1:-1:2], a[:, 2::2]
    else:  # the two tokens that share one hash
        a, b = a[:, ::2], a[:, 1::2]
    cells = (a * 16).long() * 16 + (b * 16).long()
    counts = torch.bincount(cells.flatten(), minlength=256)
    assert chi_square_fits(counts, torch.full((256,), a.numel() / 256))
    assert uncorrelated(a, b)


def test_every_bit_of_the_seed_matters() -> None:
    base = uniform_vocab(row_keys([0], [0]), 64)
    for bit in range(64):
        other = uniform_vocab(row_keys([1 << bit], [0]), 64)
        assert int((base == other).sum()) == 0, f"bit {bit}"


def test_gumbel_has_its_mean_and_variance() -> None:
    noise = gumbel_(uniform_vocab(row_keys(range(100), [0] * 100), 2000)).double()
    assert abs(float(noise.mean()) - 0.5772157) < 5 * 1.2825 / noise.numel() ** 0.5
    assert abs(float(noise.var()) - 1.644934) < 0.03


def test_derived_seeds() -> None:
    assert derive_seed(99, 0) == 99
    seeds = [derive_seed(seed, choice) for seed in range(50) for choice in range(20)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed <= MASK for seed in seeds)
    assert derive_seed(99, 1) == 16517741717546743368
    uniforms = uniform_vocab(row_keys([derive_seed(3, c) for c in range(500)], [0] * 500), 40)
    assert kolmogorov_smirnov_fits(uniforms)


@pytest.mark.parametrize(("seed", "choice", "field"), [(-1, 0, "seed"), (1 << 64, 1, "seed"), (0, -1, "choice")])
def test_derive_seed_refuses(seed: int, choice: int, field: str) -> None:
    with pytest.raises(ValueError, match=field):
        derive_seed(seed, choice)
