"""The decoder: embedding, layers, norm, LM head.

Legend: T tokens, N ranks of the group, M model width, R rows whose logits are wanted, V vocabulary, G cache groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor

from moestro.kernels.rms_norm import rms_norm
from moestro.router.expert_parallel import ExpertParallel
from moestro.router.parallel import TensorParallel
from moestro.workers.batch import Batch
from moestro.workers.kv_cache import CacheSpec, KVCache
from moestro.workers.model.attention import build_attention
from moestro.workers.model.layer_stack import DecoderLayer, LayerStack, LoopedStack, Rotation, make_stack
from moestro.workers.model.mlp import build_mlp
from moestro.workers.model.moe import ExpertBank, MoeMlp, build_moe
from moestro.workers.model.rope import Rope, make_rope
from moestro.workers.model.sharding import token_shares
from moestro.workers.model.vocabulary import Embedding, LMHead, build_vocabulary
from moestro.workers.model.weights import WeightSource, read
from moestro.workers.model_config import DenseSpec, LayerSpec, ModelConfig, MoeSpec


@dataclass(frozen=True, slots=True)
class Decoder:
    """One rank's share of a model."""

    config: ModelConfig
    cache_spec: CacheSpec
    embedding: Embedding
    rope: Rope
    stack: LayerStack
    norm_M: Tensor
    head: LMHead

    @property
    def layers(self) -> tuple[DecoderLayer, ...]:
        return self.stack.layers

    def with_layers(self, layers: tuple[DecoderLayer, ...]) -> Decoder:
        """The same model around other layers, which are run one by one."""
        return replace(self, stack=LoopedStack(layers, self.stack.backend))

    def over(self, experts: ExpertParallel) -> Decoder:
        """The same model with its experts over a group. Every bank must hold what the placements say of this rank, and
        is the new model's from now on: this one is not to be used any more."""
        indices = count()
        layers = tuple(
            replace(layer, mlp=layer.mlp.over(experts, next(indices))) if isinstance(layer.mlp, MoeMlp) else layer
            for layer in self.layers
        )
        return replace(self, stack=make_stack(layers, self.stack.backend))

    @property
    def banks(self) -> dict[int, ExpertBank]:
        """The experts held here, by layer; layers without a mixture have none."""
        return {index: layer.mlp.bank for index, layer in enumerate(self.layers) if isinstance(layer.mlp, MoeMlp)}

    @torch.inference_mode()
    def forward(self, batch: Batch, cache: KVCache) -> Tensor:
        """logits_RV (fp32) of ``batch.logit_rows_R``; the batch's keys and values are left in ``cache``.

        Collective: every rank of the group calls it once a step, an idle rank with a batch of zero tokens.
        """
        if batch.num_tokens == 0:
            return self._step_along(batch)
        routed_N = token_shares(batch.num_tokens_N, self.embedding.tp.size)
        plans_G = self._plan(batch, cache)
        rotation = Rotation(*self.rope.tables(batch.positions_T))
        x_TM = self.embedding.forward(batch.token_ids_T)
        x_TM = self.stack.forward(x_TM, rotation, plans_G, routed_N, batch, cache)
        batch.health.saw_result(x_TM)
        x_RM = rms_norm(x_TM.index_select(0, batch.logit_rows_R), self.norm_M, self.config.norm_eps)
        return self.head.forward(x_RM)

    def _plan(self, batch: Batch, cache: KVCache) -> list[Any]:
        """One plan per group, made by the group's first layer: the layers of a group have the same attention."""
        first_G = {layer.group: layer.attention for layer in reversed(self.layers)}
        return [batch.plan(first_G[group].kernel, group, cache.block_size) for group in range(len(batch.tables_G))]

    def _step_along(self, batch: Batch) -> Tensor:
        """Takes part in the collectives of the expert-parallel group and in nothing else."""
        x_TM = self.embedding.weight_vM.new_empty(0, self.config.hidden_size)
        routed_N = token_shares(batch.num_tokens_N, self.embedding.tp.size)
        for index, layer in enumerate(self.layers):
            if isinstance(layer.mlp, MoeMlp):
                layer.mlp.forward(x_TM, routed_N, partial(batch.health.saw_gate, index))
        return x_TM.new_empty(0, self.config.vocab_size, dtype=torch.float32)


def build_decoder(
    config: ModelConfig,
    source: WeightSource,
    tp: TensorParallel,
    experts: ExpertParallel,
) -> Decoder:
    """Reads this rank's weights layer by layer. Raises ConfigError when ``tp`` does not fit the model."""
    held = [placement.slots[experts.rank] for placement in experts.placements]
    return build_share(config, source, tp, held).over(experts)


def build_share(
    config: ModelConfig, source: WeightSource, tp: TensorParallel, held: Sequence[Sequence[int]]
) -> Decoder:
    """Reads a rank's weights for no group in particular: of the experts those ``held``, by mixture layer and slot.
    ``Decoder.over`` makes it a model that computes. Raises ConfigError when ``tp`` does not fit the model."""
    embedding, head = build_vocabulary(config.vocab_size, config.hidden_size, config.tie_embeddings, source, tp)
    layers: list[DecoderLayer] = []
    held_by_layer = iter(held)
    for index, spec in enumerate(config.layers):
        here = next(held_by_layer) if isinstance(spec.mlp, MoeSpec) else ()
        layers.append(_build_layer(config, spec, f"model.layers.{index}.", source, tp, here))
    return Decoder(
        config=config,
        cache_spec=CacheSpec(
            tuple(layer.attention.cache(layer.group) for layer in layers), config.windows, source.dtype, source.device
        ),
        embedding=embedding,
        rope=make_rope(config.rope, source.device),
        stack=make_stack(tuple(layers), source.backend),
        norm_M=read(source, "model.norm.weight", config.hidden_size),
        head=head,
    )


def _build_layer(
    config: ModelConfig,
    spec: LayerSpec,
    prefix: str,
    source: WeightSource,
    tp: TensorParallel,
    held: Sequence[int],
) -> DecoderLayer:
    width, eps = config.hidden_size, config.norm_eps
    return DecoderLayer(
        attention_norm_M=read(source, prefix + "input_layernorm.weight", width),
        attention=build_attention(
            spec.attention, config.rope.rotary_dim, width, eps, prefix + "self_attn.", source, tp
        ),
        mlp_norm_M=read(source, prefix + "post_attention_layernorm.weight", width),
        mlp=build_mlp(spec.mlp, width, prefix + "mlp.", source, tp)
        if isinstance(spec.mlp, DenseSpec)
        else build_moe(spec.mlp, width, prefix + "mlp.", source, tp, held),
        group=config.windows.index(spec.attention.window),
        eps=eps,
    )
