"""vLLM's engine on a CPU, in this process: compiled, continuous batching, prefixes not cached (prompts are random)."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.peers.engines.port import Emit, Settings
from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind

MAX_STEP_TOKENS = 4096


class VllmCpu:
    def __init__(self, settings: Settings) -> None:
        llm = LLM(
            settings.model,
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=settings.max_length,
            max_num_seqs=settings.max_sequences,
            max_num_batched_tokens=MAX_STEP_TOKENS,
            kv_cache_memory_bytes=settings.cache_bytes,
            enable_prefix_caching=False,
        )
        self._engine = llm.llm_engine

    def add(self, number: int, prompt: Sequence[int], num_output: int) -> None:
        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=num_output,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self._engine.add_request(str(number), {"prompt_token_ids": list(prompt)}, sampling)

    def step(self, emit: Emit) -> None:
        emit({int(each.request_id): list(each.outputs[0].token_ids) for each in self._engine.step()})
