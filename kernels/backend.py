"""What a model asks of a device: a backend computes every operation of a layer.

Legend: T tokens, M model width, N heads of queries, keys and values together, Q query heads, D head width, O output and
I input features, S sequences, B block-table columns, N blocks of the cache, C slabs of a block, b tokens of a block,
E experts, K experts per token.

There are three: ``plain`` (torch operations, any device, the reference of the others), ``cpu`` (C++, bf16) and ``cuda``
(Triton, bf16). A model holds what its backend made and never asks which it is. ``choose_backend`` picks one, openly.

All of them keep the promise of the project: a row's bits do not depend on the rows beside it, nor on how many there
are, nor on how a sequence was cut into spans. Two backends differ from each other by rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar, get_args

import torch
from torch import Tensor

from moestro.kernels.gate import GateSpec
from moestro.kernels.grouped_experts import ExpertShape, Fill, GroupedExperts
from moestro.kernels.linear import Linear


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """One layer's heads on one rank. Head h of the queries reads key/value head ``h * num_kv_heads // num_heads``."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int  # the first numbers of a head, which are rotated; even, at most head_dim
    scale: float  # of the scores
    window: int | None  # a query sees this many keys, its own included; None: all before it
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """RMS norm of each query and key head on its own, before rotation."""

    weight_ND: Tensor  # fp32; one row per query head, then per key head
    eps: float


@dataclass(frozen=True, slots=True)
class Spans:
    """Where the tokens of a step belong: a span is the run of tokens of one sequence that the step computes. Sequences
    with one token (decodes) come first."""

    query_start_S1: Sequence[int]  # span s is tokens query_start_S1[s] : query_start_S1[s + 1]
    context_len_S: Sequence[int]  # tokens in the cache after this step, the span included
    num_decodes: int  # the first num_decodes spans have exactly one token
    block_table_SB: Tensor  # int32; block ids in the order of positions, padded with 0; behind a window: 0
    slot_T: Tensor  # int64; block id * block_size + offset, where each token's key and value are written
    block_size: int


@dataclass(frozen=True, slots=True)
class Decodes:
    """A step of one token a sequence, all of it on the device and of fixed shape: what a CUDA graph is captured over
    once and replayed with other values in the same tensors."""

    context_len_S: Tensor  # int32; tokens in the cache after this step, at least one
    block_table_SB: Tensor  # int32; as wide as the longest context; what stands behind a context is never to be read
    slot_S: Tensor  # int64; where each token's key and value are written
    block_size: int


BackendName = Literal["auto", "plain", "cpu", "cuda"]  # auto: to be chosen, the name of none
NAMES: tuple[BackendName, ...] = get_args(BackendName)

Plan = TypeVar("Plan")


class PagedAttention(Protocol[Plan]):
    """Norm, rotation, cache and product of one layer."""

    def plan(self, spans: Spans) -> Plan:
        """What depends on the step alone: made once for all layers that share a block table and a shape. Does not wait
        for the device."""

    def plan_decodes(self, decodes: Decodes) -> Plan:
        """``plan`` for a captured step: to be called within the capture. Nothing is read on the host, and what is
        derived from the tensors is derived on the device, so that a replay sees their new values. The same bits."""

    def apply(self, qkv_TND: Tensor, cos_T1D: Tensor, sin_T1D: Tensor, kv_NCbD: Tensor, plan: Plan) -> Tensor:
        """out_TQD = softmax(q k^T * scale) v of each token over the keys it sees.

        ``qkv_TND`` holds query, key and value heads in this order and may be overwritten; ``cos`` and signed ``sin``
        are ``rotary_tables``, D being ``rotary_dim``. Queries and keys are normalised (where the layer has a head norm)
        and rotated in fp32 and rounded once; keys and values are left in the cache, ``[blocks, key heads then value
        heads, tokens, width]``, where a block is emptied before its first slot is written.
        """


@dataclass(frozen=True, slots=True)
class LayerParts:
    """A layer of plain attention and a mixture whose experts are all here, as what its backend made of it."""

    attention_norm_M: Tensor
    mlp_norm_M: Tensor
    eps: float
    qkv: Linear
    attention: PagedAttention[Any]
    out: Linear
    gate: Linear
    gate_spec: GateSpec
    gate_bias_E: Tensor | None
    experts: GroupedExperts


class LayerStack(Protocol):
    """Several layers in one call. Legend: Y layers, L slots of a layer."""

    def run(
        self,
        x_TM: Tensor,
        cos_T1D: Tensor,
        sin_T1D: Tensor,
        plan_Y: Sequence[Any],
        kv_Y: Sequence[Tensor],
        slot_YE: Sequence[Tensor],
        rows_YL: Sequence[Tensor],
        wants_hidden: bool,
    ) -> tuple[list[Tensor], Tensor | None]:
        """Leaves in ``x_TM`` the stream after the last layer; returns weights_TK of every gate and, where wanted,
        hidden_YTM, the stream after each layer. ``slot_YE`` says where each layer's experts are; the rows that a slot
        computed are added to ``rows_YL``. The bits are those of the layers' parts called one by one."""


class Backend(Protocol):
    """The operations of a layer on one kind of device."""

    @property
    def name(self) -> BackendName: ...

    def empty_weight(self, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """An unfilled weight_OI on its way into ``make_linear``."""

    def make_linear(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> Linear:
        """The caller drops its reference to ``weight_OI``, which may have been repacked."""

    def make_experts(self, shape: ExpertShape, fills: Sequence[Fill | None], room: int = 0) -> GroupedExperts:
        """One slot per entry of ``fills``; None leaves it empty. ``room``: slots that there may ever be, if more."""

    def make_attention(self, shape: AttentionShape, norm: HeadNorm | None) -> PagedAttention[Any]: ...

    def add_rms_norm(
        self, x_TM: Tensor, delta_TM: Tensor | None, weight_M: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """The residual stream ``x + delta`` (rounded to the dtype of x) and its RMS norm times ``weight``, reduced in
        fp32. The stream may be ``x_TM`` itself, overwritten. Without ``delta_TM`` it is ``x_TM``."""

    def make_stack(self, layers: Sequence[LayerParts]) -> LayerStack | None:
        """All of these layers as one, where the backend has a way that gains something; else None."""

    def route(self, logits_TE: Tensor, bias_E: Tensor | None, spec: GateSpec) -> tuple[Tensor, Tensor]:
        """The choice that ``gate.route`` describes: ids_TK (int64) and weights_TK (fp32). Scores may differ from its
        own in their last bits, so all ranks of a group must have the same backend."""
