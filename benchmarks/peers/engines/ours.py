"""Moestro without a cluster: built as a rank is built, so whatever kernels a rank has are measured."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from benchmarks.peers.engines.port import Emit, Settings

from moestro.protos.sequences import SamplingParams, SequenceRequest
from moestro.workers.device import configure_torch
from moestro.workers.loading import load_model
from moestro.workers.rank_setup import RankSpec, build_engine

MAX_STEP_TOKENS = 4096


class Ours:
    def __init__(self, settings: Settings) -> None:
        torch.set_num_threads(settings.threads)
        configure_torch("cpu")
        spec = RankSpec(
            model=settings.model,
            threads=settings.threads,
            kv_bytes=settings.cache_bytes,
            max_num_tokens=MAX_STEP_TOKENS,
            max_num_sequences=settings.max_sequences,
        )
        self._engine = build_engine(spec, load_model(settings.model), torch.device("cpu"))

    def add(self, number: int, prompt: Sequence[int], num_output: int) -> None:
        sampling = SamplingParams(temperature=0.0, max_tokens=num_output, ignore_eos=True)
        refusal = self._engine.add(SequenceRequest(str(number), tuple(prompt), sampling), time.monotonic())
        if refusal is not None:
            raise RuntimeError(str(refusal))

    def step(self, emit: Emit) -> None:
        emit({int(delta.sequence_id): delta.token_ids for delta in self._engine.step(time.monotonic)})
