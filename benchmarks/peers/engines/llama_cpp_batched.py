"""llama.cpp through llama-cpp-python's low-level interface: one ``llama_decode`` a step over all running sequences.

Continuous batching of the simplest kind: what has arrived joins the next step with its whole prompt, as long as a
sequence id is free. Each sequence has a cache stream of its own.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import llama_cpp
import numpy as np
from benchmarks.peers.engines.port import Emit, Settings

MAX_STEP_TOKENS = 8192  # n_batch: cut by llama.cpp itself into pieces of n_ubatch
UBATCH_TOKENS = 512
GGUF_NAME = "model.bf16.gguf"  # beside the checkpoint


@dataclass(slots=True)
class Running:
    """A sequence with a slot: ``pending`` tokens come next, the first of them at ``position``."""

    number: int
    slot: int
    pending: Sequence[int]
    position: int
    num_left: int  # tokens still to be made


class LlamaCppBatched:
    def __init__(self, settings: Settings) -> None:
        llama_cpp.llama_backend_init()
        print(llama_cpp.llama_print_system_info().decode())  # which instructions it was built with
        model_params = llama_cpp.llama_model_default_params()
        path = Path(settings.model) / GGUF_NAME
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {GGUF_NAME}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = settings.max_sequences * settings.max_length
        params.n_batch = MAX_STEP_TOKENS
        params.n_ubatch = UBATCH_TOKENS
        params.n_seq_max = settings.max_sequences
        params.n_threads = params.n_threads_batch = settings.threads
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO
        params.kv_unified = False
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError("llama.cpp cannot make a context")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(MAX_STEP_TOKENS, 0, 1)
        self._free = list(range(settings.max_sequences))
        self._waiting: deque[tuple[int, Sequence[int], int]] = deque()
        self._running: list[Running] = []

    def add(self, number: int, prompt: Sequence[int], num_output: int) -> None:
        self._waiting.append((number, prompt, num_output))

    def step(self, emit: Emit) -> None:
        self._admit()
        self._fill()
        if llama_cpp.llama_decode(self._context, self._batch) != 0:
            raise RuntimeError("llama_decode failed")
        emit(self._take())

    def _admit(self) -> None:
        room = MAX_STEP_TOKENS - len(self._running)
        while self._waiting and self._free and len(self._waiting[0][1]) <= room:
            number, prompt, num_output = self._waiting.popleft()
            room -= len(prompt)
            self._running.append(Running(number, self._free.pop(), prompt, 0, num_output))

    def _fill(self) -> None:
        batch, index = self._batch, 0
        for sequence in self._running:
            for offset, token in enumerate(sequence.pending):
                batch.token[index] = token
                batch.pos[index] = sequence.position + offset
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = sequence.slot
                batch.logits[index] = 0
                index += 1
            batch.logits[index - 1] = 1
        batch.n_tokens = index

    def _take(self) -> dict[int, list[int]]:
        """The greedy token of each running sequence; those that end give their slot back. Logits come in the order of
        the batch, one row for each token that asked for them."""
        pointer = llama_cpp.llama_get_logits(self._context)
        floats = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float))
        logits = np.ctypeslib.as_array(floats, (len(self._running), self._vocabulary))
        tokens = logits.argmax(axis=1).tolist()
        for sequence, token in zip(self._running, tokens, strict=True):
            sequence.position += len(sequence.pending)
            sequence.pending = (token,)
            sequence.num_left -= 1
            if sequence.num_left == 0:
                llama_cpp.llama_memory_seq_rm(self._memory, sequence.slot, -1, -1)
                self._free.append(sequence.slot)
        result = {sequence.number: [token] for sequence, token in zip(self._running, tokens, strict=True)}
        self._running = [sequence for sequence in self._running if sequence.num_left]
        return result
