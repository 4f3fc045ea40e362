"""Counter-based noise: a stateless hash of (seed, position, token id) becomes a uniform, a uniform becomes a Gumbel.

Legend: R = rows (sequences), K = tokens looked up in a row, V = vocabulary, P = pairs of tokens = ceil(V / 2).

The hash is SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators", with Stafford's
variant 13 of the finalizer), used as a counter: output n of the stream that starts at state s is mix64(s + n * GAMMA).

    key(seed, position)   = mix64(mix64(seed + GAMMA) + (position + 1) * GAMMA)
    word(key, id)         = the low (even id) or high (odd id) 32 bits of mix64(key + (id // 2 + 1) * GAMMA)
    uniform               = (float32(word mod 2**31) + 0.5) * 2**-31 * (1 - 2**-24)
    gumbel                = -log(-log1p(-uniform))

What is guaranteed: keys, words and uniforms are the same bits on every device and for every batch, since they are
integer arithmetic modulo 2**64, one int32 to float32 conversion, one addition and one multiplication, each correctly
rounded by IEEE 754. The two logarithms may differ in the last bit between kinds of chip. A uniform lies between
2**-32 and 1 - 2**-24, so a Gumbel is finite, between -2.9 and 22.2. Small uniforms are the fine end (steps of 2**-31),
and they give the large Gumbels, which decide a draw.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moestro.workers.sampling.seeds import GAMMA, MIX_1, MIX_2

_UNIFORM_SCALE = 2.0**-31 * (1.0 - 2.0**-24)  # a float32; keeps the largest uniform below one


def row_keys(seeds: Sequence[int], positions: Sequence[int]) -> Tensor:
    """One int64 key a row [R], on the CPU, from unsigned 64-bit seeds and positions (of the token to be drawn)."""
    seed_R = torch.tensor([_signed(seed) for seed in seeds], dtype=torch.int64)
    position_R = torch.tensor(positions, dtype=torch.int64)
    return _mix64_(_mix64_(seed_R + _signed(GAMMA)) + (position_R + 1) * _signed(GAMMA))


def uniform_vocab(key_R: Tensor, vocab_size: int) -> Tensor:
    """Uniforms [R, V] float32 in (0, 1), of every token id below ``vocab_size``, on the device of the keys [R]."""
    pairs_P = torch.arange(1, (vocab_size + 1) // 2 + 1, dtype=torch.int64, device=key_R.device)
    hash_RP = _mix64_(key_R[:, None] + pairs_P * _signed(GAMMA))
    word_RV = hash_RP.view(torch.int32)[:, :vocab_size]  # little-endian: the low word is the even id's
    return _to_uniform(word_RV & 0x7FFFFFFF)


def uniform_at(key_R: Tensor, id_RK: Tensor) -> Tensor:
    """Uniforms [R, K] float32 of the token ids [R, K]: the entries of ``uniform_vocab`` at these ids."""
    hash_RK = _mix64_(key_R[:, None] + ((id_RK >> 1) + 1) * _signed(GAMMA))
    shift_RK = (id_RK & 1) << 5
    return _to_uniform((hash_RK >> shift_RK) & 0x7FFFFFFF)


def gumbel_(uniform: Tensor) -> Tensor:
    """Turns uniforms in (0, 1) into standard Gumbel variates, in place."""
    return uniform.neg_().log1p_().neg_().log_().neg_()


def _to_uniform(word: Tensor) -> Tensor:
    return word.to(torch.float32).add_(0.5).mul_(_UNIFORM_SCALE)


def _mix64_(value: Tensor) -> Tensor:
    """``mix64`` on int64 tensors, in place; the shifts are made logical by masking the copies of the sign bit."""
    value ^= _logical_shift(value, 30)
    value *= _signed(MIX_1)
    value ^= _logical_shift(value, 27)
    value *= _signed(MIX_2)
    value ^= _logical_shift(value, 31)
    return value


def _logical_shift(value: Tensor, bits: int) -> Tensor:
    return (value >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned 64-bit integer."""
    return value - (1 << 64) if value >> 63 else value
