"""Whether a rank captures its steps of decodes, why not, and what that costs in memory."""

from __future__ import annotations

import logging

import torch

from moestro.kernels.grouped_experts import LoopedExperts
from moestro.kernels.plain import PlainAttention
from moestro.router.parallel import GroupShape
from moestro.workers.captured.graph import Capture, CudaCapture
from moestro.workers.captured.runner import capture_runner
from moestro.workers.captured.sizes import GraphSizes, graph_sizes
from moestro.workers.captured.tail import choose_tail
from moestro.workers.model.decoder import Decoder
from moestro.workers.runner import Runner, StepRunner

log = logging.getLogger(__name__)

SPARE_BLOCKS = 1
"""Blocks of each cache group that only padding writes to."""


def why_not_captured(decoder: Decoder) -> str:
    """Why no step of this model can be captured; nothing, when it can. The same on every rank of a group."""
    device = decoder.cache_spec.device
    if device.type != "cuda":
        return f"graphs are CUDA's, and the rank is on {device.type}"
    if any(isinstance(bank.experts, LoopedExperts) for bank in decoder.banks.values()):
        return f"the {decoder.stack.backend.name} backend reads on the host how many rows each expert has"
    if any(isinstance(layer.attention.kernel, PlainAttention) for layer in decoder.layers):
        return "plain attention would read as many keys as the longest context has, for every sequence"
    return ""


def usable_sizes(decoder: Decoder, largest: int, shape: GroupShape) -> GraphSizes:
    """For which batches this rank captures its step; says so."""
    reason = why_not_captured(decoder) or ("" if largest else "none was asked for")
    sizes = GraphSizes(()) if reason else graph_sizes(largest, shape)
    if not sizes.rows:
        log.info("graphs: none, since %s", reason or f"tp {shape.tp} is not a power of two")
    return sizes


def step_runner(
    eager: Runner,
    decoder: Decoder,
    sizes: GraphSizes,
    num_columns: int,
    shape: GroupShape,
    capture: Capture | None = None,
) -> StepRunner:
    """The runner that captures what ``sizes`` says, or the eager one. Collective within the group."""
    if not sizes.rows:
        return eager
    before = _reserved(eager.device)
    runner = capture_runner(
        eager, decoder, sizes, num_columns, shape.world_size, capture or CudaCapture(), choose_tail(decoder)
    )
    log.info(
        "graphs: %d of up to %d rows; %d bytes beside weights and cache, %d of them for inputs and logits",
        len(sizes.rows),
        sizes.largest,
        _reserved(eager.device) - before,
        runner.num_bytes,
    )
    return runner


def static_bytes(sizes: GraphSizes, vocab_size: int, num_columns: int, num_groups: int) -> int:
    """Device memory of the tensors that all graphs share, known before any is captured: logits, codes, inputs. What a
    forward pass of the largest graph needs for itself comes on top, about as much as an eager step of that size."""
    rows = sizes.largest
    return rows * (4 * vocab_size + 16 + 8 * (4 + num_groups) + 4 * (2 + num_groups * num_columns))


def _reserved(device: torch.device) -> int:
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0
