"""Where the time must go: bytes that a step has to read, and the shortest time that follows from the memory here.

The bytes are ``gpu_suite.costs``', split by what they are. Routing is taken as uniform, so at batch B a layer's
distinct experts are E (1 - (1 - k / E)^B). A model that partly stays in the last-level cache between steps can be
faster than its floor.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.gpu_suite.costs import StepCost, step_cost

from moestro.workers.model_config import ModelConfig


@dataclass(frozen=True, slots=True)
class Machine:
    """Measured in the same run: reading memory, and a bf16 product."""

    bytes_per_s: float
    flop_per_s: float


@dataclass(frozen=True, slots=True)
class StepBytes:
    """Bytes that one step reads: experts that some token chose; attention, gates and head; keys and values."""

    experts: float
    dense: float
    cache: float

    @property
    def total(self) -> float:
        return self.experts + self.dense + self.cache


def cache_bytes(config: ModelConfig, num_tokens: int, itemsize: int = 2) -> int:
    """Keys and values of ``num_tokens`` tokens."""
    heads = sum(2 * layer.attention.num_kv_heads * layer.attention.head_dim for layer in config.layers)
    return num_tokens * heads * itemsize


def decode_bytes(config: ModelConfig, batch: int, context: float) -> StepBytes:
    """Of a decode step of ``batch`` sequences with ``context`` tokens each, in bf16."""
    whole = decode_cost(config, batch, context).num_bytes
    without_cache = step_cost(config, num_tokens=batch, context_tokens=0, logit_rows=batch).num_bytes
    dense = step_cost(config, num_tokens=batch, context_tokens=0, logit_rows=batch, distinct_experts=0.0).num_bytes
    return StepBytes(experts=without_cache - dense, dense=dense, cache=whole - without_cache)


def decode_cost(config: ModelConfig, batch: int, context: float) -> StepCost:
    return step_cost(config, num_tokens=batch, context_tokens=batch * context, logit_rows=batch)


def prefill_cost(config: ModelConfig, batch: int, prompt: int) -> StepCost:
    """All prompts in one step, one row of logits each; attention's own arithmetic is not counted."""
    return step_cost(config, num_tokens=batch * prompt, context_tokens=0, logit_rows=batch)


def decode_roof(config: ModelConfig, batch: int, context: float, machine: Machine) -> float:
    """Tokens per second at most."""
    return batch / decode_cost(config, batch, context).roof_s(machine.bytes_per_s, machine.flop_per_s)


def prefill_roof(config: ModelConfig, batch: int, prompt: int, machine: Machine) -> float:
    """Tokens per second at most."""
    return batch * prompt / prefill_cost(config, batch, prompt).roof_s(machine.bytes_per_s, machine.flop_per_s)
