"""One graph: a whole step of decodes, from token ids to the next ones.

Legend: S rows of the graph, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moestro.workers.captured.batch import decode_batch
from moestro.workers.captured.buffers import DecodeBuffers
from moestro.workers.captured.graph import Capture, Graph
from moestro.workers.captured.mixture import StaticLayout, padded
from moestro.workers.captured.tail import Tail
from moestro.workers.health import StepHealth
from moestro.workers.kv_cache import KVCache
from moestro.workers.model.decoder import Decoder


@dataclass(frozen=True, slots=True)
class Outputs:
    """Shared by the graphs of every size: the first rows of each."""

    logits_RV: Tensor  # fp32
    told_2R: Tensor  # int64: the tail's codes; 1 for a row whose hidden state is not a number

    @staticmethod
    def allocate(most_rows: int, vocab_size: int, device: torch.device) -> Outputs:
        return Outputs(
            torch.zeros(most_rows, vocab_size, dtype=torch.float32, device=device),
            torch.zeros(2, most_rows, dtype=torch.int64, device=device),
        )

    @property
    def num_bytes(self) -> int:
        return self.logits_RV.nbytes + self.told_2R.nbytes


@dataclass(frozen=True, slots=True)
class CapturedStep:
    """A graph and what it leaves behind: ``health`` sees the gates of the last replay, whichever it was."""

    graph: Graph
    health: StepHealth


def capture_step(
    num_rows: int,
    decoder: Decoder,
    cache: KVCache,
    buffers: DecodeBuffers,
    outputs: Outputs,
    layouts: dict[int, StaticLayout],
    tail: Tail,
    capture: Capture,
    num_ranks: int,
) -> CapturedStep:
    """Captures a step of ``num_rows`` rows. The buffers must hold nothing but padding: it is computed at once."""
    rows = buffers.rows(num_rows)
    live_decoder = padded(decoder, layouts, rows.live_S)
    health = StepHealth()
    batch = decode_batch(rows, num_ranks, health)

    def work() -> None:
        health.begin()
        logits_SV = live_decoder.forward(batch, cache)
        outputs.logits_RV[:num_rows].copy_(logits_SV)
        outputs.told_2R[0, :num_rows].copy_(tail.codes(logits_SV, rows.temperature_S, rows.key_S))
        outputs.told_2R[1, :num_rows].copy_(health.bad_T())

    return CapturedStep(capture(work), health)
