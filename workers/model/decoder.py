"""The decoder: embedding, layers, norm, LM head.

Legend: T tokens, N ranks of the group, M model width, R rows whose logits are wanted, V vocabulary, G cache groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moestro.kernels.backend import Backend, Spans
from moestro.kernels.rms_norm import rms_norm
from moestro.router.expert_parallel import ExpertParallel
from moestro.router.parallel import TensorParallel
from moestro.workers.batch import Batch
from moestro.workers.kv_cache import CacheSpec, KVCache
from moestro.workers.model.attention import Attention, build_attention
from moestro.workers.model.mlp import DenseMlp, build_mlp
from moestro.workers.model.moe import ExpertBank, MoeMlp, build_moe
from moestro.workers.model.rope import Rope, make_rope
from moestro.workers.model.sharding import token_shares
from moestro.workers.model.vocabulary import Embedding, LMHead, build_vocabulary
from moestro.workers.model.weights import WeightSource, read
from moestro.workers.model_config import DenseSpec, LayerSpec, ModelConfig, MoeSpec


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One layer; ``group`` says which of the step's plans and tables are its own."""

    attention_norm_M: Tensor
    attention: Attention
    mlp_norm_M: Tensor
    mlp: DenseMlp | MoeMlp
    group: int
    eps: float


@dataclass(frozen=True, slots=True)
class Decoder:
    """One rank's share of a model."""

    config: ModelConfig
    cache_spec: CacheSpec
    embedding: Embedding
    rope: Rope
    layers: tuple[DecoderLayer, ...]
    norm_M: Tensor
    head: LMHead
    backend: Backend

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
        cos_T1D, sin_T1D = self.rope.tables(batch.positions_T)
        x_TM, delta_TM = self.embedding.forward(batch.token_ids_T), None
        add_rms_norm = self.backend.add_rms_norm
        for index, (layer, kv_NCbD) in enumerate(zip(self.layers, cache.layers, strict=True)):
            x_TM, h_TM = add_rms_norm(x_TM, delta_TM, layer.attention_norm_M, layer.eps)
            delta_TM = layer.attention.forward(h_TM, cos_T1D, sin_T1D, plans_G[layer.group], kv_NCbD)
            x_TM, h_TM = add_rms_norm(x_TM, delta_TM, layer.mlp_norm_M, layer.eps)
            if isinstance(layer.mlp, MoeMlp):
                delta_TM = layer.mlp.forward(h_TM, routed_N, partial(batch.health.saw_gate, index))
            else:
                delta_TM = layer.mlp.forward(h_TM)
            if batch.trace is not None:
                batch.trace.take(x_TM + delta_TM)
        if delta_TM is not None:
            x_TM = x_TM + delta_TM
        batch.health.saw_result(x_TM)
        x_RM = rms_norm(x_TM.index_select(0, batch.logit_rows_R), self.norm_M, self.config.norm_eps)
        return self.head.forward(x_RM)

    def _plan(self, batch: Batch, cache: KVCache) -> list[Any]:
        """One plan per group, made by the group's first layer: the layers of a group have the same attention."""
        first_G = {layer.group: layer.attention for layer in reversed(self.layers)}
        return [
            first_G[group].kernel.plan(
                Spans(
                    batch.query_start_S1,
                    batch.context_len_S,
                    batch.num_decodes,
                    tables.block_table_SB,
                    tables.slot_T,
                    cache.block_size,
                )
            )
            for group, tables in enumerate(batch.tables_G)
        ]

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
    embedding, head = build_vocabulary(config.vocab_size, config.hidden_size, config.tie_embeddings, source, tp)
    layers: list[DecoderLayer] = []
    num_moe = 0
    for index, spec in enumerate(config.layers):
        layers.append(_build_layer(config, spec, f"model.layers.{index}.", source, tp, experts, num_moe))
        num_moe += isinstance(spec.mlp, MoeSpec)
    return Decoder(
        config=config,
        cache_spec=CacheSpec(
            tuple(layer.attention.cache(layer.group) for layer in layers), config.windows, source.dtype, source.device
        ),
        embedding=embedding,
        rope=make_rope(config.rope, source.device),
        layers=tuple(layers),
        norm_M=read(source, "model.norm.weight", config.hidden_size),
        head=head,
        backend=source.backend,
    )


def _build_layer(
    config: ModelConfig,
    spec: LayerSpec,
    prefix: str,
    source: WeightSource,
    tp: TensorParallel,
    experts: ExpertParallel,
    moe_index: int,
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
        else build_moe(spec.mlp, width, prefix + "mlp.", source, tp, experts, moe_index),
        group=config.windows.index(spec.attention.window),
        eps=eps,
    )
