"""What a step must move and compute at least: the roof that measured times are compared with.

Counted: every weight that the step needs, once; the keys and values of the context, once; the embedding rows and
new keys and values of the batch. Not counted: activations, logits, and whatever an implementation reads twice.
"""

from __future__ import annotations

from dataclasses import dataclass

from moestro.workers.model_config import DenseSpec, LayerSpec, ModelConfig


@dataclass(frozen=True, slots=True)
class StepCost:
    """Bytes that must cross the memory bus and floating-point operations (a multiply-add is two)."""

    num_bytes: float
    flop: float

    def roof_s(self, bytes_per_s: float, flop_per_s: float) -> float:
        """The shortest time: memory and arithmetic overlap perfectly."""
        return max(self.num_bytes / bytes_per_s, self.flop / flop_per_s)


def expected_distinct(num_experts: int, top_k: int, num_tokens: int) -> float:
    """Experts that at least one of the tokens chose, when each chooses ``top_k`` uniformly and independently."""
    return num_experts * (1 - (1 - top_k / num_experts) ** num_tokens)


def step_cost(
    config: ModelConfig,
    *,
    num_tokens: int,
    context_tokens: float,
    logit_rows: int,
    distinct_experts: float | None = None,
    itemsize: int = 2,
) -> StepCost:
    """One step of ``num_tokens`` tokens. ``context_tokens`` are read from the cache, over all sequences (by a layer
    with a window at most that much of each of ``num_tokens`` decoding ones); attention's own arithmetic is not counted.
    ``distinct_experts`` per layer; None: the expectation under uniform routing."""
    weights = flop_per_token = cache = 0.0
    for layer in config.layers:
        read, used = _layer_weights(config, layer, num_tokens, distinct_experts)
        weights += read
        flop_per_token += 2 * used
        per_token, window = 2 * layer.attention.num_kv_heads * layer.attention.head_dim, layer.attention.window
        seen = context_tokens if window is None else min(context_tokens, window * num_tokens)
        cache += per_token * (seen + num_tokens)
    head = config.vocab_size * config.hidden_size
    numbers = weights + head + num_tokens * config.hidden_size + cache
    return StepCost(numbers * itemsize, num_tokens * flop_per_token + 2.0 * logit_rows * head)


def _layer_weights(
    config: ModelConfig, layer: LayerSpec, num_tokens: int, distinct_experts: float | None
) -> tuple[float, float]:
    """Numbers of a layer that a step reads, and that one token is multiplied with."""
    width, attention = config.hidden_size, layer.attention
    heads = 2 * attention.num_heads + 2 * attention.num_kv_heads
    dense = float(width * heads * attention.head_dim)
    if isinstance(layer.mlp, DenseSpec):
        dense += 3 * width * layer.mlp.width
        return dense, dense
    gate, expert = layer.mlp.gate, 3.0 * width * layer.mlp.width
    dense += width * gate.num_experts
    if (shared := layer.mlp.shared) is not None:
        dense += 3 * width * shared.width + width * shared.gated
    distinct = distinct_experts
    if distinct is None:
        distinct = expected_distinct(gate.num_experts, gate.top_k, num_tokens)
    return dense + distinct * expert, dense + gate.top_k * expert
