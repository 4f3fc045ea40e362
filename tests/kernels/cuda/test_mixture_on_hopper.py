"""The mixture's and the linear's kernels, compiled for Hopper: every tile of the table fits, nothing spills, and one
family of matrix instructions computes them all, whatever the number of rows. Needs no GPU."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("triton")

from tests.kernels.cuda.hopper import MAX_SHARED_BYTES, compile_for_hopper

from moestro.kernels.cuda import gate, linear, mixture, rows
from moestro.kernels.cuda.tiles import MAX_PARALLEL_ROWS, default_tile, h200, part_width


def arguments(given):
    """Types, and constants: those that have none, None among them."""
    types = {name: value for name, value in given.items() if isinstance(value, str)}
    return {name: value for name, value in given.items() if not isinstance(value, str)}, types


def compiled(kernel, given, tile):
    constants, types = arguments(
        {**given, "BLOCK_O": tile.out, "BLOCK_N": tile.rows, "BLOCK_K": tile.features},
    )
    made = compile_for_hopper(kernel, constants, types, num_warps=tile.warps, num_stages=tile.stages)
    assert made.shared_bytes <= MAX_SHARED_BYTES
    assert (made.spills, made.stack_bytes) == (0, 0)
    assert "cp.async.cg.shared.global" in made.ptx  # weights travel in 16 bytes, beside the products
    return made


def compiled_linear(out_features, in_features, tile, num_rows, dtype="*bf16", bias=None):
    part = part_width(out_features, in_features)
    parallel = part < in_features and num_rows <= MAX_PARALLEL_ROWS
    given = {
        **dict.fromkeys(("w_ptr", "x_ptr", "y_ptr"), dtype),
        "bias_ptr": bias,
        "partial_ptr": "*fp32" if parallel else None,
        "arrived_ptr": "*i32",
        "num_rows": "i32",
        "O": out_features,
        "I": in_features,
        "PART": part,
        "PARALLEL": parallel,
        "GROUP": 16,
    }
    return compiled(linear.linear_kernel, given, tile)


def compiled_expert(kernel, width, model_width, tile, *, fp8=False, compared=False, biased=False):
    given = {
        "w_ptr": "*fp8e4nv" if fp8 else "*bf16",
        "scale_ptr": "*fp32" if fp8 else None,
        "bias_ptr": "*bf16" if biased else None,
        "hidden_ptr": "*bf16",
        "slots_ptr": "*i64" if compared else None,
        "arrived_ptr": "*i32" if compared else None,
        "table_ptr": None if compared else "*i32",
        "order_ptr": None if compared else "*i32",
        "num_pairs": "i32",
        "num_tiles": "i32",
        "K": 8,
        "I": width,
        "D": model_width,
        "PAIRS": 128,
    }
    if kernel == "gate_up":
        alpha, limit, shift = (1.702, 7.0, 1.0) if biased else (1.0, 0.0, 0.0)
        given |= {"x_ptr": "*bf16", "counts_ptr": "*i64" if compared else None, "num_slots": "i32", "num_sums": "i32"}
        given |= {"ALPHA": alpha, "LIMIT": limit, "UP_SHIFT": shift, "SLOTS": 256}
        return compiled(mixture.gate_up_kernel, given, tile)
    given |= {"y_ptr": "*bf16", "weights_ptr": "*fp32" if compared else None, "out_ptr": "*bf16" if compared else None}
    return compiled(mixture.down_kernel, given, tile)


def distinct_tiles():
    """Of each kernel each tile once, with the first shape that has it."""
    seen = {}
    for (kernel, out_features, in_features), choices in h200().tiles.items():
        for num_rows, tile in choices:
            # Sums in parts are another kernel: a second accumulator.
            parts = kernel == "linear" and part_width(out_features, in_features) < in_features
            seen.setdefault((kernel, tile, parts), (kernel, out_features, in_features, num_rows, tile))
    return list(seen.values())


@pytest.mark.parametrize(("kernel", "out_features", "in_features", "num_rows", "tile"), distinct_tiles())
def test_every_tile_of_the_table(kernel, out_features, in_features, num_rows, tile):
    name, _, fp8 = kernel.partition("_fp8")
    if name == "linear":
        made = compiled_linear(out_features, in_features, tile, num_rows)
    else:
        width, model_width = (out_features // 2, in_features) if name == "gate_up" else (in_features, out_features)
        made = compiled_expert(name, width, model_width, tile, fp8=bool(fp8))
    family = r"wgmma m64n\d+k32\.f32\.e4m3\.e4m3" if fp8 else r"wgmma m64n\d+k16\.f32\.bf16\.bf16"
    assert made.matrix_instructions
    assert all(re.fullmatch(family, name) for name in made.matrix_instructions), made.matrix_instructions


@pytest.mark.parametrize("kernel", ["gate_up", "down"])
@pytest.mark.parametrize(
    ("width", "model_width", "options"),
    [(768, 2048, {}), (2880, 2880, {"biased": True}), (768, 2048, {"fp8": True})],
    ids=["Qwen3", "gpt-oss", "fp8"],
)
def test_few_pairs(kernel, width, model_width, options):
    name = f"{kernel}_fp8" if options.get("fp8") else kernel
    made = compiled_expert(kernel, width, model_width, default_tile(name, 4096, 2048, 1), compared=True, **options)
    assert all(name.startswith("wgmma m64n16k") for name in made.matrix_instructions), made.matrix_instructions


@pytest.mark.parametrize("num_rows", [16, 256])
def test_a_linear_in_fp32_stays_away_from_the_matrix_unit(num_rows):
    made = compiled_linear(256, 7168, default_tile("linear_fp32", 256, 7168, num_rows), num_rows, dtype="*fp32")
    assert not made.matrix_instructions


def test_a_bias_and_features_that_no_block_divides():
    tile = default_tile("linear", 5120, 2872, 16)
    assert compiled_linear(5120, 2872, tile, 16, bias="*bf16").matrix_instructions


@pytest.mark.parametrize(
    ("num_experts", "top_k", "groups", "kept", "sigmoid"),
    [(128, 8, 1, 1, False), (256, 8, 8, 4, True), (512, 10, 1, 1, False)],
)
def test_gate(num_experts, top_k, groups, kept, sigmoid):
    given = {
        "logits_ptr": "*bf16",
        "bias_ptr": "*fp32" if sigmoid else None,
        "ids_ptr": "*i64",
        "weights_ptr": "*fp32",
        "counts_ptr": "*i64",
        "E": num_experts,
        "K": top_k,
        "SIGMOID": sigmoid,
        "RENORMALIZE": True,
        "SCALING": 2.5 if sigmoid else 1.0,
        "GROUPS": groups,
        "KEPT_GROUPS": kept,
        "PAD_G": groups,
        "PAD_N": num_experts // groups,
        "PAD_K": 16,
    }
    check_small(gate.gate_kernel, given, num_warps=1 if num_experts <= 128 else 4)


def test_rows():
    padded = 1024  # 512 slots
    count = {"slots_ptr": "*i64", "histogram_ptr": "*i32", "num_pairs": "i32", "L": padded, "PAIRS": 128}
    check_small(rows.count_kernel, count, num_warps=8)
    pointers = {"counts_ptr": "*i64", "order_ptr": "*i32", "table_ptr": "*i32"}
    sizes = dict.fromkeys(("num_slots", "num_programs", "num_tiles"), "i32")
    check_small(rows.place_kernel, {**count, **pointers, **sizes, "N": 16, "TILES": 16}, num_warps=8)
    table = {"counts_ptr": "*i64", "table_ptr": "*i32", "num_slots": "i32", "num_tiles": "i32"}
    check_small(rows.tiles_kernel, {**table, "L": padded, "N": 16, "TILES": 16}, num_warps=8)


def test_sum():
    given = {"y_ptr": "*bf16", "weights_ptr": "*fp32", "out_ptr": "*bf16", "K": 8, "D": 2048, "BLOCK_O": 1024}
    assert "fma" not in check_small(mixture.sum_kernel, given, num_warps=4).ptx  # as torch: a product, then a sum


def check_small(kernel, given, num_warps):
    constants, types = arguments(given)
    made = compile_for_hopper(kernel, constants, types, num_warps=num_warps, num_stages=3)
    assert made.spills == 0
    assert made.shared_bytes <= MAX_SHARED_BYTES
    return made
