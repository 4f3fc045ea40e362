"""A runner whose steps of decodes are replayed graphs; every other step is the eager runner's.

Legend: R rows of a graph, n sequences of a step, N ranks of the group.

Which steps: those in which every span is one token that samples, nobody asks for a trace, and a graph is large enough
for the busiest rank. A rank without work replays along when the others may. Graph and eager step make the same
collectives (see ``graph_sizes``), so ranks need not agree on which of the two it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moestro.protos.sequences import SampledToken
from moestro.workers.batching import LogitRows, build_batch
from moestro.workers.captured.buffers import DecodeBuffers
from moestro.workers.captured.graph import Capture
from moestro.workers.captured.mixture import StaticLayout, static_layouts
from moestro.workers.captured.sizes import GraphSizes
from moestro.workers.captured.step import CapturedStep, Outputs, capture_step
from moestro.workers.captured.tail import GREEDY, Tail
from moestro.workers.kv_cache import KVCache
from moestro.workers.model.decoder import Decoder
from moestro.workers.runner import Launched, Runner, StepResult, draw, failures
from moestro.workers.sampling.greedy_codes import token_of
from moestro.workers.scheduler_sequence import StepPlan

_HOST = torch.device("cpu")


def is_plain(plan: StepPlan) -> bool:
    """Whether a plan is a step of decodes that a graph can compute."""
    return plan.num_decodes == len(plan.spans) and all(
        samples and not sequence.is_traced and not sequence.wants_prompt_logprobs
        for sequence, _, _, samples in plan.spans
    )


class CapturedRunner:
    """A ``StepRunner``. Make it with ``capture_runner``."""

    def __init__(
        self,
        eager: Runner,
        sizes: GraphSizes,
        steps: dict[int, CapturedStep],
        buffers: DecodeBuffers,
        outputs: Outputs,
        layouts: dict[int, StaticLayout],
        tail: Tail,
    ) -> None:
        self.eager = eager
        self.sizes = sizes
        self._steps = steps
        self._buffers = buffers
        self.outputs = outputs
        self._layouts = tuple(layouts.values())
        self._tail = tail
        self._told_2R = torch.zeros_like(outputs.told_2R, device=_HOST)
        self._done: Callable[[], Callable[[], object]] = _nothing_to_wait_for
        if eager.device.type == "cuda":
            self._told_2R = self._told_2R.pin_memory()
            self._done = _recorded_event

    @property
    def cache(self) -> KVCache:
        return self.eager.cache

    @property
    def device(self) -> torch.device:
        return self.eager.device

    @property
    def num_bytes(self) -> int:
        """On the device, of inputs and outputs; the graphs' own memory is not counted."""
        return self._buffers.num_bytes + self.outputs.num_bytes

    def run(self, plan: StepPlan, num_tokens_N: tuple[int, ...]) -> StepResult:
        """Launches and collects."""
        return self.launch(plan, num_tokens_N).collect()

    @torch.inference_mode()
    def launch(self, plan: StepPlan, num_tokens_N: tuple[int, ...]) -> Launched:
        num_rows = self.sizes.fit(num_tokens_N)
        if num_rows is None or not is_plain(plan):
            return self.eager.launch(plan, num_tokens_N)
        batch, rows = build_batch(plan, num_tokens_N, self.cache.block_size, _HOST)
        self._buffers.fill_(num_rows, batch, self._tail.noise([span.sequence for span in plan.spans]))
        for layout in self._layouts:
            layout.refresh_()
        step = self._steps[num_rows]
        step.graph.replay()
        self._told_2R.copy_(self.outputs.told_2R, non_blocking=True)
        return _Replayed(plan, rows, step, self._tail, self.outputs.logits_RV, self._told_2R, self._done())


@dataclass(frozen=True, slots=True)
class _Replayed:
    """A replay that is under way."""

    plan: StepPlan
    rows: LogitRows
    step: CapturedStep
    tail: Tail
    logits_RV: Tensor
    told_2R: Tensor  # on the host, once ``wait`` has returned
    wait: Callable[[], object]

    @torch.inference_mode()
    def collect(self) -> StepResult:
        sequences = [span.sequence for span in self.plan.spans]
        if all(self.tail.serves(sequence.sampling) for sequence in sequences):
            self.wait()
            codes = self.told_2R[0, : len(sequences)].tolist()
            sampled: dict[str, SampledToken] = {
                sequence.sequence_id: token_of(code) for sequence, code in zip(sequences, codes, strict=True)
            }
        else:
            sampled = draw(self.logits_RV[: len(sequences)], self.rows)
            self.wait()
        bad_rows = self.told_2R[1, : len(sequences)].nonzero()[:, 0].tolist()
        sampled.update(failures(self.plan, bad_rows, self.step.health))
        return StepResult(sampled)


def _nothing_to_wait_for() -> Callable[[], object]:
    return lambda: None


def _recorded_event() -> Callable[[], object]:
    event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return lambda: event.synchronize()


@torch.inference_mode()
def capture_runner(
    eager: Runner,
    decoder: Decoder,
    sizes: GraphSizes,
    num_columns: int,
    num_ranks: int,
    capture: Capture,
    tail: Tail = GREEDY,
) -> CapturedRunner:
    """Captures a graph of every size, the largest first. ``num_columns`` blocks hold the longest context. The cache
    must have one block more than the scheduler knows of in each group (see ``spare_blocks``): padding writes there.
    Collective within the group."""
    device, cache = eager.device, eager.cache
    buffers = DecodeBuffers(sizes.largest, num_columns, spare_blocks(decoder, cache), cache.block_size, device)
    outputs = Outputs.allocate(sizes.largest, decoder.config.vocab_size, device)
    layouts = static_layouts(decoder)
    nobody, _ = build_batch(StepPlan((), 0, 0, 0.0), (0,), cache.block_size, _HOST)
    steps = {}
    for num_rows in reversed(sizes.rows):
        buffers.fill_(num_rows, nobody)
        steps[num_rows] = capture_step(num_rows, decoder, cache, buffers, outputs, layouts, tail, capture, num_ranks)
    return CapturedRunner(eager, sizes, steps, buffers, outputs, layouts, tail)


def spare_blocks(decoder: Decoder, cache: KVCache) -> tuple[int, ...]:
    """By cache group: its last block."""
    layers = decoder.cache_spec.layers
    first = {layer.group: index for index, layer in reversed(list(enumerate(layers)))}
    return tuple(cache.layers[first[group]].shape[0] - 1 for group in range(decoder.cache_spec.num_groups))
