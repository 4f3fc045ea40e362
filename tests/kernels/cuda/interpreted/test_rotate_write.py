"""Norm, rotation and cache write against the plain backend's parts, and what becomes of a block's other slots."""

from __future__ import annotations

import pytest
import torch

from moestro.kernels.cuda.rotate_write import rotate_write_
from moestro.kernels.rms_norm import rms_norm_reference
from moestro.kernels.rotary import rotary_tables, rotate_reference


def make(seed, num_tokens, num_heads, num_kv_heads, width, rotary_dim, block_size=4, num_blocks=8):
    generator = torch.Generator().manual_seed(seed)
    heads = num_heads + 2 * num_kv_heads
    qkv_TND = torch.randn(num_tokens, heads, width, generator=generator).bfloat16()
    angles_Th = torch.rand(num_tokens, rotary_dim // 2, generator=generator) * 6
    weight_ND = 1 + 0.2 * torch.randn(num_heads + num_kv_heads, width, generator=generator)
    kv_NCbD = torch.randn(num_blocks, 2 * num_kv_heads, block_size, width, generator=generator).bfloat16()
    return qkv_TND, angles_Th, weight_ND, kv_NCbD


def slots_of(kv_NCbD):
    return kv_NCbD.transpose(1, 2).reshape(-1, kv_NCbD.shape[1], kv_NCbD.shape[3])


@pytest.mark.parametrize(
    ("width", "rotary_dim", "normed"),
    [(64, 64, True), (80, 80, False), (96, 48, True), (128, 128, True), (192, 64, False), (256, 256, True)],
)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(3, 1), (8, 2)])
def test_is_the_definition(width, rotary_dim, normed, num_heads, num_kv_heads):
    qkv_TND, angles_Th, weight_ND, kv_NCbD = make(width, 5, num_heads, num_kv_heads, width, rotary_dim)
    slot_T = torch.tensor([5, 6, 11, 13, 30])
    want_TND = qkv_TND.double()
    rotated = num_heads + num_kv_heads
    if normed:
        want_TND[:, :rotated] = rms_norm_reference(want_TND[:, :rotated], None, 1e-6) * weight_ND.double()
    want_TND[:, :rotated, :rotary_dim] = rotate_reference(want_TND[:, :rotated, :rotary_dim], angles_Th, 1.0).double()
    got_TND, before = qkv_TND.clone(), slots_of(kv_NCbD).clone()
    weight = weight_ND if normed else None
    rotate_write_(got_TND, *rotary_tables(angles_Th, 1.0), weight, 1e-6, slot_T, kv_NCbD, num_heads)
    # Rounded once: half a unit of bf16's last place, and fp32's noise.
    torch.testing.assert_close(got_TND[:, :num_heads].double(), want_TND[:, :num_heads], rtol=2**-8, atol=1e-5)
    after = slots_of(kv_NCbD)
    torch.testing.assert_close(after[slot_T].double(), want_TND[:, num_heads:], rtol=2**-8, atol=1e-5)
    assert torch.equal(after[slot_T][:, num_kv_heads:], qkv_TND[:, rotated:]), "values are copied"
    others = torch.ones(len(after), dtype=torch.bool)
    others[slot_T] = False
    assert torch.equal(after[others], before[others])
    assert torch.equal(got_TND[:, num_heads:], qkv_TND[:, num_heads:])


def write(slots, qkv_TND, angles_Th, weight_ND, kv_NCbD):
    qkv_TND = qkv_TND.clone()
    slot_T = torch.tensor(slots)
    rotate_write_(qkv_TND, *rotary_tables(angles_Th, 1.0), weight_ND, 1e-6, slot_T, kv_NCbD, 2)
    return qkv_TND


@pytest.mark.parametrize(
    ("slots", "emptied"),
    [
        ([4], [5, 6, 7]),  # a decode begins a block
        ([5], []),  # or goes on in it
        ([7], []),
        ([4, 5], [6, 7]),  # a chunk begins a block and leaves room
        ([6, 7, 20, 21], [22, 23]),  # goes on in one and begins the next
        ([4, 5, 6, 7], []),  # a full block
        ([4, 8], [5, 6, 7, 9, 10, 11]),  # two sequences, block after block
        ([7, 8], [9, 10, 11]),
        ([4, -1, -1], [5, 6, 7]),  # padding
        ([-1, 9], []),
        ([12, 12, 12], [13, 14, 15]),  # padding that shares a slot
    ],
)
def test_a_block_is_emptied_when_its_first_slot_is_written(slots, emptied):
    qkv_TND, angles_Th, weight_ND, kv_NCbD = make(7, len(slots), 2, 1, 16, 16)
    kv_NCbD[:, :, :, 3] = float("nan")
    before = slots_of(kv_NCbD).clone()
    if slots.count(12) > 1:
        qkv_TND[:], angles_Th[:] = qkv_TND[:1].clone(), angles_Th[:1].clone()
    write(slots, qkv_TND, angles_Th, weight_ND, kv_NCbD)
    after = slots_of(kv_NCbD)
    written = {slot for slot in slots if slot >= 0}
    for slot in range(len(after)):
        if slot in emptied:
            assert not after[slot].any(), slot
        elif slot in written:
            assert after[slot].isfinite().all(), slot
        else:
            assert torch.equal(after[slot].view(torch.int16), before[slot].view(torch.int16)), slot


def test_bits_do_not_depend_on_company():
    qkv_TND, angles_Th, weight_ND, kv_NCbD = make(3, 6, 2, 1, 64, 64)
    alone_NCbD = kv_NCbD.clone()
    slots = [4, 5, 6, 17, 22, 28]
    crowd = write(slots, qkv_TND, angles_Th, weight_ND, kv_NCbD)
    for t in (0, 3, 5):
        alone = write([slots[t]], qkv_TND[t : t + 1], angles_Th[t : t + 1], weight_ND, alone_NCbD)
        assert torch.equal(alone[0], crowd[t])
        assert torch.equal(slots_of(alone_NCbD)[slots[t]], slots_of(kv_NCbD)[slots[t]])


def test_an_e4m3_cache_holds_what_its_scale_gives_back():
    qkv_TND, angles_Th, weight_ND, kv_NCbD = make(5, 3, 2, 1, 64, 32)
    scale_C = torch.tensor([0.02, 0.5])
    small_NCbD = torch.ones(kv_NCbD.shape).to(torch.float8_e4m3fn)
    slot_T = torch.tensor([4, 5, 18])
    tables = rotary_tables(angles_Th, 1.0)
    qkv_TND[0, 3, 0] = 1e4
    rotate_write_(qkv_TND.clone(), *tables, weight_ND, 1e-6, slot_T, small_NCbD, 2, scale_C)
    rotate_write_(qkv_TND.clone(), *tables, weight_ND, 1e-6, slot_T, kv_NCbD, 2)
    got, want = (slots_of(kv.float())[slot_T] for kv in (small_NCbD, kv_NCbD))
    torch.testing.assert_close(got * scale_C[:, None], want.clamp(max=224), rtol=2**-4 + 2**-8, atol=0.5 * 2**-9)
    assert not slots_of(small_NCbD.float())[6:8].any()
