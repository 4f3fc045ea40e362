"""What Hopper's compiler makes of the kernels for attention, norms, sampling and sums: no register is spilled, and the
matrix unit is the one that was meant."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
import triton
from tests.kernels.cuda.hopper import MAX_SHARED_BYTES, compile_for_hopper

from moestro.kernels.cuda.all_reduce import ordered_sum_kernel
from moestro.kernels.cuda.attention_tile import ROWS, attention_tile
from moestro.kernels.cuda.join_segments import join_kernel
from moestro.kernels.cuda.most_likely import first_of_chunk_kernel, first_of_row_kernel
from moestro.kernels.cuda.norm import add_rms_norm_kernel, norm_warps
from moestro.kernels.cuda.paged_attention import attention_kernel
from moestro.kernels.cuda.rotate_write import HEADS, rotate_write_kernel
from moestro.kernels.cuda.sampling import chunk_kernel, draw_kernel, token_kernel

# (query heads, key/value heads, width, rotated, window, norm, sinks): one of each tile, and the odd widths.
# Mixtral-8x7B differs from Qwen3-30B-A3B in the number of heads alone.
SHAPES = {
    "qwen3-30b": (32, 4, 128, 128, 0, True, False),
    "gpt-oss-20b": (64, 8, 64, 64, 128, False, True),
    "width-80": (8, 8, 80, 80, 0, False, False),
    "width-192": (8, 2, 192, 64, 0, True, False),
    "width-256": (8, 1, 256, 256, 4096, True, False),
}


def check(compiled):
    assert compiled.spills == 0
    assert compiled.stack_bytes == 0
    assert compiled.shared_bytes <= MAX_SHARED_BYTES
    return compiled


@pytest.mark.parametrize(
    ("name", "cache"), [*((name, "bf16") for name in SHAPES), ("qwen3-30b", "fp8e4nv"), ("gpt-oss-20b", "fp8e4nv")]
)
def test_attention(name, cache):
    num_heads, num_kv_heads, width, _, window, _, sinks = SHAPES[name]
    tile = attention_tile(width)
    constants = {
        "NUM_KV_HEADS": num_kv_heads,
        "GROUP": num_heads // num_kv_heads,
        "HEAD_DIM": width,
        "WINDOW": window,
        "SEGMENT": tile.segment,
        "BLOCK_N": tile.keys,
        "BLOCK_D": triton.next_power_of_2(width),
    }
    types = {"blocks_ptr": "*i32", "out_ptr": "*bf16", "partial_ptr": "*fp32", "partial_ml_ptr": "*fp32"}
    types |= dict.fromkeys(("num_blocks", "num_splits", "rows_kept"), "i32")
    for pointer, given in (("sinks_ptr", sinks), ("scale_ptr", cache != "bf16")):
        if given:
            types[pointer] = "*fp32"
        else:
            constants[pointer] = None
    check(compile_for_hopper(join_kernel, constants, types, num_warps=1, num_stages=3))
    constants |= {"Q_STRIDE": (num_heads + 2 * num_kv_heads) * width, "BLOCK_SIZE": 16, "BLOCK_M": ROWS}
    types |= {"q_ptr": "*bf16", "kv_ptr": f"*{cache}", "table_ptr": "*i32", "table_stride": "i32"}
    types |= {"score_scale": "fp32"}
    compiled = compile_for_hopper(attention_kernel, constants, types, num_warps=tile.warps, num_stages=tile.stages)
    check(compiled)
    assert all(name.startswith("wgmma m64") for name in compiled.matrix_instructions), compiled.matrix_instructions
    assert len(compiled.matrix_instructions) <= 2, "scores and values"
    # Two blocks of four warps, or one of eight, at least: while one waits for memory the other computes.
    blocks = 2 if tile.warps == 4 else 1
    assert blocks * tile.warps * 32 * compiled.registers <= 65536
    assert blocks * compiled.shared_bytes <= MAX_SHARED_BYTES
    if cache == "bf16":
        assert "LDGSTS.E.BYPASS" in compiled.sass, "tiles are fetched ahead, past the registers"


@pytest.mark.parametrize(
    ("name", "cache"),
    [("qwen3-30b", "bf16"), ("gpt-oss-20b", "fp8e4nv"), ("width-192", "bf16"), ("width-256", "fp8e4nv")],
)
def test_rotate_write(name, cache):
    num_heads, num_kv_heads, width, rotary_dim, _, norm, _ = SHAPES[name]
    constants = {
        "NUM_HEADS": num_heads,
        "NUM_KV_HEADS": num_kv_heads,
        "HEAD_DIM": width,
        "ROTARY_DIM": rotary_dim,
        "BLOCK_SIZE": 16,
        "HALF": triton.next_power_of_2(rotary_dim // 2),
        "REST": triton.next_power_of_2(max(1, width - rotary_dim)),
        "HEADS": HEADS,
    }
    types = {"qkv_ptr": "*bf16", "cos_ptr": "*fp32", "sin_ptr": "*fp32", "slot_ptr": "*i64", "kv_ptr": f"*{cache}"}
    types |= {"num_tokens": "i32", "eps": "fp32"}
    for pointer, given in (("weight_ptr", norm), ("scale_ptr", cache != "bf16")):
        if given:
            types[pointer] = "*fp32"
        else:
            constants[pointer] = None
    check(compile_for_hopper(rotate_write_kernel, constants, types, num_warps=HEADS, num_stages=3))


@pytest.mark.parametrize("width", [2048, 2880])
def test_add_rms_norm(width):
    block = triton.next_power_of_2(width)
    types = dict.fromkeys(("x_ptr", "delta_ptr", "weight_ptr", "sum_ptr", "out_ptr"), "*bf16") | {"eps": "fp32"}
    constants = {"WIDTH": width, "BLOCK": block}
    compiled = compile_for_hopper(add_rms_norm_kernel, constants, types, num_warps=norm_warps(block), num_stages=3)
    assert "LDG.E.128" in check(compiled).sass, "16 bytes a load"


@pytest.mark.parametrize("logits", ["bf16", "fp32"])
def test_sampling(logits):
    shape = {"VOCABULARY": 151936, "NUM_CHUNKS": 38}
    types = {"logits_ptr": f"*{logits}", "best_ptr": "*fp32", "id_ptr": "*i32", "sum_ptr": "*fp32"}
    check(compile_for_hopper(chunk_kernel, shape | {"BLOCK": 4096}, types, num_warps=8, num_stages=3))
    drawing = {"temperature_ptr": "*fp32", "key_ptr": "*i64", "score_ptr": "*fp32", "drawn_ptr": "*i32"}
    given = {name: types[name] for name in ("logits_ptr", "best_ptr")} | drawing
    check(
        compile_for_hopper(
            draw_kernel, shape | {"CHUNKS": 64, "BLOCK": 4096}, given, num_warps=8, num_stages=3
        )
    )  # fmt: skip
    results = {"code_ptr": "*i64", "logprob_ptr": "*fp32", "normaliser_ptr": "*fp32"}
    given = types | {name: kind for name, kind in drawing.items() if name != "key_ptr"} | results
    check(compile_for_hopper(token_kernel, shape | {"CHUNKS": 64}, given, num_warps=1, num_stages=3))


def test_most_likely():
    types = {"logits_ptr": "*fp32", "packed_ptr": "*i64"}
    constants = {"VOCABULARY": 151936, "NUM_CHUNKS": 38, "K": 20, "BLOCK": 4096}
    check(compile_for_hopper(first_of_chunk_kernel, constants, types, num_warps=8, num_stages=3))
    types |= {"normaliser_ptr": "*fp32", "id_ptr": "*i64", "logprob_ptr": "*fp32"}
    constants = {"VOCABULARY": 151936, "NUM_PACKED": 38 * 20, "K": 20, "BLOCK": 1024}
    check(compile_for_hopper(first_of_row_kernel, constants, types, num_warps=4, num_stages=3))


@pytest.mark.parametrize("ranks", [8])
def test_ordered_sum(ranks):
    types = {"peers_ptr": "*i64", "out_ptr": "*bf16", "num_eights": "i32"}
    constants = {"RANKS": ranks, "BLOCK": 2048}
    compiled = check(compile_for_hopper(ordered_sum_kernel, constants, types, num_warps=8, num_stages=3))
    assert "LDG.E.128" in compiled.sass, "16 bytes a load"
