"""The launches of attention, norms, sampling and sums: how many a step has, and that none is compiled anew for other
numbers of sequences, tokens or keys."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tests.kernels.cuda.hopper import launches_for_hopper

from moestro.kernels.backend import AttentionShape, Decodes, HeadNorm, Spans
from moestro.kernels.cuda.all_reduce import ordered_sum
from moestro.kernels.cuda.attention import make_attention
from moestro.kernels.cuda.most_likely import most_likely
from moestro.kernels.cuda.norm import add_rms_norm
from moestro.kernels.cuda.sampling import sample_rows

CPU = torch.device("cpu")


def launched(launches):
    names = [launch.kernel.removesuffix("_kernel") for launch in launches]
    binaries = {id(launch.binary) for launch in launches}
    launches.clear()
    return names, binaries


def test_attention(monkeypatch):
    shape = AttentionShape(8, 2, 64, 64, 0.125, None, torch.bfloat16, CPU)
    attention = make_attention(shape, HeadNorm(torch.ones(10, 64), 1e-6))
    kv_NCbD = torch.zeros(4, 4, 16, 64, dtype=torch.bfloat16)

    def apply(plan, num_tokens):
        qkv_TND = torch.zeros(num_tokens, 12, 64, dtype=torch.bfloat16)
        attention.apply(qkv_TND, torch.zeros(num_tokens, 1, 64), torch.zeros(num_tokens, 1, 64), kv_NCbD, plan)

    def decode(num_sequences, context):
        table_SB = torch.zeros(num_sequences, -(-context // 16), dtype=torch.int32)
        context_len_S = torch.full((num_sequences,), context, dtype=torch.int32)
        slot_S = torch.zeros(num_sequences, dtype=torch.int64)
        apply(attention.plan_decodes(Decodes(context_len_S, table_SB, slot_S, 16)), num_sequences)

    with launches_for_hopper(monkeypatch) as launches:
        decode(1, 512)
        assert launched(launches)[0] == ["rotate_write", "attention"]
        decode(1, 1024)
        long = launched(launches)
        assert long[0] == ["rotate_write", "attention", "join"]
        for num_sequences, context in ((2, 1040), (16, 4096), (33, 5000)):
            decode(num_sequences, context)
            assert launched(launches) == long
        table_SB = torch.zeros(2, 64, dtype=torch.int32)
        spans = Spans([0, 1, 20], [1000, 1019], 1, table_SB, torch.zeros(20, dtype=torch.int64), 16)
        apply(attention.plan(spans), 20)
        mixed = launched(launches)
        assert mixed == (["rotate_write", "attention", "join", "attention", "join"], long[1])


def test_the_rest(monkeypatch):
    def step(num_rows):
        x_TM = torch.zeros(num_rows, 64, dtype=torch.bfloat16)
        add_rms_norm(x_TM, x_TM.clone(), torch.ones(64, dtype=torch.bfloat16), 1e-6)
        logits_RV = torch.zeros(num_rows, 5000)
        temperature_R, key_R = torch.zeros(num_rows), torch.zeros(num_rows, dtype=torch.int64)
        _, _, normaliser_R2 = sample_rows(logits_RV, temperature_R, key_R)
        most_likely(logits_RV, normaliser_R2, 5)
        ordered_sum(torch.zeros(2, dtype=torch.int64), x_TM)

    names = ["add_rms_norm", "chunk", "draw", "token", "first_of_chunk", "first_of_row", "ordered_sum"]
    with launches_for_hopper(monkeypatch) as launches:
        step(1)
        once = launched(launches)
        assert once[0] == names
        for num_rows in (2, 16, 33):
            step(num_rows)
            assert launched(launches) == once
