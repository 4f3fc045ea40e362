"""The feed-forward part of a layer, from the fields of a ``config.json``: one function per family of classes.

What an absent field means is what the class in transformers makes of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from moestro.kernels.gate import GateSpec, GroupSpec, Score
from moestro.workers.config_fields import Fields
from moestro.workers.model_config import DenseSpec, MoeSpec, SharedSpec


def dense(fields: Fields, layer: int) -> DenseSpec:
    """Llama, Mistral, Qwen3."""
    return DenseSpec(fields.integer("intermediate_size"), fields.flag("mlp_bias", False))


def _gate(fields: Fields, renormalize: bool) -> GateSpec:
    # transformers 5 writes num_local_experts where older releases wrote num_experts, and the reverse.
    name = "num_experts" if fields.has("num_experts") else "num_local_experts"
    num_experts = fields.integer(name)
    return GateSpec(num_experts, _top_k(fields, num_experts, name), renormalize)


def _top_k(fields: Fields, num_experts: int, described: str) -> int:
    top_k = fields.integer("num_experts_per_tok")
    if top_k > num_experts:
        raise fields.error("num_experts_per_tok", f"must be at most {described} {num_experts}, not {top_k}")
    return top_k


def _deepseek_gate(fields: Fields, renormalize: bool) -> GateSpec:
    num_experts = fields.integer("n_routed_experts")
    groups = _groups(fields, num_experts)
    if groups is None:
        top_k = _top_k(fields, num_experts, "n_routed_experts")
    else:
        candidates = groups.top_k * (num_experts // groups.num_groups)
        top_k = _top_k(fields, candidates, f"the experts in topk_group {groups.top_k} groups,")
    return GateSpec(
        num_experts,
        top_k,
        fields.flag("norm_topk_prob", renormalize),
        Score.SIGMOID,
        has_bias=True,
        groups=groups,
        scaling=fields.number("routed_scaling_factor", 1.0),
        fp32_logits=True,
    )


def _groups(fields: Fields, num_experts: int) -> GroupSpec | None:
    num_groups, top_k = fields.integer("n_group", 1), fields.integer("topk_group", 1)
    if num_experts % num_groups:
        raise fields.error("n_group", f"must divide n_routed_experts {num_experts}, not {num_groups}")
    if top_k > num_groups:
        raise fields.error("topk_group", f"must be at most n_group {num_groups}, not {top_k}")
    if top_k == num_groups:  # no expert is left out
        return None
    if num_experts // num_groups < 2:
        reason = f"must leave groups of 2 experts, whose scores are added, not {num_groups} of {num_experts} experts"
        raise fields.error("n_group", reason)
    return GroupSpec(num_groups, top_k)


def mixtral_moe(fields: Fields, layer: int) -> MoeSpec:
    """Every layer a mixture, weights always renormalised."""
    return MoeSpec(_gate(fields, renormalize=True), fields.integer("intermediate_size"))


def olmoe_moe(fields: Fields, layer: int) -> MoeSpec:
    """Every layer a mixture, weights renormalised if a flag says so."""
    return MoeSpec(_gate(fields, fields.flag("norm_topk_prob", False)), fields.integer("intermediate_size"))


def qwen_moe(fields: Fields, layer: int) -> DenseSpec | MoeSpec:
    """A mixture in every so many layers, but for those that are listed as dense."""
    if layer in fields.integers("mlp_only_layers") or (layer + 1) % fields.integer("decoder_sparse_step", 1):
        return DenseSpec(fields.integer("intermediate_size"))
    return MoeSpec(_gate(fields, fields.flag("norm_topk_prob", False)), fields.integer("moe_intermediate_size"))


def qwen2_moe(fields: Fields, layer: int) -> DenseSpec | MoeSpec:
    """The same with a gated shared expert."""
    mlp = qwen_moe(fields, layer)
    if isinstance(mlp, DenseSpec):
        return mlp
    return replace(mlp, shared=SharedSpec(fields.integer("shared_expert_intermediate_size"), gated=True))


def deepseek_moe(first_dense: int, renormalize: bool) -> Callable[[Fields, int], DenseSpec | MoeSpec]:
    """Dense layers, then mixtures with DeepSeek-V3's gate; the arguments are what absent fields mean."""

    def mlp(fields: Fields, layer: int) -> DenseSpec | MoeSpec:
        if layer < fields.integer("first_k_dense_replace", first_dense, minimum=0):
            return DenseSpec(fields.integer("intermediate_size"))
        width, num_shared = fields.integer("moe_intermediate_size"), fields.integer("n_shared_experts", 1)
        return MoeSpec(_deepseek_gate(fields, renormalize), width, SharedSpec(num_shared * width, gated=False))

    return mlp
